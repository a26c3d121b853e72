"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that know no locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; a process that ends in any way lets it go.

    Raises ValueError where another process holds it, or another run of this one; OSError if the folder is read-only.
    """
    if fcntl is None:
        yield
        return
    path = folder / NAME
    file = _opened(path)
    try:
        with suppress(OSError):  # on a full disk it is held all the same
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who has opened a file that is gone opens another
        os.close(file)


def _opened(path: Path) -> int:
    """The lock's file, locked."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(
                error.errno,
                f"run_dir {path.parent} can't be written to ({error}), and a run writes its checkpoints there. Make it "
                "writable, or name another folder; to read a run use SwampResult.load.",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace") or "a process"
            if error.errno in CANNOT_LOCK:
                warnings.warn(f"{path.parent} can't be locked ({error}); see that one process uses it.", stacklevel=2)
                return file
            os.close(file)
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"run_dir {path.parent} is in use: {holder} runs in it. Wait until it ends, stop it, or name another "
                "folder."
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)  # it was let go, and taken away, meanwhile
