"""Measures on this CPU the global threshold, the update, and a training of ResNet-20 by the eager engine.

    python -m benchmarks.cpu [--only NAME ...]

Each benchmark writes benchmarks/results/NAME.json and NAME.md. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import header, interleaved, write
from benchmarks.steps import initial_solution, problem_of
from swamp_fast import naive, ops
from swamp_fast.common.memory import peak_memory
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.ops import reference
from swamp_fast.particles.schedule import cycle_training
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run

COMMAND = "python -m benchmarks.cpu --only"


def global_threshold(rounds: int = 9) -> None:
    """Time the threshold of 20 million float32 against kthvalue, a sort, and numpy.partition of precomputed |w|."""
    count, keep = 20_000_000, 16_000_000
    weights, mask = torch.randn(1, count), torch.ones(1, count, dtype=torch.bool)
    magnitude = weights[0].abs()
    small = weights[:, :100_000].contiguous(), mask[:, :100_000].contiguous(), torch.tensor([70_000])
    for result, expected in zip(ops.global_threshold(*small), reference.global_threshold(*small), strict=True):
        if not torch.equal(result, expected):
            raise SystemExit("global_threshold differs from its reference, so it is not timed")
    times = interleaved(
        {
            "ops.global_threshold": lambda: ops.global_threshold(weights, mask, [keep]),
            "torch.kthvalue(w.abs())": lambda: torch.kthvalue(weights[0].abs(), count - keep + 1),
            "numpy.partition(|w|)": lambda: np.partition(magnitude.numpy(), count - keep),
            "torch.sort(w.abs())": lambda: torch.sort(weights[0].abs()),
        },
        rounds,
    )
    ours = times["ops.global_threshold"]["median"]
    about = header(rounds) | {"weights": count, "extra_memory_KB": extra_memory(count, keep)}
    table = [{"": name, **milliseconds(t), "times ours": round(t["median"] / ours, 1)} for name, t in times.items()]
    write("global_threshold", f"{COMMAND} global_threshold", about, table)


def extra_memory(count: int, keep: int) -> int:
    """Return the KB that a call adds to the peak memory of a new process, not counting the mask that it returns."""
    code = f"""
import resource, torch
from swamp_fast import ops
weights, mask = torch.randn(1, {count}), torch.ones(1, {count}, dtype=torch.bool)
ops.global_threshold(weights[:, :5000], mask[:, :5000], [10])
torch.empty({count}, dtype=torch.bool).fill_(True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.global_threshold(weights, mask, [{keep}])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def masked_sgd(rounds: int = 15) -> None:
    """Time the update of [4, 5 million] float32, with and without SWA, against a copy, in bytes per second."""
    lanes, parameters = 4, 5_000_000
    weights, grads, momentum, swa, other = torch.randn(5, lanes, parameters).unbind()
    masks, run_of_lane = torch.rand(1, parameters) < 0.3, torch.zeros(lanes, dtype=torch.int64)
    rates = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "swa_weight": 0.5}
    of_lanes: dict[str, Any]
    of_lanes = {name: torch.full((lanes,), value, dtype=torch.float64) for name, value in rates.items()}
    swa_weight = of_lanes.pop("swa_weight")
    of_lanes |= {name: of_lanes[name][:, None] for name in ("lr", "weight_decay")}  # one segment

    def step(average: bool) -> None:
        state = (weights, grads, momentum, masks, run_of_lane)
        if average:
            ops.masked_sgd_(*state, **of_lanes, swa=swa, swa_weight=swa_weight)
        else:
            ops.masked_sgd_(*state, **of_lanes)

    times = interleaved(
        {
            "copy": lambda: other.copy_(grads),
            "masked_sgd_ with SWA": lambda: step(True),
            "masked_sgd_": lambda: step(False),
        },
        rounds,
    )
    size = lanes * parameters * 4
    moved = {"copy": 2 * size, "masked_sgd_ with SWA": 7 * size + parameters, "masked_sgd_": 5 * size + parameters}
    rate = {name: moved[name] / t["median"] / 1e9 for name, t in times.items()}
    table = [
        {"": name, **milliseconds(t), "GB/s": round(rate[name], 1), "share of copy": f"{rate[name] / rate['copy']:.0%}"}
        for name, t in times.items()
    ]
    write("masked_sgd", f"{COMMAND} masked_sgd", header(rounds) | {"lanes": lanes, "parameters": parameters}, table)


def eager(rounds: int = 7, steps: int = 4) -> None:
    """Time a few training steps of the eager engine and the naive loop: ResNet-20, batch 128, 4 particles."""
    problem, other = (problem_of("resnet20", 4, 128, batches=steps, epochs=1) for _ in range(2))
    template: Any = other.template
    channels_last = dataclasses.replace(other, template=template.to(memory_format=torch.channels_last))
    choice = eager_by_rule(problem)
    engine, start = EagerEngine(problem, choice), initial_solution(problem)
    training = cycle_training(problem.config, steps)

    def by_engine() -> None:
        bank = engine.spawn(start, problem.mask, range(4), 1)
        engine.train(bank, training, lambda *_: None, lambda *_: None)

    def by_naive(problem: Problem) -> None:
        run = Run(problem, "naive_swamp")
        masks = problem.layout.mask_views(problem.mask)
        for particle in range(4):
            model = naive.load(problem, {**dict(problem.template.named_parameters()), **start.buffers})
            naive.train_particle(problem, run, model, masks, 1, particle)

    times = interleaved(
        {
            f"fast_swamp, {choice.mode}, channels {'last' if choice.channels_last else 'first'}": by_engine,
            "naive_swamp, channels first": lambda: by_naive(problem),
            "naive_swamp, channels last": lambda: by_naive(channels_last),
        },
        rounds,
    )
    ours = next(iter(times.values()))["median"]
    table = [
        {"": name, **milliseconds(t, 4 * steps), "times ours": round(t["median"] / ours, 3)}
        for name, t in times.items()
    ]
    write(
        "eager",
        f"{COMMAND} eager",
        header(rounds) | {"unit": "a step of one particle", "steps": steps, "batch": 128},
        table,
    )


def milliseconds(times: dict[str, float], share: int = 1) -> dict[str, float]:
    """Return times in milliseconds, divided by `share`."""
    return {f"{name}, ms": round(value / share * 1e3, 3) for name, value in times.items()}


BENCHMARKS = {"global_threshold": global_threshold, "masked_sgd": masked_sgd, "eager": eager}


def main() -> None:
    """Run the requested benchmarks, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    for name in parser.parse_args().only:
        BENCHMARKS[name]()
    peak = peak_memory(torch.device("cpu")) / 2**30
    print(f"peak memory of this process: {peak:.1f} GB")


if __name__ == "__main__":
    main()
