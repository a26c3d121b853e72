"""Triton kernels are not compiled again for other numbers of lanes or samples. A compilation takes about a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from paths import ROOT

SIZES = [
    (8, 128),
    (1, 128),
    (2, 128),
    (16, 128),
    (8, 72),
    (1, 72),
]  # (lanes, samples per lane); 72 is the size of a last batch


def test_lanes_and_samples_compile_nothing_anew():
    """This is tested in a separate process, because Triton is in interpreter mode in the current one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])  # benchmarks and paths
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *others = json.loads(done.stdout.splitlines()[-1])
    for name in ("masked_sgd_kernel", "masked_adamw_kernel", "gather_augment_kernel"):
        assert first.count(name) == 1, first
    assert len(first) > 30, first
    for size, new in zip(SIZES[1:], others, strict=True):
        assert new == [], (size, new)


def what_is_compiled() -> list[list[str]]:
    """For each of SIZES, the names of the kernels that its step compiles and that no earlier step compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from benchmarks.precompile import NamedTarget

    run, found, seen = JITFunction.run, [], set()

    def named(self, *arguments, grid, warmup, **constants):
        return run(self, *arguments, grid=grid, warmup=True, **constants)

    def compiled(self, key, *rest):
        if (self.__name__, key) not in seen:
            seen.add((self.__name__, key))
            found[-1].append(self.__name__)

    driver.set_active(NamedTarget(GPUTarget("cuda", 90, 32)))
    JITFunction.run, JITFunction._do_compile = named, compiled
    for lanes, samples in SIZES:
        found.append([])
        launch_step(lanes, samples)
    return found


def launch_step(lanes: int, samples: int) -> None:
    """Launch the kernels of a step of ResNet-20 on small pictures.

    The engine runs the optimiser step and the data gather on the CPU here, so their Triton kernels are launched too.
    """
    from swamp_fast.kernels import gather_augment, masked_adamw, masked_sgd, particle_mean

    from swamp_fast.engines.fused.compact import CompactBank
    from swamp_fast.engines.fused.coverage import fused_plan
    from swamp_fast.engines.fused.cuda.runner import CudaPrograms
    from swamp_fast.engines.trainer import Trainer, first_handle
    from swamp_fast.models import build_model
    from swamp_fast.problem.prepare import prepare

    data = torch.randint(0, 256, (128, 3, 8, 8), dtype=torch.uint8), torch.arange(128) % 10
    settings = {"batch_size": samples, "precision": "bfloat16", "device": "cpu", "progress": False}
    problem = prepare(build_model("resnet20", 3, 8, 8, 10), data, settings=settings)
    programs = CudaPrograms(problem, fused_plan(problem), problem.mask, lambda *given: None)
    bank = CompactBank(programs.compacts, [problem.config], lanes, problem.dtype)
    grads = torch.zeros_like(bank.weights)
    trainer = Trainer(problem, bank, grads, programs.lanes(bank.weights, grads))
    for module in trainer.runner.modules:
        module.train()
    trainer.step(first_handle(problem, bank))
    rates = [torch.ones(lanes, dtype=torch.float64) for _ in range(6)]
    state = bank.weights, grads, torch.zeros_like(grads)
    masked_sgd.masked_sgd_(*state, bank.masks, bank.run_of_lane, *rates[:3], False, None, None, None, None)
    masked_adamw.masked_adamw_(
        *state, torch.zeros_like(grads), bank.masks, bank.run_of_lane, *rates, None, None, None, None
    )
    particle_mean.particle_mean(bank.weights, bank.run_of_lane, 1)
    index = torch.zeros(lanes, samples, dtype=torch.int64)
    keys, pictures = torch.zeros(lanes, 3, dtype=torch.int64), torch.zeros(9, 8, 8, 3)
    gather_augment.gather_augment(pictures, None, index, index, keys, 4, True, True)


if __name__ == "__main__":
    print(json.dumps(what_is_compiled()))
