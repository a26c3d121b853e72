"""The cache of machine code on disk, in a folder that only the user can write to.

Code from the cache runs on the GPU. A file is therefore used only if the folder and the file belong to the user, nobody
else may write to them, and the code has the digest with which the file begins. A file that was left empty or shortened
by a power loss fails this test; its code is compiled anew, and the file is replaced. Without a folder that can be
trusted there is no cache, which only costs time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DIGEST_BYTES = 32
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read(name: str) -> bytes | None:
    """The code stored under a name; None if there is no such file that can be trusted."""
    with suppress(OSError), _opened_folder() as folder:
        if folder is not None:
            # Without O_NONBLOCK, opening a pipe would wait for a writer.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                return _content(name, file)
            finally:
                os.close(file)
    return None


def write(name: str, code: bytes) -> None:
    """Store code under a name, if there is a folder that can be trusted. The file appears complete or not at all."""
    with suppress(OSError), _opened_folder(make=True) as folder:
        if folder is not None:
            temporary = f".{name}.{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(temporary, flags, 0o600, dir_fd=folder)
            try:
                with os.fdopen(file, "wb") as stored:
                    stored.write(_digest(name, code) + code)
                    stored.flush()
                    os.fsync(file)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise


def cache_folder() -> Path | None:
    """The folder SWAMP_FAST_CACHE, else swamp_fast in XDG_CACHE_HOME or ~/.cache; None if the user has no home.

    As XDG's specification requires, an XDG_CACHE_HOME that is empty or not absolute is ignored.
    """
    with suppress(RuntimeError):  # raised where `~` has no meaning, because the user has no home
        if given := os.environ.get("SWAMP_FAST_CACHE"):
            return Path(given).expanduser()
        given = os.environ.get("XDG_CACHE_HOME")
        base = Path(given).expanduser() if given else None
        return (base if base is not None and base.is_absolute() else Path.home() / ".cache") / "swamp_fast"
    return None


def _content(name: str, file: int) -> bytes | None:
    """The code in an open file; None if the file can't be trusted or is damaged."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or _why_not_trusted(status) is not None:
        return None
    with open(file, "rb", closefd=False) as stored:
        digest, code = stored.read(DIGEST_BYTES), stored.read()
    return code if digest == _digest(name, code) else None


@contextmanager
def _opened_folder(make: bool = False) -> Iterator[int | None]:
    """The descriptor of the cache's folder; None, with a warning, if the folder can't be trusted.

    All files are opened relative to the descriptor, so that nobody can exchange the folder in the meantime. Raises
    OSError if the folder doesn't exist or can't be opened.
    """
    path = cache_folder()
    if path is None or os.open not in os.supports_dir_fd:  # Windows has no such descriptors
        yield None
        return
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        why_not = _why_not_trusted(os.fstat(folder))
        if why_not is not None:
            _warn_once(path, why_not)
        yield folder if why_not is None else None
    finally:
        os.close(folder)


def _why_not_trusted(status: os.stat_result) -> str | None:
    """Why other users could have written to a file or folder; None if they couldn't."""
    if status.st_uid != os.geteuid():
        return f"it belongs to another user (uid {status.st_uid})"
    if status.st_mode & WRITABLE_BY_OTHERS:
        return f"other users may write it (mode {stat.S_IMODE(status.st_mode):o}); call chmod go-w on it"
    return None


@functools.cache
def _warn_once(path: Path, why_not: str) -> None:
    warnings.warn(
        f"machine code is neither read from nor kept in {path}: {why_not}. Kernels are compiled in each process; "
        "SWAMP_FAST_CACHE names another folder.",
        stacklevel=2,
    )


def _digest(name: str, code: bytes) -> bytes:
    """The digest of a file's code and name. It includes the name so that a renamed file isn't taken for another."""
    return hashlib.blake2b(name.encode() + b"\0" + code, digest_size=DIGEST_BYTES).digest()
