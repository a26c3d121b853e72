"""Does all measurements that need a GPU by one command, in slices of less than 8 minutes each.

    python -m benchmarks.gpu --out DIR [--data cifar10.npz] [--only tests step scale ...]

Slices, in this order:

tests      pytest -m gpu, and the tests of the fused engine
ceilings   how fast the device copies and multiplies
step       the fused engine's step, compared with float64, then timed
profile    microseconds of each launch of that step
light      the naive loop: as it is, as one CUDA graph, and as forked streams in one graph
bank       the update and the global threshold
epoch      an epoch of CIFAR-10
eager      the eager engine
compiled   torch.compile and vmap
variants   the CUDA kernels with other launch bounds
processes  several processes that share the GPU
networks   WRN-28-2 and VGG-19
scale      1 to 64 particles
accuracy   accuracy over seeds
sweep      runs that share a bank

Each slice writes one JSON and one Markdown table into DIR, with the device in the file name. A slice that fails is
reported, and the next one runs. A contender that fails is reported in its row of the table. --rehearse tries the
command on a CPU, at a tiny size; its measurements mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cifar10, sweeps
from benchmarks.bench import Bench, Contender, Times, cells, failure, particle_step_cells
from benchmarks.children import child_process, pytest_command
from benchmarks.launches import HALO_KINDS, halo_step, profiled
from benchmarks.steps import NaiveLoop, Step, errors, in_one_graph, random_pictures, seeded_model, stacked_step, step_of
from swamp_fast import SwampResult, fast_swamp, naive_swamp, ops
from swamp_fast.common.timing import Stopwatch, seconds_of
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.cuda.halo import Halo
from swamp_fast.engines.fused.estimate import estimate, measured_ceilings
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.models import build_model

STACKED_LANES = 4  # particles in the contender that stacks them by vmap


def tests(bench: Bench) -> None:
    """Run the tests of the fused engine's kernels, and all tests that need a GPU."""
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
    """Run pytest and pass on its output. Return its exit status and last line."""
    last_line = ""
    command = pytest_command(*options)
    with child_process(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last_line = line.strip() or last_line
        process.wait()
    return {"tests": " ".join(options), "exit": process.returncode, "said": last_line}


def ceilings(bench: Bench) -> None:
    """Measure how fast the device copies and multiplies."""
    measured = measured_ceilings(bench.device, "bfloat16")
    row = {"copies, GB/s": round(measured.bytes / 1e9), "bfloat16 products, TFLOP/s": round(measured.flops / 1e12, 1)}
    bench.summary = ", ".join(f"{value} {what}" for what, value in row.items())
    bench.write("ceilings", [row])


def step(bench: Bench) -> None:
    """Compare the fused engine's step of ResNet-20 with 8 particles with float64, then time it."""
    model, particles = "resnet20", bench.particles
    problem = bench.problem(model, particles)
    _, cost = estimate(problem.original, torch.zeros(bench.batch, 3, bench.size, bench.size), "bfloat16")
    floor = round(cost.moved / measured_ceilings(bench.device, "bfloat16").bytes * 1e3, 4)
    about: dict[str, Any] = {"model": model, "memory_floor_ms": floor}

    def checked() -> Step:
        engine, problem = bench.engine(model, particles)
        about.update({name: f"{error:.2g}" for name, error in errors(engine, problem, particles).items()})
        about.update({"tensor_cores": engine.launch is not None, "branch": engine.branch})
        return step_of(engine, problem, particles)

    def write(times: Times) -> None:
        row = {"": "fused", **particle_step_cells(times["fused"], particles)}
        bench.summary = f"{row['ms a particle-step']} ms per particle-step"
        bench.write("step", [row], **about)

    bench.timed({"fused": checked}, write)


def profile(bench: Bench) -> None:
    """Measure the microseconds of every launch in the fused engine's step of ResNet-20 with 8 particles."""
    table, sums = profiled(bench.fused("resnet20", bench.particles), bench.device)
    bench.summary = ", ".join(f"{name} {value}" for name, value in sums.items())
    bench.write("profile", table, model="resnet20", particles=bench.particles, **sums)


def light(bench: Bench) -> None:
    """Time rivals that need no compiler: the naive loop, a CUDA graph of it, and forked streams in one graph."""
    particles = bench.particles
    problem = bench.problem("resnet20", particles)
    contenders: dict[str, Contender] = {
        "naive loop": (1, lambda: NaiveLoop(problem).step),
        "naive loop, one CUDA graph": (1, lambda: in_one_graph([NaiveLoop(problem)])),
        "forked streams in one CUDA graph": (
            particles,
            lambda: in_one_graph([NaiveLoop(problem) for _ in range(particles)]),
        ),
        "fused": (particles, partial(bench.fused, "resnet20", particles)),
    }
    bench.steps("light", contenders, "fused", model="resnet20")


def variants(bench: Bench) -> None:
    """Time the kernels of csrc/cuda for ResNet-20, compiled for 1, 2 or 3 blocks per multiprocessor."""
    if bench.rehearse:
        bench.summary = "needs a GPU"
        return
    named = {
        (kind, halo.inputs, blocks): partial(halo_step, halo, kind, blocks, bench.particles, bench.batch)
        for halo in (Halo(32, 32, 16, 16), Halo(16, 16, 32, 32), Halo(8, 8, 64, 64))
        for kind in HALO_KINDS
        for blocks in (1, 2, 3)
    }

    def write(times: Times) -> None:
        table = [
            {"": kind, "channels": channels, "blocks": blocks,
             **cells(quantiles, "us", lambda seconds: round(seconds * 1e6, 1))}
            for (kind, channels, blocks), quantiles in zip(named, times.values(), strict=False)
        ]  # fmt: skip
        bench.write("variants", table, particles=bench.particles)

    bench.timed({" ".join(map(str, name)): make for name, make in named.items()}, write)


def eager(bench: Bench) -> None:
    """Time a step of ResNet-20 with 8 particles by the eager engine."""
    particles = bench.particles
    problem = bench.problem("resnet20", particles)
    contenders: dict[str, Contender] = {
        "eager engine": (
            particles,
            lambda: step_of(EagerEngine(problem, eager_by_rule(problem)), problem, particles),
        ),
        "fused": (particles, partial(bench.fused, "resnet20", particles)),
    }
    bench.steps("eager", contenders, "fused", model="resnet20")


def compiled(bench: Bench) -> None:
    """Time torch.compile in its default mode: the naive loop, a graph of forked streams, and vmap."""
    particles = bench.particles
    problem = bench.problem("resnet20", particles)
    contenders: dict[str, Contender] = {}
    if not bench.rehearse:
        contenders["naive loop, compiled"] = (1, lambda: NaiveLoop(problem, compiled=True).step)
        contenders["forked streams in one CUDA graph, compiled"] = (
            particles,
            lambda: in_one_graph([NaiveLoop(problem, compiled=True) for _ in range(particles)]),
        )
    stacked = partial(stacked_step, problem, STACKED_LANES, compiled=not bench.rehearse)
    contenders["stacked, vmap, compiled"] = (STACKED_LANES, stacked)
    contenders["fused"] = (particles, partial(bench.fused, "resnet20", particles))
    bench.steps("compiled", contenders, "fused", model="resnet20")


def bank(bench: Bench) -> None:
    """Time the update with SWA against a copy, and the global threshold against torch's equivalents."""
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
            lr=rates[:, None], momentum=rates, weight_decay=rates[:, None], swa=swa, swa_weight=rates,
        ),
        "global_threshold": lambda: ops.global_threshold(flat, all_kept, keep),
        "torch.topk": lambda: torch.topk(flat[0].abs(), kept),
        "torch.kthvalue": lambda: torch.kthvalue(flat[0].abs(), bench.numbers - kept),
    }  # fmt: skip
    moved = {"copy of one bank": 2, "masked_sgd_ with SWA": 7, "global_threshold": 5 + 5 / 4 + 1 / 4}

    def write(times: Times) -> None:
        copy, table = times["copy of one bank"], []
        for name, quantiles in times.items():
            row: dict[str, Any] = {"": name, **cells(quantiles, "median", lambda seconds: f"{seconds * 1e3:.3f} ms")}
            row["share of the copy's rate"] = ""
            if name in moved and isinstance(quantiles, dict) and isinstance(copy, dict):
                share = moved[name] / quantiles["median"] * copy["median"] / moved["copy of one bank"]
                row["share of the copy's rate"] = f"{share:.0%}"
            table.append(row)
        bench.write("bank", table, numbers=bench.numbers)

    bench.timed({name: partial(_as_is, call) for name, call in calls.items()}, write, 3)


