"""Measures the fused engine on a CPU against dense loops, under the masks of a real run.

    python -m benchmarks.fused masks --data cifar10.npz   record the masks, benchmarks/results/masks_*.npz
    python -m benchmarks.fused step                        time a training step at every density, with all contenders
    python -m benchmarks.fused run --data cifar10.npz      time a whole run by fast_swamp and by the naive loop
    python -m benchmarks.fused seeds                       accuracy over seeds by engine, on digits or (--data) CIFAR-10
    python -m benchmarks.fused figure                      draw time over density from the results of `step`

In `step`, the fused engine's time includes gathering and augmenting its batches; the other contenders' doesn't.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar10 import pictures
from benchmarks.measuring import RESULTS, header, interleaved, write
from benchmarks.steps import NaiveLoop, Step, covered_plan, problem_of, seeded_model, stacked_step, trainer_of
from swamp_fast import SwampResult, fast_swamp, naive_swamp
from swamp_fast.common.timing import Stopwatch
from swamp_fast.engines.fused.check import differs_from_autograd
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.models import build_model
from swamp_fast.problem.problem import Problem

LANES, BATCH = 4, 128
SHAPES = {"resnet20": (3, 32, 32), "vgg13": (3, 32, 32), "mlp": (1, 28, 28)}
CYCLES = {"resnet20": (0, 6, 10, 14, 18), "vgg13": (0, 14), "mlp": (0, 13)}  # the densities are 0.8 ** cycle
UNIFORM_CYCLES = (0, 6, 10, 14)
TEST_PICTURES = 1000


def masks(model: str, data: Path, samples: int, epochs: int, cycles: int) -> None:
    """Do a run of fast_swamp with one particle, and record its masks at the densities at which `step` is timed."""
    settings: dict[str, Any] = {"particles": 1, "cycles": cycles, "epochs": epochs, "ticket_epochs": 1}
    settings |= {"batch_size": BATCH, "augment": "crop_flip", "engine": "fused"}
    result = fast_swamp(seeded_model(model, SHAPES[model]), pictures(data, "train", samples), **settings)
    kept: dict[str, Any] = {}
    for cycle in CYCLES[model]:
        for name, mask in result.at(cycle)[1].items():
            kept[f"{cycle}/{name}"] = np.packbits(mask.numpy())
    RESULTS.mkdir(exist_ok=True)
    np.savez_compressed(RESULTS / f"masks_{model}.npz", **kept)
    steps = epochs * -(-samples // BATCH)
    densities = [round(row["density"], 4) for row in result.history]
    print(f"masks of {model}: {steps} steps per cycle, densities {densities}")


def recorded_mask(problem: Problem, model: str, cycle: int, uniform: bool = False) -> Tensor:
    """Return the recorded mask [Q] of a cycle, or a random one of equal density if `uniform` or if none is recorded."""
    mask = problem.mask.clone()
    path = RESULTS / f"masks_{model}.npz"
    if uniform or not path.exists():
        return mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.8**cycle)
    packed = np.load(path)
    for name, view in problem.layout.mask_views(mask).items():
        bits = np.unpackbits(packed[f"{cycle}/{name}"], count=view.numel())
        view.copy_(torch.from_numpy(bits.astype(bool)).view(view.shape))
    return mask


def dense_steps(problem: Problem, compiled: bool, stacked: bool) -> dict[str, Step]:
    """Return a step of each dense contender. Each trains one particle, except "stacked, vmap", which trains LANES."""
    steps: dict[str, Step] = {
        "naive, channels first": NaiveLoop(problem, channels_last=False, fetches=False).step,
        "naive, channels last": NaiveLoop(problem, fetches=False).step,
    }
    if compiled:
        steps["torch.compile, channels last"] = NaiveLoop(problem, compiled=True, fetches=False).step
    if stacked:
        steps["stacked, vmap"] = stacked_step(problem, LANES)
    return steps


def step(model: str, precision: str, rounds: int, compiled: bool, stacked: bool, uniform: bool) -> None:
    """Time a step of all contenders in turns at every density, and write a table of times per particle."""
    augment = "none" if model == "mlp" else "crop_flip"
    problem = problem_of(model, LANES, BATCH, SHAPES[model], precision=precision, augment=augment)
    plan = covered_plan(problem)
    contenders = dense = dense_steps(problem, compiled, stacked)
    sparse: dict[str, dict[str, Any]] = {}
    for cycle in UNIFORM_CYCLES if uniform else CYCLES[model]:
        mask = recorded_mask(problem, model, cycle, uniform)
        difference = differs_from_autograd(problem, plan, mask)
        if difference is not None:
            raise RuntimeError(difference)
        trainer, handle = trainer_of(FusedEngine(problem, plan, "benchmark", {}), problem, LANES, mask)
        state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in trainer.bank.moving().values())
        sparse[f"fused {cycle}"] = {
            "density": round(int(mask.sum()) / problem.layout.weights, 4),
            "FLOP density": round(problem.flops(mask) / problem.flops(problem.mask), 4),
            "state, MB": round(state_bytes / 1e6, 2),
        }
        contenders = contenders | {f"fused {cycle}": partial(trainer.step, handle)}
    times = interleaved(contenders, rounds)
    for name in [*sparse, "stacked, vmap"] if stacked else sparse:
        times[name] = {key: seconds / LANES for key, seconds in times[name].items()}
    best = min(times[name]["median"] for name in dense)
    plain = times["naive, channels first"]["median"]
    table = []
    for name, quantiles in times.items():
        shares = sparse.get(name, {"density": 1.0, "FLOP density": 1.0, "state, MB": ""})
        median = quantiles["median"]
        table.append(
            {"": "fused" if name in sparse else name, "density": shares["density"],
             "FLOP density": shares["FLOP density"],
             "ms a particle-step": round(median * 1e3, 2), "p20": round(quantiles["p20"] * 1e3, 2),
             "p80": round(quantiles["p80"] * 1e3, 2), "best dense / this": round(best / median, 2),
             "plain loop / this": round(plain / median, 2), "state, MB": shares["state, MB"]}
        )  # fmt: skip
    from_run = not uniform and (RESULTS / f"masks_{model}.npz").exists()
    about = header(rounds) | {"model": model, "precision": precision, "lanes": LANES, "batch": BATCH}
    about["masks"] = "of a recorded run" if from_run else "uniform at random"
    command = f"python -m benchmarks.fused step --model {model} --precision {precision}"
    command += " --no-compile" * (not compiled) + " --no-vmap" * (not stacked) + " --uniform" * uniform
    write(f"fused_step_{model}_{precision}" + "_uniform" * uniform, command, about, table)


def run(model: str, data: Path, samples: int, particles: int, precision: str) -> None:
    """Time a whole run of 14 cycles by fast_swamp, and by the naive loop in its faster memory format."""
    train, test = pictures(data, "train", samples), pictures(data, "test", TEST_PICTURES)
    settings: dict[str, Any] = {"particles": particles, "cycles": 14, "epochs": 1, "ticket_epochs": 1, "swa_start": 0.0}
    settings |= {"batch_size": BATCH, "augment": "crop_flip", "precision": precision, "seed": 0}
    network = seeded_model(model, SHAPES[model])
    channels_last = seeded_model(model, SHAPES[model]).to(memory_format=torch.channels_last)
    table: list[dict[str, Any]] = []
    drivers: list[tuple[str, Callable[..., SwampResult], nn.Module]]
    drivers = [("fast_swamp", fast_swamp, network), ("naive_swamp, channels last", naive_swamp, channels_last)]
    for name, function, module in drivers:
        watch = Stopwatch()
        result = function(module, train, test, **settings)
        last = result.history[-1]
        table.append(
            {"": name, "seconds": round(watch.seconds, 1),
             "training steps alone": round(sum(row["train_seconds"] for row in result.history), 1),
             "accuracy at the end": last["accuracy"], "density": round(last["density"], 4),
             "engine": result.engine["engine"]}
        )  # fmt: skip
        (RESULTS / f"fused_run_{precision}_{function.__name__}.json").write_text(json.dumps(result.history) + "\n")
    for row in table:
        row["naive / this"] = round(table[-1]["seconds"] / row["seconds"], 2)
    about = header(1) | {"model": model, "steps a cycle": -(-samples // BATCH), **settings}
    about["test pictures"] = TEST_PICTURES
    command = f"python -m benchmarks.fused run --data cifar10.npz --samples {samples} --particles {particles}"
    write(f"fused_run_{precision}", f"{command} --precision {precision}", about, table)


def seeds(data: Path | None, count: int = 5) -> None:
    """Compare accuracies over seeds by engine: a small CNN on digits, or ResNet-20 on part of CIFAR-10."""
    if data is None:
        train: Any = "digits"
        test: Any = None
        settings: dict[str, Any]
        settings = {"particles": 2, "cycles": 14, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
    else:
        train, test = pictures(data, "train", 2048), pictures(data, "test", TEST_PICTURES)
        settings = {"particles": 2, "cycles": 4, "prune": 0.5, "epochs": 2, "ticket_epochs": 1, "batch_size": BATCH}
        settings["augment"] = "crop_flip"
    contenders: list[tuple[str, Callable[..., SwampResult], str, str]] = [
        ("naive_swamp", naive_swamp, "auto", "float32"),
        ("eager", fast_swamp, "eager", "float32"),
        ("fused", fast_swamp, "fused", "float32"),
        ("fused, bfloat16", fast_swamp, "fused", "bfloat16"),
    ]
    # The eager engine is left out on CIFAR-10: tests/engines/test_equivalence.py shows that it equals the naive loop.
    if data is not None:
        contenders = [contender for contender in contenders if contender[0] != "eager"]
    table = []
    for name, function, engine, precision in contenders:
        accuracies = []
        for seed in range(count):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                small = data is None
                model = build_model("small_cnn", 1, 8, 8, 10) if small else build_model("resnet20", 3, 32, 32, 10)
            if data is not None and function is naive_swamp:
                model = model.to(memory_format=torch.channels_last)
            changed = {**settings, "engine": engine, "precision": precision, "seed": seed, "progress": False}
            accuracies.append([row["accuracy"] for row in function(model, train, test, **changed).history])
        values = torch.tensor(accuracies, dtype=torch.float64)
        last = settings["cycles"]
        cells = {f"cycle {c}": f"{values[:, c].mean():.2%} +- {values[:, c].std():.2%}" for c in (0, last // 2, last)}
        table.append({"": name, **cells})
    about = header(1) | {"seeds": count, **settings}
    if data is None:
        write("fused_seeds", "python -m benchmarks.fused seeds", about, table)
    else:
        about |= {"data": "2,048 training and 1,000 test pictures of a JPEG copy of CIFAR-10"}
        write("fused_seeds_cifar", "python -m benchmarks.fused seeds --data cifar10.npz", about, table)


def figure() -> None:
    """Draw the step time of all contenders over density, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=(7, 4))
    for precision, style in (("float32", "-"), ("bfloat16", "--")):
        path = RESULTS / f"fused_step_resnet20_{precision}.json"
        if not path.exists():
            continue
        table = json.loads(path.read_text())["table"]
        ours = [row for row in table if row[""] == "fused"]
        axes.plot(
            *([row["density"] for row in ours], [row["ms a particle-step"] for row in ours]),
            f"o{style}",
            label=f"fused, {precision}",
        )
        for number, row in enumerate(row for row in table if row[""] != "fused"):
            axes.axhline(
                row["ms a particle-step"], ls=style, lw=1, color=f"C{number + 2}", label=f"{row['']}, {precision}"
            )
    axes.set(
        xscale="log", yscale="log", xlabel="density", ylabel="ms a step of one particle", title="ResNet-20, batch 128"
    )
    axes.invert_xaxis()
    axes.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(RESULTS / "fused_step.svg", metadata={"Date": None})


