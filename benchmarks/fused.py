"""The fused engine on CPU against the dense loops, on masks of a real run.

    python -m benchmarks.fused masks --data cifar10.npz   records the masks (benchmarks/results/masks_*.npz)
    python -m benchmarks.fused step                        a training step at every density, all contenders
    python -m benchmarks.fused run --data cifar10.npz      a whole run, by fast_swamp and by the naive loop
    python -m benchmarks.fused seeds                       accuracy over seeds by engine, on digits or (--data) CIFAR-10
    python -m benchmarks.fused figure                      time over density, from the results of `step`

The contenders of `step` get their batch for nothing; the fused engine gathers and augments its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps import trainer_of
from benchmarks.timing import RESULTS, header, interleaved, write
from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines.fused.check import differs_from_autograd
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.models import build_model
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem

LANES, BATCH = 4, 128
SHAPES = {"resnet20": (3, 32, 32), "vgg13": (3, 32, 32), "mlp": (1, 28, 28)}
DENSITIES = {"resnet20": (0, 6, 10, 14, 18), "vgg13": (0, 14), "mlp": (0, 13)}  # cycles: 0.8 ** cycle


def masks(model: str, data: Path, samples: int, epochs: int, cycles: int) -> None:
    """Record the masks of a run of the project's own driver, one particle, at the densities that are measured."""
    settings: dict[str, Any] = {"particles": 1, "cycles": cycles, "epochs": epochs, "ticket_epochs": 1}
    settings |= {"batch_size": BATCH, "augment": "crop_flip", "engine": "fused"}
    result = fast_swamp(built(model), pictures(data, "train", samples), **settings)
    kept = {}
    for cycle in DENSITIES[model]:
        for name, mask in result.at(cycle)[1].items():
            kept[f"{cycle}/{name}"] = np.packbits(mask.numpy())
    RESULTS.mkdir(exist_ok=True)
    np.savez_compressed(RESULTS / f"masks_{model}.npz", **kept)
    steps = epochs * -(-samples // BATCH)
    print(f"masks of {model}: {steps} steps a cycle, {[round(row['density'], 4) for row in result.history]}")


def built(model: str) -> nn.Module:
    """A network with weights that are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(model, *SHAPES[model], 10)


def problem_of(model: str, precision: str) -> Problem:
    """A network on random pictures; which, is no matter for time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * BATCH, *SHAPES[model]), dtype=torch.uint8, generator=generator)
    return prepare(
        built(model), (images, torch.arange(len(images)) % 10),
        settings={"particles": LANES, "batch_size": BATCH, "precision": precision, "progress": False,
                  "augment": "crop_flip" if model != "mlp" else "none"},
    )  # fmt: skip


def recorded(problem: Problem, model: str, cycle: int, uniform: bool = False) -> Tensor:
    """A mask [Q] of the recorded run; without one, or if asked for, uniform at random of the same density."""
    mask = problem.mask.clone()
    path = RESULTS / f"masks_{model}.npz"
    if uniform or not path.exists():
        return mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.8**cycle)
    bits = np.load(path)
    for name, view in problem.layout.mask_views(mask).items():
        view.copy_(
            torch.from_numpy(np.unpackbits(bits[f"{cycle}/{name}"], count=view.numel()).astype(bool)).view(view.shape)
        )
    return mask


def dense_step(problem: Problem, mask: Tensor, last: bool, bfloat16: bool, compiled: bool) -> Callable[[], None]:
    """A step of a dense loop on one particle: autograd, torch.optim.SGD, masked weights."""
    model = built_like(problem)
    keys = torch.zeros(1, 3, dtype=torch.int64)
    handle = next(iter(problem.train.batches(torch.arange(problem.train.length)[None], keys, problem.bounds[:1])))
    inputs, targets = problem.train.fetch(handle, keys).lane(0)
    if last:
        model, inputs = (
            model.to(memory_format=torch.channels_last),
            inputs.contiguous(memory_format=torch.channels_last),
        )
    masks = {name: each.to(problem.dtype) for name, each in problem.layout.mask_views(mask).items()}
    parameters = dict(model.named_parameters())
    for name, each in masks.items():
        parameters[name].data.mul_(each)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(run(inputs), targets)
        loss.backward()
        optimizer.step()
        for name, each in masks.items():
            parameters[name].data.mul_(each)

    return step