def _as_is(call: Step) -> Step:
    """Return the call itself, as a contender that needs no preparation."""
    return call


def processes(bench: Bench) -> None:
    """Measure naive loops of ResNet-20 in parallel processes that share the GPU, one particle per process."""
    particles, seconds = (2, 1.0) if bench.rehearse else (8, 10.0)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(particles) as pool:
        rates = pool.starmap(_steps_per_second, [(bench.device.type, bench.rehearse, seconds)] * particles)
    row = {"processes": particles, "particle-steps/s, all together": round(sum(rates), 1)}
    bench.write("processes", [row | {"ms a particle-step": round(1e3 / sum(rates), 4)}], model="resnet20")


def _steps_per_second(device: str, rehearse: bool, seconds: float) -> float:
    """Return a naive loop's steps per second while the other processes run too."""
    loop = NaiveLoop(Bench(Path(), None, rehearse).problem("resnet20", 1))
    watch = Stopwatch()
    while watch.seconds < seconds:  # until all processes have started
        seconds_of(loop.step, torch.device(device))
    watch.restart()
    steps = 0
    while watch.seconds < seconds:
        seconds_of(loop.step, torch.device(device))
        steps += 1
    return steps / watch.seconds


def networks(bench: Bench) -> None:
    """Time WRN-28-2 and VGG-19 with 8 particles."""
    failed = []
    for model in ("resnet20",) if bench.rehearse else ("wrn28_2", "vgg19"):
        particles = bench.particles
        contenders: dict[str, Contender] = {
            "naive loop": (1, partial(_naive_step, bench, model)),
            "fused": (particles, partial(bench.fused, model, particles)),
        }
        try:
            bench.steps("networks", contenders, "fused", of=model, model=model)
        except RuntimeError as error:
            failed.append(f"{model}: {error}")
    if failed:
        raise RuntimeError("; ".join(failed))


