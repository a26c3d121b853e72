"""Times the evaluation of 21 models on a path, all at once and one after the other, and checks that both agree.

    python -m benchmarks.analysis [--model small_cnn] [--data digits] [--samples 1024] [--device cuda] [--rounds 3]

The path connects two states of one network under a random mask. At each point, BatchNorm is re-estimated on the
training samples, then loss and error are measured on these samples and on the test data. The loop that evaluates one
model after the other is plain PyTorch: it loads interpolated weights into a copy of the module. It is timed in both
memory formats, and "times as fast" compares with the faster one.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import header, interleaved, write
from swamp_fast.analysis import Analysis, Path, loss_barrier
from swamp_fast.data.sources import Arrays, open_source
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.models import build_model

POINTS = 21
DENSITIES = (1.0, 0.2, 0.044)
TOLERANCES = {"float32": 1e-4, "float64": 1e-9}  # relative error of a loss, since kernels sum in different orders
LOOPS = {"one by one": False, "one by one, channels last": True}  # name -> whether tensors are channels last

State = dict[str, Tensor]


def states(analysis: Analysis, density: float) -> tuple[State, State]:
    """Return two states with small random differences from the model's, under one random mask."""
    generator = torch.Generator().manual_seed(0)
    layout, model = analysis.problem.layout, analysis.problem.template
    masks = {entry.name: torch.rand(entry.shape, generator=generator) < density for entry in layout.prunable}

    def moved() -> State:
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for name, tensor in state.items():
            if name in masks:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor) * tensor.std()
                tensor.add_(noise).mul_(masks[name].to(tensor.device))
        return state

    return moved(), moved()


@torch.no_grad()
def one_by_one(analysis: Analysis, a: State, b: State, channels_last: bool) -> Path:
    """Evaluate the path by a plain loop over its points."""
    columns: dict[str, list[float]] = {"train_loss": [], "train_error": [], "test_loss": [], "test_error": []}
    positions = torch.linspace(0, 1, POINTS, dtype=torch.float64).tolist()
    size, test = analysis.problem.config.batch_size, analysis.test
    assert test is not None
    for t in positions:
        module: Any = copy.deepcopy(analysis.problem.template)
        module.load_state_dict({n: torch.lerp(a[n], b[n], t) if a[n].is_floating_point() else a[n] for n in a})
        module = module.to(memory_format=torch.channels_last) if channels_last else module
        reestimate(module, analysis.train, size, channels_last)
        for split, data in (("train", analysis.train), ("test", test)):
            loss, error = evaluated(module, data, size, channels_last)
            columns[f"{split}_loss"].append(loss)
            columns[f"{split}_error"].append(error)
    return Path(t=positions, train_samples=analysis.train.length, **columns)


def reestimate(module: nn.Module, data: Data, size: int, channels_last: bool) -> None:
    """Set the BatchNorm statistics to the mean over all batches of the data."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    for inputs, _, count in pass_in_stored_order(data, size, channels_last):
        seen += count
        for norm in norms:
            norm.momentum = count / seen
        module(inputs)
    module.eval()


def evaluated(module: nn.Module, data: Data, size: int, channels_last: bool) -> tuple[float, float]:
    """Return the mean loss and the error of one model."""
    loss, wrong = 0.0, 0
    for inputs, targets, _ in pass_in_stored_order(data, size, channels_last):
        outputs = module(inputs)
        loss += float(F.cross_entropy(outputs, targets, reduction="sum"))
        wrong += int((outputs.argmax(1) != targets).sum())
    return loss / data.length, wrong / data.length


def check(path: Path, expected: Path, tolerance: float) -> float:
    """Return the largest relative difference between the losses of both paths. Raise ValueError above the tolerance."""
    pairs = [*zip(path.train_loss, expected.train_loss, strict=True)]
    pairs += zip(path.of("test_loss"), expected.of("test_loss"), strict=True)
    difference = max(abs(one - other) / max(abs(other), 1) for one, other in pairs)
    if not difference < tolerance:
        raise ValueError(f"the losses differ by {difference:.2g}, more than {tolerance:g}, so nothing is timed.")
    return difference


def rows_at(density: float, analyses: dict[str, Analysis], tolerance: float, rounds: int) -> list[dict[str, Any]]:
    """Check and time all contenders at one density. `analyses` maps each engine to its Analysis."""
    first = next(iter(analyses.values()))
    a, b = states(first, density)
    expected = one_by_one(first, a, b, False)
    differences = {engine: check(loss_barrier(analysis, a, b, POINTS), expected, tolerance)
                   for engine, analysis in analyses.items()}  # fmt: skip
    contenders: dict[str, Callable[[], object]] = {
        name: functools.partial(one_by_one, first, a, b, channels_last) for name, channels_last in LOOPS.items()
    }
    contenders |= {
        engine: functools.partial(loss_barrier, analysis, a, b, POINTS) for engine, analysis in analyses.items()
    }
    times = interleaved(contenders, rounds)
    best = min(times[name]["median"] for name in LOOPS)
    return [
        {"density": density, "way": name, **{key: round(seconds, 3) for key, seconds in quantiles.items()},
         "times as fast": round(best / quantiles["median"], 2),
         "largest difference": f"{differences[name]:.1g}" if name in differences else "–",
         "how": mode_of(analyses[name]) if name in analyses else ""}
        for name, quantiles in times.items()
    ]  # fmt: skip


def mode_of(analysis: Analysis) -> str:
    """Return the execution mode that the analysis's engine chose."""
    if analysis.engines is None:
        return ""
    return str(analysis.engines.describe().get("way", "fused"))


def main() -> None:
    """Check all contenders, then time them in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--data", default="digits", help="digits, or pictures as an .npz")
    parser.add_argument("--samples", type=int, default=512, help="number of training samples")
    parser.add_argument("--engine", nargs="+", default=["eager", "fused"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(TOLERANCES), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    source = open_source(given.data, "train", None).source
    if not isinstance(source, Arrays):
        raise TypeError("--data must hold pictures in memory: digits, or an .npz.")
    height, width, channels = source.inputs[0].shape
    torch.manual_seed(0)
    model = build_model(given.model, channels, height, width, int(source.targets.max()) + 1)
    settings = {"device": given.device, "precision": given.precision, "batch_size": 128, "samples": given.samples}
    table: list[dict[str, Any]] = []
    for density in DENSITIES:
        analyses = {engine: Analysis(model, given.data, engine=engine, **settings) for engine in given.engine}
        table += rows_at(density, analyses, TOLERANCES[given.precision], given.rounds)
    (first, *_) = analyses.values()
    size = {"train": first.train.length, "test": None if first.test is None else first.test.length}
    about = header(given.rounds) | {"unit": "s", "on": given.device, "precision": given.precision, "points": POINTS}
    about |= {"model": given.model, "data": given.data, **size}
    names = [] if given.model == "small_cnn" else [given.model]
    names += [] if given.device == "cpu" else [given.device]
    command = f"python -m benchmarks.analysis --model {given.model} --data {given.data} --samples {given.samples}"
    command += f" --rounds {given.rounds}"
    write("_".join(["analysis", *names]), command, about, table)


if __name__ == "__main__":
    main()
