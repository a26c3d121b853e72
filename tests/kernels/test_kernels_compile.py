"""Every GPU kernel compiles for several GPUs, and its machine code stays within bounds. No GPU is needed.

The kernels are compiled in subprocesses, because this process uses Triton's interpreter and so can't compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version
from paths import ROOT

KERNELS = {line.split("(")[0].removeprefix("def ") for path in (ROOT / "kernels").glob("*.py")
           for line in path.read_text().splitlines() if line.startswith("def ") and "_kernel(" in line}  # fmt: skip
# The number of a kernel's blocks that must fit on an SM of an H100 at once, so that one block computes while another
# waits for memory.
BLOCKS = {
    ("convolve", "forward, ResNet-20 16-16 channels 32x32"): 3,
    ("convolve", "forward, prologue, ResNet-20 16-16 channels 32x32"): 2,
    ("convolve", "by input, ResNet-20 16-16 channels 32x32"): 3,
    ("convolve", "by input, adds, ResNet-20 16-16 channels 32x32"): 3,
    ("weight_grad", "ResNet-20 16-16 channels 32x32"): 2,
    ("weight_grad", "prologue, ResNet-20 16-16 channels 32x32"): 2,
    ("convolve", "forward, ResNet-20 32-32 channels 16x16"): 2,
    ("convolve", "forward, prologue, ResNet-20 32-32 channels 16x16"): 1,
    ("convolve", "by input, ResNet-20 32-32 channels 16x16"): 2,
    ("convolve", "by input, adds, ResNet-20 32-32 channels 16x16"): 3,
    ("weight_grad", "ResNet-20 32-32 channels 16x16"): 2,
    ("weight_grad", "prologue, ResNet-20 32-32 channels 16x16"): 1,
}  # 1 for all other kernels
# The next two bounds depend on the compiler. A bound holds from its version up to the next version in the dict.
# Triton version -> the bytes that a thread of a float64 kernel may spill. These kernels serve only to check plans.
FLOAT64_SPILLS = {"3.6": 0, "3.8": 8, "3.9": 0}
# NVRTC version -> the factors by which kernels may exceed their instruction slots per pixel. For this layer, the halo
# has four times the pixels of the map, and a block has only two tiles. The layer is a small part of its network.
KNOWN_SLOW = {"13.0": {"prologue, VGG-19 512-512 channels 2x2": 1.2}, "13.2": {}}
ARCHITECTURES, SLOW = ["sm_90", "gfx942"], ["sm_80"]
SHARED_BYTES = 99 * 1024  # shared memory available to a block on every GPU from sm_80 on
LDS_BYTES = 64 * 1024  # shared memory available to a block on gfx942


@pytest.fixture(scope="module")
def compiling(tmp_path_factory, request):
    """Start one process per architecture, which compiles all kernels; the processes run at the same time."""
    running = {}
    for arch in ARCHITECTURES + SLOW * request.config.getoption("--slow"):
        folder = str(tmp_path_factory.mktemp(arch))  # an empty cache
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "SWAMP_FAST_CACHE": folder}
        command = [sys.executable, "-m", "benchmarks.machine_code", "--arch", arch, "--json"]
        running[arch] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_compiles(arch, compiling):
    may_spill = of_version(FLOAT64_SPILLS, version("triton"))
    said, errors = compiling[arch].communicate()
    assert compiling[arch].returncode == 0, errors[-3000:]
    compiled = json.loads(said)
    cuda = arch.startswith("sm_")
    known_slow = of_version(KNOWN_SLOW, nvrtc_version()) if cuda else {}
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} if cuda else set()
    assert {kernel["name"] for kernel in compiled} == KERNELS | sources
    if cuda:
        assert BLOCKS.keys() <= {(kernel["name"], kernel["config"]) for kernel in compiled}
    for kernel in compiled:
        assert kernel["shared_bytes"] <= (SHARED_BYTES if cuda else LDS_BYTES), kernel
        if cuda:
            assert kernel["spills"] <= (may_spill if only_proves(kernel) else 0), kernel
            assert kernel["instructions"] > 0
        if arch == "sm_90" and kernel["blocks"] is not None:
            assert kernel["blocks"] >= BLOCKS.get((kernel["name"], kernel["config"]), 1), kernel
        if kernel["slots_per_pixel"] is not None:
            over = known_slow.get(kernel["config"], 1) if kernel["name"] == "weight_grad" else 1
            assert kernel["instructions_per_pixel"] <= over * kernel["slots_per_pixel"], kernel


def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    return "{1}.{2}".format(*nvrtc.nvrtcVersion())


def of_version(bounds, installed):
    """The bound for an installed version: that of the newest version up to it, or the oldest bound if there is none."""
    before = [each for each in bounds if Version(each) <= Version(installed)]
    return bounds[max(before, key=Version) if before else min(bounds, key=Version)]


def test_bounds_name_their_compilers():
    """A version between two bounds gets the older bound, and a future version gets the newest one."""
    bounds = {"3.6": 0, "3.8": 8, "3.10": 4}
    versions = ("3.5", "3.6.0", "3.7", "3.8.1", "3.9", "3.10", "4.0")
    assert [of_version(bounds, each) for each in versions] == [0, 0, 0, 8, 8, 4, 4]
    assert not only_proves({"config": "bool, float32, float64, int64; BLOCK = 1024"})
    assert only_proves({"config": "bool, float64, int64; BLOCK = 1024"})


def only_proves(kernel) -> bool:
    """Whether a kernel serves only to check plans, that is, whether it computes in float64.

    Float64 arguments alone don't tell, because rates are float64 in every precision. So no other float type may occur.
    """
    types = set(kernel["config"].partition(";")[0].split(", "))
    return "float64" in types and not types & {"float32", "bfloat16"}