def main() -> None:
    """Run the requested measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["masks", "step", "run", "seeds", "figure"], help="see the head of this file")
    parser.add_argument("--model", default="resnet20", choices=SHAPES)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz; `masks` and `run` need it")
    parser.add_argument("--samples", type=int, default=25600, help="training pictures of `masks` and `run`")
    parser.add_argument("--epochs", type=int, default=1, help="epochs per cycle of `masks`")
    parser.add_argument("--particles", type=int, default=1, help="particles of `run`")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of `step`")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--no-vmap", action="store_true", help="leave out the vmap contender, which is timed in float32 only"
    )
    parser.add_argument(
        "--uniform", action="store_true", help="use masks that are uniform at random, not those of a run"
    )
    given = parser.parse_args()
    if given.what in ("masks", "run") and given.data is None:
        parser.error(f"{given.what} needs --data")
    if given.what == "masks":
        masks(given.model, given.data, given.samples, given.epochs, max(CYCLES[given.model]))
    elif given.what == "seeds":
        seeds(given.data)
    elif given.what == "figure":
        figure()
    elif given.what == "step":
        stacked = not given.no_vmap and given.precision == "float32"
        step(given.model, given.precision, given.rounds, not given.no_compile, stacked, given.uniform)
    else:
        run(given.model, given.data, given.samples, given.particles, given.precision)


if __name__ == "__main__":
    main()
