"""One process at a time in a run's folder.

The lock's file names its holder and is gone once the run ends; the package filelock promises neither.
"""

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
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems without locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The system releases it when the process ends, however it ends.

    Raises ValueError if another process, or another run of this process, holds it; OSError if the folder is read-only.
    """
    if fcntl is None:
        yield
        return
    path = folder / NAME
    file = _opened(path)
    try:
        with suppress(OSError):  # on a full disk the lock is held nevertheless
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened this file meanwhile notices, and opens a new one
        os.close(file)


def _opened(path: Path) -> int:
    """Open the lock's file and lock it."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(
                error.errno,
                f"run_dir {path.parent} can't be written to ({error}), but a run writes its checkpoints there. Make it "
                "writable, or name another folder; to only read a run, use SwampResult.load.",
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace") or "a process"
            if error.errno in CANNOT_LOCK:
                warnings.warn(
                    f"{path.parent} can't be locked ({error}); make sure that only one process uses it.", stacklevel=2
                )
                return file
            os.close(file)
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"run_dir {path.parent} is in use by {holder}. Wait until it ends, stop it, or name another folder."
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)  # its holder released and removed it meanwhile
