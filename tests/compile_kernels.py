"""Compile what the launchers launch, for a GPU that needn't be there: python compile_kernels.py cuda:90 | hip:gfx942.

The launchers run on CPU tensors under a driver that only names the target; each kernel is compiled with the very
specialisation of that launch, and not run. Prints a JSON list: name, shared_bytes, and for CUDA registers and
stack_bytes (spills), as the cubin declares them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from swamp_fast.kernels import gather_augment, global_threshold, masked_sgd, particle_mean, philox
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NamedTarget:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launches() -> None:
    """Every launcher in each of its configurations, with one lane (specialised to the constant) and with several."""
    for lanes in (1, 3):
        keys = torch.zeros(lanes, 3, dtype=torch.int64)
        philox.philox(keys, 3, 1001)
        rates = torch.zeros(4, lanes, dtype=torch.float64).unbind()
        run_of_lane = torch.zeros(lanes, dtype=torch.int64)
        for dtype in (torch.float32, torch.float64):
            bank = torch.zeros(3, lanes, 4096, dtype=dtype)
            masks = torch.zeros(1, 4000, dtype=torch.bool)
            for nesterov in (False, True):
                for swa, share in ((bank[2], rates[3]), (None, None)):
                    state = (bank[0], bank[1], bank[2], masks, run_of_lane, *rates[:3])
                    masked_sgd.masked_sgd_(*state, nesterov, swa, share)
            particle_mean.particle_mean(bank[0], run_of_lane, 1)
            keep = torch.ones(lanes, dtype=torch.int64)
            global_threshold.global_threshold(bank[0][:, :4000], masks.expand(lanes, -1).contiguous(), keep)
            for images in (torch.zeros(9, 32, 32, 3, dtype=torch.uint8), torch.zeros(9, 32, 32, 3, dtype=dtype)):
                table = torch.zeros(3, 256, dtype=dtype) if images.dtype == torch.uint8 else None
                index = torch.zeros(lanes, 8, dtype=torch.int64)
                for pad, flip in ((0, False), (4, True)):
                    for last in (False, True):
                        gather_augment.gather_augment(images, table, index, index, keys, pad, flip, last)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a kernel, as Triton's own cuobjdump reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout))
    return {"registers": int(found["REG"]), "stack_bytes": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    """Compile for the target that is named and print what came out."""
    backend, arch = sys.argv[1].split(":")
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    driver.set_active(NamedTarget(target))
    compiled: dict[str, dict[str, object]] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            about = {"name": self.__name__, "shared_bytes": kernel.metadata.shared}
            compiled[kernel.hash] = about | (resources(kernel.asm["cubin"]) if backend == "cuda" else {})
        return kernel

    JITFunction.run = compile_only
    launches()
    print(json.dumps(list(compiled.values())))


if __name__ == "__main__":
    main()
