"""Runs the kernels of csrc/cuda on the CPU. A C++ compiler builds them, and each GPU thread becomes a fiber."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

HOST = Path(__file__).parent / "host"


@functools.cache
def built(name: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """Build host/launch.cpp for one kernel and its constants; returns the library with its function `launch`."""
    defines = [f"-D{key}={value}" for key, value in constants] + (["-DWEIGHT_GRAD"] if name == "weight_grad" else [])
    digest = hashlib.blake2b(" ".join(defines).encode(), digest_size=8).hexdigest()
    out = Path(folder()) / f"{digest}.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(["c++", *flags, f"-I{HOST}", *defines, HOST / "launch.cpp", "-o", out], check=True)
    launch = ctypes.CDLL(str(out)).launch
    launch.restype = ctypes.c_bool
    return launch


@functools.cache
def folder() -> str:
    """The folder that holds the kernels built in this process."""
    return tempfile.mkdtemp()


def launch_on_host(name, constants, grid, shared_bytes, params) -> None:
    """Run a kernel on the CPU; the arguments are those of swamp_fast.engines.fused.cuda.nvrtc.Launch."""
    assert shared_bytes <= 99 * 1024
    launch = built(name, tuple(constants.items()))
    assert launch(*map(ctypes.c_int, grid), ctypes.byref(params)), "threads waited unequally often"
