"""Every GPU kernel becomes machine code for the GPUs we name, without one: in a subprocess, since a process that
interprets Triton can't compile it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_structure import ROOT

KERNELS = {line.split("(")[0].removeprefix("def ") for path in (ROOT / "kernels").glob("*.py")
           for line in path.read_text().splitlines() if line.startswith("def ") and "_kernel(" in line}  # fmt: skip
# A halo of four times the pixels, and two tiles a block: over with the NVRTC of CUDA 13.0, a small part of its network.
KNOWN_SLOW = {"prologue, VGG-19 512-512 channels 2x2": 1.2}
ARCHITECTURES, SLOW = ["sm_90", "gfx942"], ["sm_80"]
SHARED_BYTES = 99 * 1024  # what a block may have on every GPU from sm_80 on
LDS_BYTES = 64 * 1024  # and on gfx942


@pytest.fixture(scope="module")
def compiling(tmp_path_factory, request):
    """A process for each architecture, side by side."""
    running = {}
    for arch in ARCHITECTURES + SLOW * request.config.getoption("--slow"):
        folder = str(tmp_path_factory.mktemp(arch))  # nothing compiled before counts
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
    said, errors = compiling[arch].communicate()
    assert compiling[arch].returncode == 0, errors[-3000:]
    compiled = json.loads(said)
    cuda = arch.startswith("sm_")
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} if cuda else set()
    assert {kernel["name"] for kernel in compiled} == KERNELS | sources
    for kernel in compiled:
        assert kernel["shared_bytes"] <= (SHARED_BYTES if cuda else LDS_BYTES), kernel
        if cuda:
            assert kernel["spills"] == 0, kernel
            assert kernel["instructions"] > 0
        if kernel["slots_per_pixel"] is not None:
            slots = kernel["slots_per_pixel"] * (
                KNOWN_SLOW.get(kernel["config"], 1) if kernel["name"] == "weight_grad" else 1
            )
            assert kernel["instructions_per_pixel"] <= slots, kernel