def stacked_step(problem: Problem, compiled: bool = False) -> Callable[[], None]:
    """A step of LANES particles at once by stacked parameters and vmap: autograd's gradients, momentum by hand.

    Norms use the batch's statistics and keep no running ones, which vmap can't write in place. Without masks.
    """
    models = [torch.func.replace_all_batch_norm_modules_(built_like(problem)) for _ in range(LANES)]
    weights, buffers = torch.func.stack_module_state(models)
    momenta = {name: torch.zeros_like(each) for name, each in weights.items()}
    keys = torch.zeros(1, 3, dtype=torch.int64, device=problem.device)
    order = torch.arange(problem.train.length, device=problem.device)[None]
    handle = next(iter(problem.train.batches(order, keys, problem.bounds[:1])))
    inputs, targets = problem.train.fetch(handle, keys).lane(0)
    inputs, targets = inputs.expand(LANES, *inputs.shape), targets.expand(LANES, *targets.shape)

    low = problem.config.precision == "bfloat16"

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        if low:  # by hand: under vmap autocast's gradients come in another type than their weights
            weights, inputs = {name: each.bfloat16() for name, each in weights.items()}, inputs.bfloat16()
        outputs = torch.func.functional_call(models[0], (weights, buffers), (inputs,))
        return F.cross_entropy(outputs.float(), targets)

    gradient: Any = torch.func.vmap(torch.func.grad(loss), randomness="different")
    if compiled:
        gradient = torch.compile(gradient)

    def step() -> None:
        found = gradient(weights, buffers, inputs, targets)
        with torch.no_grad():
            for name, each in weights.items():
                momenta[name].mul_(0.9).add_(found[name]).add_(each, alpha=5e-4)
                each.sub_(momenta[name], alpha=1e-3)

    return step


def built_like(problem: Problem) -> nn.Module:
    """The problem's network, to be trained by a loop."""
    import copy

    return copy.deepcopy(problem.original).to(problem.device, problem.dtype).train()


def fused_step(problem: Problem, mask: Tensor) -> tuple[Callable[[], None], int]:
    """A step of all lanes by the fused engine, and the bytes of its weights, momentum and SWA means."""
    plan = fused_plan(problem)
    assert isinstance(plan, Plan), plan
    trainer, handle = trainer_of(FusedEngine(problem, plan, "benchmark", {}), problem, LANES, mask)
    size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.bank.moving().values())
    return lambda: trainer.step(handle), size


def step(model: str, precision: str, rounds: int, compiled: bool, stacked: bool, uniform: bool) -> None:
    """A step of one of 4 particles at every density, all contenders in turn."""
    problem = problem_of(model, precision)
    low = precision == "bfloat16"
    dense: dict[str, Callable[[], None]] = {
        "naive, channels first": dense_step(problem, problem.mask, False, low, False),
        "naive, channels last": dense_step(problem, problem.mask, True, low, False),
    }
    if compiled:
        dense["torch.compile, channels last"] = dense_step(problem, problem.mask, True, low, True)
    if stacked:
        dense["stacked, vmap"] = stacked_step(problem)
    plan = fused_plan(problem)
    assert isinstance(plan, Plan), plan
    state: dict[int, int] = {}
    shares: dict[int, tuple[float, float]] = {}
    contenders = dict(dense)
    cycles = (0, 6, 10, 14) if uniform else DENSITIES[model]
    for cycle in cycles:
        mask = recorded(problem, model, cycle, uniform)
        difference = differs_from_autograd(problem, plan, mask)
        assert difference is None, difference
        run, state[cycle] = fused_step(problem, mask)
        shares[cycle] = int(mask.sum()) / problem.layout.weights, problem.flops(mask) / problem.flops(problem.mask)
        contenders[f"fused {cycle}"] = run
    times = interleaved(contenders, rounds)
    if stacked:
        times["stacked, vmap"] = {name: each / LANES for name, each in times["stacked, vmap"].items()}
    best = min(times[name]["median"] for name in dense)
    plain = times["naive, channels first"]["median"]
    table = [
        {"": name, "density": 1.0, "FLOP density": 1.0, "ms a particle-step": round(times[name]["median"] * 1e3, 2),
         "p20": round(times[name]["p20"] * 1e3, 2), "p80": round(times[name]["p80"] * 1e3, 2),
         "best dense / this": round(best / times[name]["median"], 2),
         "plain loop / this": round(plain / times[name]["median"], 2),
         "state, MB": ""}
        for name in dense
    ]  # fmt: skip
    for cycle in cycles:
        taken = {name: value / LANES for name, value in times[f"fused {cycle}"].items()}
        table.append(
            {"": "fused", "density": round(shares[cycle][0], 4), "FLOP density": round(shares[cycle][1], 4),
             "ms a particle-step": round(taken["median"] * 1e3, 2), "p20": round(taken["p20"] * 1e3, 2),
             "p80": round(taken["p80"] * 1e3, 2), "best dense / this": round(best / taken["median"], 2),
             "plain loop / this": round(plain / taken["median"], 2), "state, MB": round(state[cycle] / 1e6, 2)}
        )  # fmt: skip
    about = header(rounds) | {"model": model, "precision": precision, "lanes": LANES, "batch": BATCH}
    from_run = not uniform and (RESULTS / f"masks_{model}.npz").exists()
    about["masks"] = "of a recorded run" if from_run else "uniform at random"
    command = f"python -m benchmarks.fused step --model {model} --precision {precision}"
    left_out = ("" if compiled else " --no-compile") + ("" if stacked else " --no-vmap") + uniform * " --uniform"
    write(f"fused_step_{model}_{precision}" + uniform * "_uniform", command + left_out, about, table)


