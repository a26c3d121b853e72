"""The commands that describe this machine: plan, backends."""

from __future__ import annotations

import argparse

import torch

from swamp_fast.cli.flags import Commands, add_command, add_model, positive, three_numbers
from swamp_fast.common.memory import free_memory
from swamp_fast.config import CHOICES
from swamp_fast.engines.footprint import eager_footprint, fused_footprint
from swamp_fast.engines.fused.estimate import estimate, measured_ceilings
from swamp_fast.engines.fused.trace import NotCovered
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.models import build_model
from swamp_fast.ops.backends import backends
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem


def add_plan(commands: Commands) -> None:
    """Register the command `plan` and its flags."""
    parser = add_command(commands, "plan", plan)
    add_model(parser)
    parser.add_argument("--particles", type=positive, default=4, metavar="N")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="B")
    parser.add_argument(
        "--shape", type=three_numbers, default=(3, 32, 32), metavar="C,H,W", help="shape of a picture; default 3,32,32"
    )
    parser.add_argument("--classes", type=positive, default=10)
    parser.add_argument("--precision", choices=CHOICES["precision"], default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one")


def plan(given: argparse.Namespace) -> None:
    """Estimate, without training, a step's time on the fused engine, and how many particles fit on each engine."""
    problem = _problem(given)
    batch = given.batch_size, *given.shape
    try:
        traced, cost = estimate(problem.original, torch.zeros(batch), given.precision)
    except NotCovered as reason:
        raise ValueError(
            f"the fused engine doesn't cover {given.model}: {reason}; only the eager engine can train it."
        ) from None
    ceilings = measured_ceilings(problem.device, given.precision)
    seconds = cost.seconds(ceilings)
    print(", ".join(f"{count} {kind}" for kind, count in traced.count().items()))
    print(
        f"particle-step   {cost.flops / 1e9:.3g} GFLOP, {cost.moved / 1e9:.3g} GB of memory traffic, at density 1\n"
        f"this device     {problem.device}: copies {ceilings.bytes / 1e9:,.0f} GB/s, multiplies "
        f"{ceilings.flops / 1e12:.3g} TFLOP/s in {given.precision}, measured now\n"
        f"time            at best about {seconds * 1e3:.3g} ms per particle-step, "
        f"{seconds * given.particles * 1e3:.3g} ms for a step of {given.particles}"
    )
    free = free_memory(problem.device)
    footprints = {
        "fused engine": fused_footprint(problem, traced),
        "eager engine": eager_footprint(problem, eager_by_rule(problem)),
    }
    print(f"memory          {free / 1e9:,.1f} GB are free; besides the model and the data, a run takes")
    for engine, footprint in footprints.items():
        print(
            f"{engine:<15} {_megabytes(footprint.bytes(given.particles))} for {given.particles} particles, "
            f"{_megabytes(footprint.bytes(given.particles + 1) - footprint.bytes(given.particles))} for each more: "
            f"{footprint.particles(free):,} particles fit at once"
        )


def _problem(given: argparse.Namespace) -> Problem:
    """The network with two batches of noise as data."""
    channels, height, width = given.shape
    model = build_model(given.model, channels, height, width, given.classes, given.model_args)
    samples = 2 * given.batch_size
    data = torch.randn(samples, channels, height, width), torch.arange(samples) % given.classes
    settings = {"particles": given.particles, "batch_size": given.batch_size, "precision": given.precision}
    return prepare(model, data, data, settings={**settings, "cycles": 0, "device": given.device or "auto"})


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def add_backends(commands: Commands) -> None:
    """Register the command `backends`."""
    add_command(commands, "backends", show_backends)


def show_backends(given: argparse.Namespace) -> None:
    """Show which backends are active here, which are missing, and why."""
    for name, backend in backends().items():
        details = ", ".join(f"{key} {value}" for key, value in backend.items() if key not in ("active", "why"))
        state = "active " if backend["active"] else "missing"
        print(f"{name:<7} {state}  {backend['why']}" + (f" ({details})" if details else ""))
