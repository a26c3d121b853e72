"""Times steps of the eager and the fused engine by density. The rule of engine="auto" is based on the results.

    python -m benchmarks.engine_rule [--model NAME ...] [--precision float32 ...] [--batch B] [--cycles C ...]

The timed steps include gathering and augmenting the batch, the update, and averaging. Masks are uniform at random, so
that the FLOP density equals the density. Writes one table per model, precision and processor,
benchmarks/results/engine_rule_*. tests/engines/test_selection.py checks the constants of
swamp_fast/engines/selection.py against all these tables.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch

from benchmarks.measuring import header, interleaved, processor, write
from benchmarks.steps import Step, covered_plan, problem_of, step_of
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.selection import eager_by_rule, kind_of
from swamp_fast.ops.backends import has_amx

LANES = 2
PRECISIONS = ("float32", "bfloat16", "float64")
SHAPES = {  # model -> shape of a picture, batch size
    "resnet20": ((3, 32, 32), 128),
    "small_cnn": ((1, 8, 8), 64),
    "wrn28_2": ((3, 32, 32), 128),
    "vgg13": ((3, 32, 32), 128),
    "mlp": ((1, 28, 28), 128),
}
CYCLES = (0, 1, 2, 3, 4, 5, 6, 8, 10, 14)  # the densities are 0.8 ** cycle


def measure(model: str, precision: str, rounds: int, batch: int, cycles: Sequence[int]) -> None:
    """Time both engines on one network and write the table."""
    augment = "none" if model == "mlp" else "crop_flip"
    problem = problem_of(model, LANES, batch, SHAPES[model][0], precision=precision, augment=augment)
    plan = covered_plan(problem)
    eager = EagerEngine(problem, eager_by_rule(problem), None)
    contenders: dict[str, Step] = {"eager": step_of(eager, problem, LANES)}
    uniform = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(0))
    densities = {}
    for cycle in cycles:
        mask = problem.mask & (uniform < 0.8**cycle)
        densities[f"fused {cycle}"] = problem.flops(mask) / problem.flops(problem.mask)
        contenders[f"fused {cycle}"] = step_of(FusedEngine(problem, plan, "benchmark", {}), problem, LANES, mask)
    times = interleaved(contenders, rounds)
    eager_seconds = times["eager"]["median"]
    table = [
        {"": name.split()[0], "FLOP density": round(densities.get(name, 1.0), 4),
         **{key: f"{value / LANES * 1e3:.2f}" for key, value in quantiles.items()},
         "eager / this": round(eager_seconds / quantiles["median"], 3)}
        for name, quantiles in times.items()
    ]  # fmt: skip
    about = header(rounds) | {"capability": torch.backends.cpu.get_cpu_capability(), "amx": has_amx()}
    about |= {"model": model, "kind": kind_of(problem, plan), "precision": precision, "lanes": LANES, "batch": batch}
    about |= {"eager": str(eager.choice), "times": "ms per particle-step"}
    machine = re.sub(r"\W+", "_", processor().split(",")[0].lower())
    command = f"python -m benchmarks.engine_rule --model {model} --precision {precision}"
    command += f" --batch {batch}" * (batch != SHAPES[model][1])
    command += f" --cycles {' '.join(map(str, cycles))}" * (tuple(cycles) != CYCLES)
    write(f"engine_rule_{model}_{precision}_{machine}", command, about, table)


def main() -> None:
    """Measure the requested models and precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch", type=int, help="batch size, default 128 (64 for small_cnn)")
    parser.add_argument("--cycles", type=int, nargs="+", default=CYCLES, help="the densities are 0.8 ** cycle")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    for model in given.model:
        for precision in given.precision:
            measure(model, precision, given.rounds, given.batch or SHAPES[model][1], given.cycles)


if __name__ == "__main__":
    main()