def run(model: str, data: Path, samples: int, particles: int, precision: str) -> None:
    """A whole run of 14 cycles, by fast_swamp and by the naive loop in its faster memory format."""
    train, test = pictures(data, "train", samples), pictures(data, "test", 1000)
    settings: dict[str, Any] = {"particles": particles, "cycles": 14, "epochs": 1, "ticket_epochs": 1, "swa_start": 0.0}
    settings |= {"batch_size": BATCH, "augment": "crop_flip", "precision": precision, "seed": 0}
    table = []
    for name, function, network in (
        ("fast_swamp", fast_swamp, built(model)),
        ("naive_swamp, channels last", naive_swamp, built(model).to(memory_format=torch.channels_last)),
    ):
        began = time.perf_counter()
        result = function(network, train, test, **settings)
        last = result.history[-1]
        table.append(
            {"": name, "seconds": round(time.perf_counter() - began, 1),
             "training steps alone": round(sum(row["train_seconds"] for row in result.history), 1),
             "accuracy at the end": last["accuracy"], "density": round(last["density"], 4),
             "engine": result.engine["engine"]}
        )  # fmt: skip
        (RESULTS / f"fused_run_{precision}_{function.__name__}.json").write_text(json.dumps(result.history) + "\n")
    for row in table:
        row["naive / this"] = round(table[-1]["seconds"] / row["seconds"], 2)
    about = header(1) | {"model": model, "steps a cycle": -(-samples // BATCH), **settings, "test pictures": 1000}
    command = f"python -m benchmarks.fused run --data cifar10.npz --samples {samples} --particles {particles}"
    write(f"fused_run_{precision}", f"{command} --precision {precision}", about, table)


def seeds(data: Path | None, count: int = 5) -> None:
    """Accuracy of the average over seeds, by engine: a small CNN on digits, or ResNet-20 on a subset of CIFAR-10."""
    train: Any = "digits"
    test: Any = None
    settings: dict[str, Any]
    if data is None:
        settings = {"particles": 2, "cycles": 14, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
    else:
        train, test = pictures(data, "train", 2048), pictures(data, "test", 1000)
        settings = {"particles": 2, "cycles": 4, "prune": 0.5, "epochs": 2, "ticket_epochs": 1, "batch_size": BATCH}
        settings["augment"] = "crop_flip"
    table = []
    for name, function, engine, precision in (
        ("naive_swamp", naive_swamp, "auto", "float32"),
        ("eager", fast_swamp, "eager", "float32"),
        ("fused", fast_swamp, "fused", "float32"),
        ("fused, bfloat16", fast_swamp, "fused", "bfloat16"),
    ):
        if data is not None and engine == "eager":
            continue  # tests/engines/test_equivalence.py holds it to the naive loop, whose time it takes
        accuracies = []
        for seed in range(count):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = (
                    build_model("small_cnn", 1, 8, 8, 10) if data is None else build_model("resnet20", 3, 32, 32, 10)
                )
            if data is not None and function is naive_swamp:
                model = model.to(memory_format=torch.channels_last)
            own = {**settings, "engine": engine, "precision": precision, "seed": seed, "progress": False}
            accuracies.append([row["accuracy"] for row in function(model, train, test, **own).history])
        found = torch.tensor(accuracies, dtype=torch.float64)
        last = settings["cycles"]
        cycles = {f"cycle {c}": f"{found[:, c].mean():.2%} +- {found[:, c].std():.2%}" for c in (0, last // 2, last)}
        table.append({"": name, **cycles})
    about = header(1) | {"seeds": count, **settings}
    if data is None:
        write("fused_seeds", "python -m benchmarks.fused seeds", about, table)
    else:
        about |= {"data": "2,048 training and 1,000 test pictures of a JPEG copy of CIFAR-10"}
        write("fused_seeds_cifar", "python -m benchmarks.fused seeds --data cifar10.npz", about, table)


def pictures(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first so many pictures of CIFAR-10 as an .npz, uint8 [B, 3, 32, 32], and their labels."""
    loaded = np.load(data)
    images = torch.from_numpy(loaded[f"{split}_images"][:count]).movedim(-1, 1)
    return images, torch.from_numpy(loaded[f"{split}_labels"][:count])


def figure() -> None:
    """Time of a step over density, all contenders, as an SVG."""
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
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["masks", "step", "run", "seeds", "figure"])
    parser.add_argument("--model", default="resnet20", choices=SHAPES)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz; `masks` and `run` need it")
    parser.add_argument("--samples", type=int, default=25600)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-vmap", action="store_true", help="leave stack-and-vmap out; it is timed in float32 only")
    parser.add_argument("--uniform", action="store_true", help="masks uniform at random, not those of a run")
    given = parser.parse_args()
    if given.what in ("masks", "run") and given.data is None:
        parser.error(f"{given.what} needs --data")
    if given.what == "masks":
        masks(given.model, given.data, given.samples, given.epochs, max(DENSITIES[given.model]))
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