def _naive_step(bench: Bench, model: str) -> Step:
    return NaiveLoop(bench.problem(model, 1)).step


def scale(bench: Bench) -> None:
    """Time ResNet-20 with 1 to 64 particles. With more particles, particle-steps per second should not fall."""
    contenders: dict[str, Contender] = {
        f"fused, {count}": (count, partial(bench.fused, "resnet20", count))
        for count in ((1, 2) if bench.rehearse else (1, 2, 4, 8, 16, 32, 64))
    }
    bench.steps("scale", contenders, "fused, 1", model="resnet20")


def epoch(bench: Bench) -> None:
    """Time an epoch of fast_swamp over all of CIFAR-10 with 8 particles, including everything around the steps."""
    particles, count = bench.particles, 64 if bench.rehearse else 50_000
    if bench.rehearse and bench.data is None:
        train = random_pictures(count)
    else:
        train = cifar10.pictures(cifar10.decoded() if bench.data is None else bench.data, "train", count)
    settings: dict[str, Any] = {"particles": particles, "cycles": 1, "epochs": 1 if bench.rehearse else 10}
    settings |= {"ticket_epochs": 0, "batch_size": bench.batch, "augment": "crop_flip", "precision": "bfloat16"}
    settings |= {"engine": "fused", "device": str(bench.device)}
    watch = Stopwatch()
    result = fast_swamp(seeded_model("resnet20"), train, **settings)
    row = result.history[-1]
    seconds = round(row["train_seconds"] / settings["epochs"], 3)
    bench.summary = f"{seconds} s per epoch"
    bench.write(
        "epoch",
        [{"particles": particles, "seconds an epoch": seconds,
          "whole run, s": round(watch.seconds, 1), "epochs": settings["epochs"]}],
        pictures=count,
    )  # fmt: skip


