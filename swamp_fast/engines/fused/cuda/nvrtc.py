"""Compiles the kernels of csrc/cuda at run time with NVRTC, which comes with PyTorch's wheel, and launches them.

Compiling needs no GPU. Machine code is cached on disk under a hash of everything that it was compiled from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

import torch

from swamp_fast.engines.fused.cuda import code_cache
from swamp_fast.engines.fused.cuda.params import Params

HEADERS = ("params.h", "tile.h", "matrix.h")
Constants = Mapping[str, int]  # the values of the macros that a kernel is compiled with, by name
THREADS_PER_BLOCK = 256


class Launch(Protocol):
    """A callable that launches a kernel of csrc/cuda."""

    def __call__(
        self, name: str, constants: Constants, grid: tuple[int, int, int], shared_bytes: int, params: Params
    ) -> None:
        """Launch the kernel `name` of `name`.cu over a grid of blocks.

        constants     what the kernel is compiled with
        shared_bytes  bytes of shared memory per block
        params        passed to the kernel by value
        """
        ...


def compile_kernel(name: str, constants: Constants, arch: str) -> bytes:
    """Return the machine code of csrc/cuda/`name`.cu for an architecture such as "sm_90", from the cache if possible.

    If the kernel spills registers when MIN_BLOCKS blocks are to share an SM, it is compiled for fewer blocks.
    Raises RuntimeError with NVRTC's log if the source doesn't compile.
    """
    sources = sources_of(name)
    file = _file_name(name, sources, constants, arch)
    cached = code_cache.read(file)
    if cached is not None:
        return cached
    for min_blocks in range(constants["MIN_BLOCKS"], 0, -1):
        code, log = build(name, sources, {**constants, "MIN_BLOCKS": min_blocks}, arch)
        stack = re.search(r"(\d+) bytes stack frame", log)
        if stack is None or stack[1] == "0":  # no register is spilled
            break
    code_cache.write(file, code)
    return code


def sources_of(name: str) -> dict[str, bytes]:
    """The source text of a kernel and of the headers, by file name."""
    folder = files("swamp_fast.cuda_sources")
    return {file: (folder / file).read_bytes() for file in (f"{name}.cu", *HEADERS)}


def build(name: str, sources: Mapping[str, bytes], constants: Constants, arch: str) -> tuple[bytes, str]:
    """Compile the given sources of a kernel without the cache; returns the code and NVRTC's log.

    arch  an architecture such as "sm_90" gives machine code, one such as "compute_90" gives PTX

    Raises RuntimeError with the log if the sources don't compile.
    """
    from cuda.bindings import nvrtc

    options = _options(constants, arch)
    headers = [sources[file] for file in HEADERS]
    names = [file.encode() for file in HEADERS]
    program = _checked(
        nvrtc.nvrtcCreateProgram(sources[f"{name}.cu"], f"{name}.cu".encode(), len(headers), headers, names)
    )
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
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
    """Launches kernels on the current stream of one device, and keeps the loaded kernels for the next launch."""

    def __init__(self, device: torch.device) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        self.device, self.arch = device, f"sm_{major}{minor}"
        self.functions: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, name: str, constants: Constants, grid: tuple[int, int, int], shared_bytes: int, params: Params
    ) -> None:
        """See Launch.__call__."""
        from cuda.bindings import driver

        with torch.cuda.device(self.device):
            function = self._function(name, constants, shared_bytes)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))  # a list of one argument, the struct
            stream = torch.cuda.current_stream(self.device).cuda_stream
            _checked(
                driver.cuLaunchKernel(
                    *(function, *grid, THREADS_PER_BLOCK, 1, 1, shared_bytes, stream), *(ctypes.addressof(arguments), 0)
                )
            )

    def _function(self, name: str, constants: Constants, shared_bytes: int) -> Any:
        """Return a kernel, which is loaded at its first use; the launcher's device must be the current device."""
        from cuda.bindings import driver

        key = (name, *constants.items())
        if key not in self.functions:
            module = _checked(driver.cuModuleLoadData(compile_kernel(name, constants, self.arch)))
            function = _checked(driver.cuModuleGetFunction(module, name.encode()))
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, limit, shared_bytes))
            self.functions[key] = function
        return self.functions[key]


@functools.cache
def launcher(device: torch.device) -> Launcher:
    """The launcher of a device; every call for the same device returns the same launcher."""
    return Launcher(device)


def _checked(result: Any) -> Any:
    """Return the value that a call of cuda-bindings returned, without its error code.

    Raises RuntimeError if the code reports an error.
    """
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA reports {error!r}")
    return values[0] if values else None


def _options(constants: Constants, arch: str) -> list[str]:
    """NVRTC's options; -v makes the log report the registers, stack and shared memory that a kernel uses."""
    defines = [f"-D{name}={value}" for name, value in constants.items()]
    return [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", *defines]


def _file_name(name: str, sources: Mapping[str, bytes], constants: Constants, arch: str) -> str:
    """The name of a kernel's cache file, with a hash of the sources, the options and NVRTC's version."""
    from cuda.bindings import nvrtc

    _, *version = nvrtc.nvrtcVersion()
    digest = hashlib.blake2b(digest_size=16)
    for part in (*sources.values(), *(option.encode() for option in _options(constants, arch)), str(version).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{name}-{arch}-{digest.hexdigest()}.cubin"
