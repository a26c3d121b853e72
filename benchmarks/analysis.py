"""A path of 21 points evaluated at once against one model after the other: equal, and how much faster.

    python -m benchmarks.analysis [--model small_cnn] [--data digits] [--samples 1024] [--device cuda] [--rounds 3]

Two states of one network under a random mask; at every point BatchNorm is re-estimated on the training samples, then
the loss and the error are taken on these and on test data. One by one: the interpolated weights in a copy of the
module, in plain PyTorch, in both memory formats; "times as fast" is against the faster one.
"""

from __future__ import annotations

import argparse
import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import header, interleaved, write
from swamp_fast.analysis import Analysis, Path, loss_barrier
from swamp_fast.data.sources import Arrays, open_source
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.models import build_model

POINTS = 21
DENSITIES = (1.0, 0.2, 0.044)
SAME = {"float32": 1e-4, "float64": 1e-9}  # of a loss, relatively; in float32 kernels sum in other orders
ONE = ("one by one", "one by one, channels last")


def states(on: Analysis, density: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two states near the model's, with one random mask."""
    generator = torch.Generator().manual_seed(0)
    layout, model = on.problem.layout, on.problem.template
    kept = {entry.name: torch.rand(entry.shape, generator=generator) < density for entry in layout.prunable}
    found = []
    for _ in range(2):
        state = {name: each.detach().clone() for name, each in model.state_dict().items()}
        for name, own in state.items():
            if name in kept:
                noise = torch.randn(own.shape, generator=generator).to(own) * own.std()
                own.add_(noise).mul_(kept[name].to(own.device))
        found.append(state)
    return found[0], found[1]


@torch.no_grad()
def one_by_one(on: Analysis, a: dict[str, Tensor], b: dict[str, Tensor], last: bool) -> Path:
    """The path by a plain loop."""
    found: dict[str, list[float]] = {"train_loss": [], "train_error": [], "test_loss": [], "test_error": []}
    t = torch.linspace(0, 1, POINTS, dtype=torch.float64).tolist()
    size = on.problem.config.batch_size
    for each in t:
        module = copy.deepcopy(on.problem.template)
        module.load_state_dict({n: torch.lerp(a[n], b[n], each) if a[n].is_floating_point() else a[n] for n in a})
        module = module.to(memory_format=torch.channels_last) if last else module
        norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        seen = 0
        for inputs, _, count in pass_in_stored_order(on.train, size, last):
            seen += count
            for norm in norms:
                norm.momentum = count / seen
            module(inputs)
        module.eval()
        for split, data in (("train", on.train), ("test", on.test)):
            loss, error = evaluated(module, data, size, last)
            found[f"{split}_loss"].append(loss)
            found[f"{split}_error"].append(error)
    return Path(t=t, train_samples=on.train.length, **found)


def evaluated(module: nn.Module, data: Data, size: int, last: bool) -> tuple[float, float]:
    """Mean loss and error of one model."""
    loss, wrong = 0.0, 0
    for inputs, targets, _ in pass_in_stored_order(data, size, last):
        outputs = module(inputs)
        loss += float(F.cross_entropy(outputs, targets, reduction="sum"))
        wrong += int((outputs.argmax(1) != targets).sum())
    return loss / data.length, wrong / data.length


def check(found: Path, expected: Path, tolerance: float) -> float:
    """The largest relative difference of a loss. Raises ValueError if the two differ by more than rounding."""
    pairs = [*zip(found.train_loss, expected.train_loss, strict=True)]
    pairs += zip(found.of("test_loss"), expected.of("test_loss"), strict=True)
    difference = max(abs(own - other) / max(abs(other), 1) for own, other in pairs)
    if not difference < tolerance:
        raise ValueError(f"the losses differ by {difference:.2g}, more than {tolerance:g}: no time is taken.")
    return difference


def main() -> None:
    """Check, then time, all taking turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--samples", type=int, default=512, help="of the training data")
    parser.add_argument("--engine", nargs="+", default=["eager", "fused"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=sorted(SAME), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    source = open_source(given.data, "train", None).source
    if not isinstance(source, Arrays):
        raise TypeError("the benchmark wants pictures in memory: digits, or an .npz.")
    height, width, channels = source.inputs[0].shape
    torch.manual_seed(0)
    model = build_model(given.model, channels, height, width, int(source.targets.max()) + 1)
    settings = {"device": given.device, "precision": given.precision, "batch_size": 128, "samples": given.samples}
    table: list[dict[str, Any]] = []
    for density in DENSITIES:
        every = {engine: Analysis(model, given.data, engine=engine, **settings) for engine in given.engine}
        (first, *_) = every.values()
        a, b = states(first, density)
        expected = one_by_one(first, a, b, False)
        differ = {name: check(loss_barrier(on, a, b, POINTS), expected, SAME[given.precision])
                  for name, on in every.items()}  # fmt: skip
        ways: dict[str, Any] = {
            name: functools.partial(one_by_one, first, a, b, last)
            for name, last in zip(ONE, (False, True), strict=True)
        }
        ways |= {name: functools.partial(loss_barrier, on, a, b, POINTS) for name, on in every.items()}
        taken = interleaved(ways, given.rounds)
        best = min(taken[name]["median"] for name in ONE)
        table += [
            {"density": density, "way": way, **{name: round(each, 3) for name, each in seconds.items()},
             "times as fast": round(best / seconds["median"], 2),
             "largest difference": f"{differ[way]:.1g}" if way in differ else "–",
             "how": "" if way not in every or every[way].engine is None else how(every[way])}
            for way, seconds in taken.items()
        ]  # fmt: skip
    size = {"train": first.train.length, "test": None if first.test is None else first.test.length}
    about = header(given.rounds) | {"unit": "s", "on": given.device, "precision": given.precision, "points": POINTS}
    about |= {"model": given.model, "data": given.data, **size}
    names = [] if given.model == "small_cnn" else [given.model]
    names += [] if given.device == "cpu" else [given.device]
    command = f"python -m benchmarks.analysis --model {given.model} --data {given.data} --samples {given.samples}"
    command += f" --rounds {given.rounds}"
    write("_".join(["analysis", *names]), command, about, table)


def how(on: Analysis) -> str:
    """What the engine chose."""
    described = on.engine.describe() if on.engine is not None else {}
    return str(described.get("way", "fused"))


if __name__ == "__main__":
    main()
