"""The kernels of csrc/cuda: compiled at run time by NVRTC, whose library comes with torch's wheel, and launched.

Compiling needs no GPU; what was compiled is kept on disk, by a hash of all that went in.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch

HEADERS = ("tile.h", "matrix.h")
Constants = Mapping[str, int]
Argument = Any  # a ctypes number, as the kernel's signature has it
THREADS = 256
# Of a cubin: its magic, where the tables of programs and of sections begin, and the sizes and numbers of their entries.
ELF_HEADER = struct.Struct("<4s28xQQ6xHHHH2x")


class Launch(Protocol):
    """Runs a kernel of csrc/cuda, compiled with its constants, over a grid of blocks."""

    def __call__(
        self,
        name: str,
        constants: Constants,
        grid: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """The kernel `name` of `name`.cu."""
        ...


def compile_kernel(name: str, constants: Constants, arch: str) -> bytes:
    """Machine code of csrc/cuda/`name`.cu for an architecture ("sm_90"). Raises RuntimeError with NVRTC's log.

    Where MIN_BLOCKS of a processor would leave a thread too few registers, it is for fewer.
    """
    from cuda.bindings import nvrtc

    sources = sources_of(name)
    _, *version = nvrtc.nvrtcVersion()
    digest = hashlib.blake2b(digest_size=16)
    for part in (*sources.values(), *(each.encode() for each in _options(constants, arch)), str(version).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    kept = _cache() / f"{name}-{arch}-{digest.hexdigest()}.cubin"
    with suppress(OSError):
        found = kept.read_bytes()
        if _is_whole(found):
            return found
    for least in range(constants["MIN_BLOCKS"], 0, -1):
        code, log = build(name, sources, {**constants, "MIN_BLOCKS": least}, arch)
        spilled = re.search(r"(\d+) bytes stack frame", log)
        if spilled is None or spilled[1] == "0":
            break
    with suppress(OSError):  # a cache that can't be written costs time, nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_bytes(code)
        beside.replace(kept)
    return code


def sources_of(name: str) -> dict[str, bytes]:
    """A kernel's source and the headers, by their files' names."""
    folder = files("swamp_fast.cuda_sources")
    return {each: (folder / each).read_bytes() for each in (f"{name}.cu", *HEADERS)}


def build(name: str, sources: Mapping[str, bytes], constants: Constants, arch: str) -> tuple[bytes, str]:
    """Machine code, or PTX for "compute_90", from sources that are given; and NVRTC's log. Raises as compile_kernel."""
    from cuda.bindings import nvrtc

    options = _options(constants, arch)
    headers = [sources[each] for each in HEADERS]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            sources[f"{name}.cu"], f"{name}.cu".encode(), len(headers), headers, [each.encode() for each in HEADERS]
        )
    )
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
    log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    if int(error):
        raise RuntimeError(f"{name}.cu doesn't compile for {arch} with {dict(constants)}:\n{log.decode()}")
    is_ptx = arch.startswith("compute_")
    code: bytes = b" " * _checked((nvrtc.nvrtcGetPTXSize if is_ptx else nvrtc.nvrtcGetCUBINSize)(program))
    (nvrtc.nvrtcGetPTX if is_ptx else nvrtc.nvrtcGetCUBIN)(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code, log.decode()


class Launcher:
    """Launches on a device's current stream."""

    def __init__(self, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self.device, self.arch = device, f"sm_{major}{minor}"
        self.functions: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        name: str,
        constants: Constants,
        grid: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """As Launch."""
        from cuda.bindings import driver

        with torch.cuda.device(self.device):
            key = (name, *constants.items())
            if key not in self.functions:
                module = _checked(driver.cuModuleLoadData(compile_kernel(name, constants, self.arch)))
                function = _checked(driver.cuModuleGetFunction(module, name.encode()))
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(driver.cuFuncSetAttribute(function, most, shared_bytes))
                self.functions[key] = function
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
            stream = torch.cuda.current_stream(self.device).cuda_stream
            _checked(
                driver.cuLaunchKernel(
                    *(self.functions[key], *grid, THREADS, 1, 1, shared_bytes, stream),
                    *(ctypes.addressof(pointers), 0),
                )
            )


@functools.cache
def launcher(device: torch.device) -> Launcher:
    """The device's launcher, which keeps what it has loaded."""
    return Launcher(device)


def _checked(result: Any) -> Any:
    """The value of a call of cuda-bindings. Raises RuntimeError for what it reports."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA reports {error!r}")
    return values[0] if values else None


def _options(constants: Constants, arch: str) -> list[str]:
    defined = [f"-D{key}={value}" for key, value in constants.items()]
    return [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", *defined]  # -v: resources in the log


def _is_whole(code: bytes) -> bool:
    """Whether a file of the cache is a cubin to its end: a full disk or a lost node may leave less."""
    if len(code) < ELF_HEADER.size:
        return False
    magic, programs, sections, program_size, program_count, section_size, section_count = ELF_HEADER.unpack_from(code)
    end = max(programs + program_size * program_count, sections + section_size * section_count)
    return bool(magic == b"\x7fELF" and end <= len(code))


def _cache() -> Path:
    """SWAMP_FAST_CACHE, or the user's cache folder."""
    given = os.environ.get("SWAMP_FAST_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "swamp_fast"
