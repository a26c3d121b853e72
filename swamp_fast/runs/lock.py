"""A lock by which only one process at a time writes into the folder of a run or of a sweep.

The lock's file holds the name of the process and is deleted when the run ends. The package filelock guarantees neither.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from swamp_fast.common.warn import warn_user

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the errors of file systems without locks


_HELD: set[int] = set()  # the descriptors of the locks that this process holds


def _release_in_child() -> None:
    """Close the locks that a forked process, such as a DataLoader's worker, inherits; else it would hold them too."""
    for file in _HELD:
        os.close(file)
    _HELD.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_release_in_child)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that holds the lock of a folder. The operating system releases the lock even if the process is killed.

    Raises ValueError if another process or another run of this process holds the lock, and OSError if the folder is
    read-only.
    """
    if fcntl is None:
        yield
        return
    path = folder / NAME
    file = _opened(path)
    _HELD.add(file)
    try:
        with suppress(OSError):  # on a full disk, the lock is held even if its file stays empty
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with suppress(OSError):
            # Delete the file before the lock is released: a process that opened it in the meantime then notices in
            # `_opened` that it is gone, and opens a new file.
            path.unlink()
        _HELD.discard(file)
        os.close(file)


def _opened(path: Path) -> int:
    """Open the lock's file, lock it, and return its descriptor."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path.parent} can't be written to ({error}), but results are written there. Make it writable, or "
                "name another folder; to only read a run, use SwampResult.load.",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace") or "a process"
            if error.errno in CANNOT_LOCK:
                warn_user(f"{path.parent} can't be locked ({error}); make sure that only one process uses it.")
                return file
            os.close(file)
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"{path.parent} is in use by {holder}. Wait until it ends, stop it, or name another folder."
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)  # its former holder deleted this file in the meantime, so try again with a new one
