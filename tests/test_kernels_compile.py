"""Every Triton kernel, as launched, becomes machine code for the GPUs we name; without a GPU, in a subprocess, since
a process that interprets Triton can't compile it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    *("masked_sgd_kernel", "particle_mean_kernel", "philox_kernel", "gather_augment_kernel"),
    *("count_digit_kernel", "count_ties_kernel", "write_mask_kernel"),
}
SHARED_BYTES = 48 * 1024  # what a block may have without asking for more


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles(target, tmp_path):
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # nothing compiled before counts
    done = subprocess.run([sys.executable, program, target], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert {kernel["name"] for kernel in compiled} == KERNELS
    for kernel in compiled:
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        if target.startswith("cuda"):
            assert kernel["stack_bytes"] == 0, kernel
