"""Everything that is measured on a GPU, by one command, in slices of under 8 minutes each.

    python -m benchmarks.gpu --out DIR [--data cifar10.npz] [--only tests step scale ...]

Slices, in this order: tests (pytest -m gpu, and the fused engine's), ceilings, step (of the fused engine, against
float64), profile (microseconds of its launches), light (the naive loop, as one CUDA graph, and forked streams in one
graph), bank (update and threshold), epoch, eager (the eager engine), compiled (torch.compile, vmap), variants (of
launch bounds), processes (sharing the GPU), networks, scale (particles), accuracy (over seeds), sweep (of runs). A
slice that fails is reported and the next one runs; a contender that fails is a row, and a table is written after each
contender. One JSON and one Markdown table for each slice, with the device in the file's name. Without a GPU, --rehearse
runs what can be run on a CPU, at a tiny size, to try the command itself; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import sweeps
from benchmarks.bench import Bench, Contender, Times, failure
from benchmarks.children import pytest_command
from benchmarks.cifar10 import decoded
from benchmarks.fused import LANES, pictures, stacked_step
from benchmarks.launches import HALO_KINDS, halo_step, profiled
from benchmarks.steps import Loop, Step, errors, in_one_graph, step_of
from swamp_fast import SwampResult, fast_swamp, naive_swamp, ops
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.cuda.halo import Halo
from swamp_fast.engines.fused.estimate import estimate, measured_ceilings
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.models import build_model


def tests(bench: Bench) -> None:
    """The tests of the fused engine's kernels, which run on a GPU where there is one, and all that need one."""
    kernels = [["tests/engines/fused/test_cuda_kernels.py"], ["tests/engines/fused/test_fused_cuda.py", "--slow"]]
    rows: list[dict[str, Any]] = []
    for options in [] if bench.rehearse else [*kernels, ["-m", "gpu"]]:
        rows.append(_pytest(options))
        bench.write("tests", rows)
    if not rows:
        bench.write("tests", [{"tests": "none without a GPU", "exit": 0, "said": ""}])
    if any(row["exit"] for row in rows):
        raise RuntimeError("tests failed")


