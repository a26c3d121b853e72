"""Files that are written whole or not at all, and that are read as they were written or refused."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor


class Damaged(ValueError):
    """Raised for a file whose content is not what was written."""


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, previous: Path | None = None
) -> None:
    """Write named tensors as safetensors, atomically and with a checksum.

    previous  where the old file is moved; None replaces it
    """
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    described = {"format": "pt", **(metadata or {})}
    write(path, safetensors.torch.save(plain, metadata={**described, "checksum": checksum(plain, described)}), previous)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the named tensors, on the CPU, and the metadata of a safetensors file.

    Raises Damaged if the content is not what was written, and OSError if the file can't be read for another reason,
    such as its permissions; then it may be intact.
    """
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            # The tensors are copied, because one that maps the file would change or break with the file.
            tensors, metadata = {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except RuntimeError as error:  # the file vanished after the check above, or can't be mapped into memory
        raise OSError(f"{path} can't be read ({error}).") from error
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise Damaged(f"{path} is damaged or not a safetensors file ({error}).") from error
    written = metadata.pop("checksum", None)
    if written is not None and written != checksum(tensors, metadata):
        raise Damaged(f"{path} is damaged (its checksum differs).")
    return tensors, metadata if written is None else {**metadata, "checksum": written}


def is_there(path: Path) -> bool:
    """Whether a file has this name, even one that can't be read, such as a link to a missing file."""
    return os.path.lexists(path)


def check_readable(path: Path) -> None:
    """Raise FileNotFoundError if there is no such file, OSError if it can't be opened or is no regular file."""
    if not is_there(path):
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        if not path.is_file() and path.exists():
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} can't be read ({error}). Nothing was changed: make the file readable, or move it away to compute "
            "its content again.",
        ) from error


def as_json(content: object, indent: int | None = None) -> str:
    """Return a value as JSON text, in which null stands for numbers that are not finite."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _json_checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a dict as JSON with a checksum, atomically."""
    plain = _finite(content)
    write(path, as_json({**plain, "checksum": _json_checksum(plain)}, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the dict in a file of `write_json`. Raises Damaged, or OSError if the file can't be read."""
    check_readable(path)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if content.pop("checksum", None) != _json_checksum(content):
            raise ValueError("its checksum differs")
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error}).") from error
    return content


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a hash of a file's tensors and metadata."""
    digest = hashlib.blake2b(json.dumps(dict(metadata), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file atomically: write a temporary file beside it, flush that, and rename it.

    previous  where the old file is moved; None replaces it

    Raises OSError if the file can't be written; then the old file is intact.
    """
    part = part_of(path)
    try:
        part.unlink(missing_ok=True)  # a link there would lead the content to another file
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise refused(path, error) from error


def part_of(path: Path) -> Path:
    """Return the temporary path to which a file is written before it is renamed."""
    return path.with_name(path.name + ".part")


def refused(path: Path, error: OSError) -> OSError:
    """Return the error for a file that can't be written, with advice that fits its cause."""
    if path.is_dir():
        advice = "A folder has this name: move it away, and start the run again to continue."
    elif isinstance(error, FileNotFoundError):
        advice = (
            "Its folder was moved or deleted during the run; move it back and start the run again to continue, or "
            "start again with another folder."
        )
    else:
        advice = (
            "The folder's earlier content is intact: free some space or make the folder writable, and start the run "
            "again to continue. To only read a folder, use SwampResult.load."
        )
    return OSError(error.errno, f"{path} can't be written ({error}). {advice}")


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