def accuracy(bench: Bench, seeds: int = 5) -> None:
    """Compare accuracies over seeds in whole runs on digits: the naive loop, and the fused engine by precision."""
    settings: dict[str, Any] = {"particles": 2, "cycles": 14, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
    if bench.rehearse:
        settings |= {"cycles": 1, "epochs": 1}
    table: list[dict[str, Any]] = []
    failed = []
    methods: dict[str, tuple[Callable[..., SwampResult], dict[str, Any]]] = {
        "naive_swamp": (naive_swamp, {}),
        "fused": (fast_swamp, {"engine": "fused"}),
        "fused, bfloat16": (fast_swamp, {"engine": "fused", "precision": "bfloat16"}),
    }
    for name, (function, engine) in methods.items():
        accuracies: list[float] = []
        row: dict[str, Any] = {"": name, "accuracy": "", "spread": "", "seeds": 0}
        try:
            for seed in range(1 if bench.rehearse else seeds):
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    model = build_model("small_cnn", 1, 8, 8, 10)
                run = {**settings, **engine, "seed": seed, "device": str(bench.device), "progress": False}
                accuracies.append(function(model, "digits", **run).history[-1]["accuracy"])
            values = torch.tensor(accuracies, dtype=torch.float64)
            spread = float(values.std()) if len(accuracies) > 1 else 0.0
            row |= {"accuracy": f"{values.mean():.2%}", "spread": f"{spread:.2%}", "seeds": len(accuracies)}
        except Exception as error:
            traceback.print_exc()
            row["accuracy"] = failure(error)
            failed.append(f"{name} {failure(error)}")
        table.append(row)
        bench.write("accuracy", table, **settings)
    if failed:
        raise RuntimeError("; ".join(failed))


def sweep(bench: Bench) -> None:
    """Time 8 runs of 2 particles in one bank against the same runs one after the other."""
    settings: dict[str, Any] = {**sweeps.SETTINGS, "device": str(bench.device), "engine": "fused"}
    settings |= {"cycles": 0, "epochs": 1, "ticket_epochs": 0} if bench.rehearse else {"precision": "bfloat16"}

    def write(times: Times) -> None:
        separate, table = times["separate"], []
        for name, quantiles in times.items():
            row: dict[str, Any] = {"": name, "s": quantiles, "times as fast": ""}
            if isinstance(quantiles, dict):
                row["s"] = round(quantiles["median"], 2)
                if isinstance(separate, dict):
                    row["times as fast"] = round(separate["median"] / quantiles["median"], 2)
            table.append(row)
        bench.write("sweep", table, **settings)

    calls = {call.__name__: partial(_as_is, partial(call, settings)) for call in (sweeps.separate, sweeps.packed)}
    bench.timed(calls, write, 1, 1)


SLICES = {
    slice_.__name__: slice_
    for slice_ in (
        *(tests, ceilings, step, profile, light, bank, epoch),
        *(eager, compiled, variants, processes, networks, scale, accuracy, sweep),
    )
}


def main() -> None:
    """Run the requested slices. The exit status is 1 if any slice fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the tables")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz, for `epoch`")
    parser.add_argument("--only", nargs="+", choices=SLICES, default=list(SLICES), help="slices to run, default all")
    parser.add_argument("--rehearse", action="store_true", help="run a tiny version on the CPU, to try the command")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: there is no CUDA device; --rehearse tries the command on the CPU.")
    bench = Bench(given.out, given.data, given.rehearse)
    from_cache: Counter[bool] = Counter()
    if not given.rehearse:
        from triton import knobs

        knobs.compilation.listener = lambda *, cache_hit, **_: from_cache.update([cache_hit])
    failed = []
    for name in given.only:
        watch, bench.summary = Stopwatch(), ""
        from_cache.clear()
        try:
            SLICES[name](bench)
        except Exception as error:
            failed.append(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}")
            traceback.print_exc()
        report = [bench.summary] if bench.summary else []
        report.append(f"{watch.seconds:.0f} s")
        if not given.rehearse:
            report.append(f"Triton: {from_cache[True]} kernels from the cache, {from_cache[False]} compiled")
        print(f"{name}: {', '.join(report)}", flush=True)
    if failed:
        sys.exit(f"benchmarks.gpu: failed {'; '.join(failed)}")


if __name__ == "__main__":
    main()