def _pytest(options: list[str]) -> dict[str, Any]:
    """What the tests say is seen as they say it."""
    last = ""
    command = pytest_command(*options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return {"tests": " ".join(options), "exit": process.returncode, "said": last}


def ceilings(bench: Bench) -> None:
    """How fast the device copies and multiplies."""
    found = measured_ceilings(bench.device, "bfloat16")
    row = {"copies, GB/s": round(found.bytes / 1e9), "bfloat16 products, TFLOP/s": round(found.flops / 1e12, 1)}
    bench.said = ", ".join(f"{value} {what}" for what, value in row.items()) + ", "
    bench.write("ceilings", [row])


def step(bench: Bench) -> None:
    """ResNet-20, 8 particles: the fused engine's step against float64 and its time; share of the memory roofline."""
    model, particles = "resnet20", bench.particles
    problem = bench.problem(model, particles)
    _, cost = estimate(problem.original, torch.zeros(bench.batch, 3, bench.size, bench.size), "bfloat16")
    floor = round(cost.moved / measured_ceilings(bench.device, "bfloat16").bytes * 1e3, 4)
    about: dict[str, Any] = {"model": model, "memory_floor_ms": floor}

    def checked() -> Step:
        engine, own = bench.engine(model, particles)
        about.update({name: f"{error:.2g}" for name, error in errors(engine, own, particles).items()})
        about.update({"tensor_cores": engine.launch is not None, "branch": engine.branch})
        return step_of(engine, own, particles)

    def write(found: Times) -> None:
        times = found["fused"]
        row: dict[str, Any] = {"": "fused", "particles": particles, "ms a particle-step": times, "p20": "", "p80": ""}
        if isinstance(times, dict):
            median, *others = (round(times[key] / particles * 1e3, 4) for key in ("median", "p20", "p80"))
            row |= {"ms a particle-step": median, **dict(zip(("p20", "p80"), others, strict=True))}
        bench.said = f"{row['ms a particle-step']} ms a particle-step, "
        bench.write("step", [row], **about)

    bench.timed({"fused": checked}, write)


def profile(bench: Bench) -> None:
    """Microseconds of every launch of that step."""
    table, sums = profiled(bench.fused("resnet20", bench.particles), bench.device)
    bench.said = ", ".join(f"{name} {value}" for name, value in sums.items()) + ", "
    bench.write("profile", table, model="resnet20", particles=bench.particles, **sums)


def light(bench: Bench) -> None:
    """ResNet-20, 8 particles, and what needs no compiler: the loop, one graph of it, forked streams in one graph."""
    particles = bench.particles
    problem = bench.problem("resnet20", particles)
    contenders: dict[str, Contender] = {
        "naive loop": (1, lambda: Loop(problem).step),
        "naive loop, one CUDA graph": (1, lambda: in_one_graph([Loop(problem)])),
        "forked streams in one CUDA graph": (
            particles,
            lambda: in_one_graph([Loop(problem) for _ in range(particles)]),
        ),
        "fused": (particles, partial(bench.fused, "resnet20", particles)),
    }
    bench.steps("light", contenders, "fused", model="resnet20")


def variants(bench: Bench) -> None:
    """The kernels of csrc/cuda for ResNet-20, compiled for 1, 2 or 3 blocks of a processor."""
    if bench.rehearse:
        bench.said = "needs a GPU, "
        return
    named = {
        (kind, halo.inputs, blocks): partial(halo_step, halo, kind, blocks, bench.particles, bench.batch)
        for halo in (Halo(32, 32, 16, 16), Halo(16, 16, 32, 32), Halo(8, 8, 64, 64))
        for kind in HALO_KINDS
        for blocks in (1, 2, 3)
    }

    def write(found: Times) -> None:
        table = []
        for (kind, channels, blocks), times in zip(named, found.values(), strict=False):
            row: dict[str, Any] = {"": kind, "channels": channels, "blocks": blocks, "us": times, "p20": "", "p80": ""}
            if isinstance(times, dict):
                row |= {
                    name: round(times[key] * 1e6, 1) for name, key in (("us", "median"), ("p20",) * 2, ("p80",) * 2)
                }
            table.append(row)
        bench.write("variants", table, particles=bench.particles)

    bench.timed({" ".join(map(str, name)): make for name, make in named.items()}, write)


def eager(bench: Bench) -> None:
    """ResNet-20, 8 particles, by the eager engine."""
    particles = bench.particles
    problem = bench.problem("resnet20", particles)

    def chosen() -> Step:
        return step_of(EagerEngine(problem, eager_by_rule(problem)), problem, particles)

    contenders: dict[str, Contender] = {
        "eager engine": (particles, chosen),
        "fused": (particles, partial(bench.fused, "resnet20", particles)),
    }
    bench.steps("eager", contenders, "fused", model="resnet20")


def compiled(bench: Bench) -> None:
    """ResNet-20, 8 particles, against torch.compile in its default mode: the loop, a graph of forked streams, vmap."""
    particles = bench.particles
    problem = bench.problem("resnet20", particles)
    contenders: dict[str, Contender] = {}
    if not bench.rehearse:
        contenders["naive loop, compiled"] = (1, lambda: Loop(problem, "default").step)
        contenders["forked streams in one CUDA graph, compiled"] = (
            particles,
            lambda: in_one_graph([Loop(problem, "default") for _ in range(particles)]),
        )
    contenders["stacked, vmap, compiled"] = (LANES, lambda: stacked_step(problem, compiled=not bench.rehearse))
    contenders["fused"] = (particles, partial(bench.fused, "resnet20", particles))
    bench.steps("compiled", contenders, "fused", model="resnet20")


def bank(bench: Bench) -> None:
    """The update with SWA against a copy, the global threshold against torch's own ways."""
    lanes, size = 4, bench.numbers // 4
    weights, grads, momenta, swa = torch.randn(4, lanes, size, device=bench.device)
    masks = torch.ones(1, size, dtype=torch.bool, device=bench.device)
    rates = torch.full((lanes,), 1e-3, dtype=torch.float64, device=bench.device)
    run_of_lane = torch.zeros(lanes, dtype=torch.int64, device=bench.device)
    flat, kept = torch.randn(1, bench.numbers, device=bench.device), bench.numbers // 5 * 4
    all_kept = torch.ones(1, bench.numbers, dtype=torch.bool, device=bench.device)
    keep = torch.tensor([kept], device=bench.device)
    calls: dict[str, Step] = {
        "copy of one bank": lambda: grads.copy_(momenta),
        "masked_sgd_ with SWA": lambda: ops.masked_sgd_(
            *(weights, grads, momenta, masks, run_of_lane),
            lr=rates, momentum=rates, weight_decay=rates, swa=swa, swa_weight=rates,
        ),
        "global_threshold": lambda: ops.global_threshold(flat, all_kept, keep),
        "torch.topk": lambda: torch.topk(flat[0].abs(), kept),
        "torch.kthvalue": lambda: torch.kthvalue(flat[0].abs(), bench.numbers - kept),
    }  # fmt: skip
    moved = {"copy of one bank": 2, "masked_sgd_ with SWA": 7, "global_threshold": 5 + 5 / 4 + 1 / 4}

    def write(found: Times) -> None:
        copy, table = found["copy of one bank"], []
        for name, times in found.items():
            row: dict[str, Any] = {"": name, "median": times, "p20": "", "p80": "", "share of the copy's rate": ""}
            if isinstance(times, dict):
                row |= {key: f"{value * 1e3:.3f} ms" for key, value in times.items()}
                if name in moved and isinstance(copy, dict):
                    share = moved[name] / times["median"] * copy["median"] / moved["copy of one bank"]
                    row["share of the copy's rate"] = f"{share:.0%}"
            table.append(row)
        bench.write("bank", table, numbers=bench.numbers)

    bench.timed({name: partial(_ready, call) for name, call in calls.items()}, write, 3)


def processes(bench: Bench) -> None:
    """ResNet-20: as many processes as particles share the GPU, each with a naive loop of its own."""
    particles, seconds = (2, 1.0) if bench.rehearse else (8, 10.0)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(particles) as pool:
        rates = pool.starmap(_rate, [(bench.device.type, bench.rehearse, seconds)] * particles)
    row = {"processes": particles, "particle-steps/s, all together": round(sum(rates), 1)}
    bench.write("processes", [row | {"ms a particle-step": round(1e3 / sum(rates), 4)}], model="resnet20")


def _rate(device: str, rehearse: bool, seconds: float) -> float:
    """Steps a second of a naive loop, measured while the others run too."""
    loop = Loop(Bench(Path(), None, rehearse).problem("resnet20", 1))
    count, began, measured = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < 2 * seconds:  # the first half waits until all are there
        loop.step()
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() - began > seconds:
            count += 1
            measured = measured or time.perf_counter()
    return (count - 1) / (time.perf_counter() - measured)


def _ready(call: Step) -> Step:
    """A contender that needn't be made."""
    return call


def networks(bench: Bench) -> None:
    """The other networks at 8 particles."""
    failed = []
    for model in ("resnet20",) if bench.rehearse else ("wrn28_2", "vgg19"):
        particles = bench.particles
        contenders: dict[str, Contender] = {
            "naive loop": (1, partial(_loop, bench, model)),
            "fused": (particles, partial(bench.fused, model, particles)),
        }
        try:
            bench.steps("networks", contenders, "fused", of=model, model=model)
        except RuntimeError as error:
            failed.append(f"{model}: {error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def _loop(bench: Bench, model: str) -> Step:
    return Loop(bench.problem(model, 1)).step


def scale(bench: Bench) -> None:
    """ResNet-20 from 1 to 64 particles: particle-steps a second should never fall."""
    contenders: dict[str, Contender] = {
        f"fused, {count}": (count, partial(bench.fused, "resnet20", count))
        for count in ((1, 2) if bench.rehearse else (1, 2, 4, 8, 16, 32, 64))
    }
    bench.steps("scale", contenders, "fused, 1", model="resnet20")


def epoch(bench: Bench) -> None:
    """An epoch over all of CIFAR-10 at 8 particles, by fast_swamp, with what is around the steps."""
    particles, count = bench.particles, 64 if bench.rehearse else 50_000
    if bench.rehearse and bench.data is None:
        train = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10
    else:
        train = pictures(decoded() if bench.data is None else bench.data, "train", count)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = build_model("resnet20", 3, 32, 32, 10)
    settings: dict[str, Any] = {"particles": particles, "cycles": 1, "epochs": 1 if bench.rehearse else 10}
    settings |= {"ticket_epochs": 0, "batch_size": bench.batch, "augment": "crop_flip", "precision": "bfloat16"}
    settings |= {"engine": "fused", "device": str(bench.device)}
    began = time.perf_counter()
    result = fast_swamp(model, train, **settings)
    row = result.history[-1]
    seconds = round(row["train_seconds"] / settings["epochs"], 3)
    bench.said = f"{seconds} s an epoch, "
    bench.write(
        "epoch",
        [{"particles": particles, "seconds an epoch": seconds,
          "whole run, s": round(time.perf_counter() - began, 1), "epochs": settings["epochs"]}],
        pictures=count,
    )  # fmt: skip


def accuracy(bench: Bench, seeds: int = 5) -> None:
    """Accuracy of a whole run on digits over seeds: the naive loop, and the fused engine by precision."""
    settings: dict[str, Any] = {"particles": 2, "cycles": 14, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
    if bench.rehearse:
        settings |= {"cycles": 1, "epochs": 1}
    table: list[dict[str, Any]] = []
    failed = []
    ways: dict[str, tuple[Callable[..., SwampResult], dict[str, Any]]] = {
        "naive_swamp": (naive_swamp, {}),
        "fused": (fast_swamp, {"engine": "fused"}),
        "fused, bfloat16": (fast_swamp, {"engine": "fused", "precision": "bfloat16"}),
    }
    for name, (function, own) in ways.items():
        found: list[float] = []
        row: dict[str, Any] = {"": name, "accuracy": "", "spread": "", "seeds": 0}
        try:
            for seed in range(1 if bench.rehearse else seeds):
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    model = build_model("small_cnn", 1, 8, 8, 10)
                told = {"seed": seed, "device": str(bench.device), "progress": False}
                found.append(function(model, "digits", **settings, **own, **told).history[-1]["accuracy"])
            accuracies = torch.tensor(found, dtype=torch.float64)
            spread = float(accuracies.std()) if len(found) > 1 else 0.0
            row |= {"accuracy": f"{accuracies.mean():.2%}", "spread": f"{spread:.2%}", "seeds": len(found)}
        except Exception as error:
            traceback.print_exc()
            row["accuracy"] = failure(error)
            failed.append(f"{name} {failure(error)}")
        table.append(row)
        bench.write("accuracy", table, **settings)
    if failed:
        raise RuntimeError("; ".join(failed))


def sweep(bench: Bench) -> None:
    """8 runs of 2 particles in one bank, against one by one."""
    settings: dict[str, Any] = {**sweeps.SETTINGS, "device": str(bench.device), "engine": "fused"}
    settings |= {"cycles": 0, "epochs": 1, "ticket_epochs": 0} if bench.rehearse else {"precision": "bfloat16"}

    def write(found: Times) -> None:
        separate, table = found["separate"], []
        for way, times in found.items():
            row: dict[str, Any] = {"": way, "s": times, "times as fast": ""}
            if isinstance(times, dict):
                row["s"] = round(times["median"], 2)
                if isinstance(separate, dict):
                    row["times as fast"] = round(separate["median"] / times["median"], 2)
            table.append(row)
        bench.write("sweep", table, **settings)

    ways = {way.__name__: partial(_ready, partial(way, settings)) for way in (sweeps.separate, sweeps.packed)}
    bench.timed(ways, write, 1, 1)


SLICES = {
    each.__name__: each
    for each in (
        *(tests, ceilings, step, profile, light, bank, epoch),
        *(eager, compiled, variants, processes, networks, scale, accuracy, sweep),
    )
}


def main() -> None:
    """Run the slices that are asked for; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz, for `epoch`")
    parser.add_argument("--only", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument("--rehearse", action="store_true", help="tiny and on the CPU, to try the command")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device here; --rehearse tries the command on the CPU.")
    bench = Bench(given.out, given.data, given.rehearse)
    compiled_here: Counter[bool] = Counter()
    if not given.rehearse:
        from triton import knobs

        knobs.compilation.listener = lambda *, cache_hit, **_: compiled_here.update([not cache_hit])
    failed = []
    for name in given.only:
        began, bench.said = time.perf_counter(), ""
        compiled_here.clear()
        try:
            SLICES[name](bench)
        except Exception as error:
            failed.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")
            traceback.print_exc()
        found = f", Triton found {compiled_here[False]} kernels and compiled {compiled_here[True]}" * (
            not given.rehearse
        )
        print(f"{name}: {bench.said}{time.perf_counter() - began:.0f} s{found}", flush=True)
    if failed:
        sys.exit(f"benchmarks.gpu: failed {'; '.join(failed)}")


if __name__ == "__main__":
    main()
