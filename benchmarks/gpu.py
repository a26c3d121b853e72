"""Everything that is measured on a GPU, by one command, in slices of under 8 minutes each.

    python -m benchmarks.gpu --out DIR [--data cifar10.npz] [--only tests step scale ...]

Slices, in this order: tests (pytest -m gpu, and the fused engine's), ceilings, bank (update and threshold), step
(against the naive loop), rivals (compiled, a graph of streams, vmap), processes (sharing the GPU), networks, scale
(particles), epoch, accuracy (over seeds), sweep (of runs). A slice that fails is reported and the next one runs. One
JSON and one Markdown table a slice, with the device in the file's name. Without a GPU, --rehearse runs what can be run
on a CPU, at a tiny size, to try the command itself; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import sweeps, timing
from benchmarks.cpu import ticket
from benchmarks.fused import LANES, pictures, stacked_step
from swamp_fast import fast_swamp, naive_swamp, ops
from swamp_fast.engines.eager import EagerEngine
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores
from swamp_fast.engines.fused.engine import FusedEngine, faster_branch, fused_plan
from swamp_fast.engines.rule import eager_by_rule
from swamp_fast.engines.trainer import first_handle
from swamp_fast.estimate import estimate, measured_ceilings
from swamp_fast.models import build_model
from swamp_fast.plan import Plan
from swamp_fast.problem import Problem, prepare

ROUNDS = 10
STEPS = 20  # between two looks at the clock


class Bench:
    """What the slices share: the device, sizes, and where results go."""

    def __init__(self, out: Path, data: Path | None, rehearse: bool) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.data, self.rehearse = data, rehearse
        self.batch, self.numbers = (8, 200_000) if rehearse else (128, 20_000_000)
        self.size = 8 if rehearse else 32
        self.name = "cpu" if rehearse else torch.cuda.get_device_name().lower().replace(" ", "_")
        timing.RESULTS = out

    def write(self, slice_: str, table: list[dict[str, Any]], of: str = "", **more: Any) -> None:
        """One table, as timing.write."""
        about = timing.header(ROUNDS) | {"device": self.name, "batch": self.batch, **more}
        if not self.rehearse:
            import triton

            about |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        timing.write(
            "_".join(filter(None, ("gpu", slice_, of, self.name))),
            f"python -m benchmarks.gpu --only {slice_}",
            about,
            table,
        )

    def seconds(self, contenders: dict[str, Callable[[], object]], steps: int = STEPS) -> dict[str, dict[str, float]]:
        """Seconds of one call of each, in turns of `steps` calls, after one turn to warm up."""

        def turn(run: Callable[[], object]) -> Callable[[], None]:
            def many() -> None:
                for _ in range(steps):
                    run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()

            return many

        times = timing.interleaved({name: turn(run) for name, run in contenders.items()}, ROUNDS)
        return {name: {key: value / steps for key, value in each.items()} for name, each in times.items()}

    def problem(self, model: str, particles: int, precision: str = "bfloat16") -> Problem:
        """A network on random pictures of CIFAR-10's size."""
        generator = torch.Generator().manual_seed(0)
        shape = 4 * self.batch, 3, self.size, self.size
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = build_model(model, 3, self.size, self.size, 10)
        settings = {"particles": particles, "batch_size": self.batch, "precision": precision, "augment": "crop_flip"}
        settings |= {"device": str(self.device), "progress": False}
        return prepare(network, (images, torch.arange(len(images)) % 10), settings=settings)


def step_of(engine: FusedEngine | EagerEngine, problem: Problem, particles: int) -> Callable[[], None]:
    """A step of all particles, its data gathered and augmented on the device."""
    bank = engine.spawn(ticket(problem), problem.mask, range(particles), 1)
    trainer = engine.trainer
    assert trainer is not None
    trainer.way.set_buffers(bank.buffers)
    trainer.lr.fill_(1e-3)
    for module in trainer.way.modules:
        module.train()
    handle = first_handle(problem, bank)
    trainer.step(handle)
    if problem.device.type == "cuda" and trainer.not_captured is not None:
        raise RuntimeError(f"the step is no CUDA graph: {trainer.not_captured}")
    return lambda: trainer.step(handle)


def fused(problem: Problem, particles: int) -> Callable[[], None]:
    """The fused engine, its plan checked first."""
    plan = fused_plan(problem)
    assert isinstance(plan, Plan), plan
    difference = differs_from_autograd(problem, plan)
    assert difference is None, difference
    launch = tensor_cores(problem, plan)
    if isinstance(launch, str):
        print(f"without the CUDA kernels: {launch}", flush=True)
    launch = None if isinstance(launch, str) else launch
    branch = faster_branch(problem, plan, launch)
    print(f"lanes of a branch of the graph: {branch or 'all'}", flush=True)
    return step_of(FusedEngine(problem, plan, "benchmark", {}, launch, branch), problem, particles)


class Loop:
    """What people write: one particle's network, autocast, SGD, masked weights; the data come as the fused engine's."""

    def __init__(self, problem: Problem, compiled: str | None = None) -> None:
        self.problem, device = problem, problem.device
        self.model = copy.deepcopy(problem.original).to(device).to(memory_format=torch.channels_last).train()
        self.run = torch.compile(self.model, mode=compiled) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
        masks = problem.layout.mask_views(problem.mask)
        parameters = dict(self.model.named_parameters())
        self.masked = [(parameters[name], each.to(torch.float32)) for name, each in masks.items()]
        self.keys = torch.zeros(1, 3, dtype=torch.int64, device=device)
        order = torch.arange(problem.train.length, device=device)[None]
        self.handle = next(iter(problem.train.batches(order, self.keys, problem.bounds[:1]))).contiguous()

    def step(self) -> None:
        """One step of one particle."""
        inputs, targets = self.problem.train.fetch(self.handle, self.keys, True).lane(0)
        self.optimizer.zero_grad()
        with torch.autocast(self.problem.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.run(inputs), targets)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)


def tests(bench: Bench) -> None:
    """The tests of the fused engine's kernels, which run on a GPU where there is one, and all that need one."""
    kernels = [["tests/test_cuda_kernels.py"], ["tests/test_fused_cuda.py", "--slow"]]
    rows = [_pytest(options) for options in ([] if bench.rehearse else [*kernels, ["-m", "gpu"]])]
    bench.write("tests", rows or [{"tests": "none without a GPU", "exit": 0, "said": ""}])
    if any(row["exit"] for row in rows):
        raise RuntimeError("tests failed")


def _pytest(options: list[str]) -> dict[str, Any]:
    """Several processes, since most of such a test is compiling; what they say is seen as they say it."""
    processes = str(min(8, os.cpu_count() or 1))  # -n is pytest-xdist's
    command = [sys.executable, "-m", "pytest", "-q", "-n", processes, "--durations=10", *options]
    last = ""
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
    bench.write("ceilings", [row])


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
    times = bench.seconds(
        {
            "copy of one bank": lambda: grads.copy_(momenta),
            "masked_sgd_ with SWA": lambda: ops.masked_sgd_(
                *(weights, grads, momenta, masks, run_of_lane),
                lr=rates, momentum=rates, weight_decay=rates, swa=swa, swa_weight=rates,
            ),
            "global_threshold": lambda: ops.global_threshold(flat, all_kept, keep),
            "torch.topk": lambda: torch.topk(flat[0].abs(), kept),
            "torch.kthvalue": lambda: torch.kthvalue(flat[0].abs(), bench.numbers - kept),
        },
        3,
    )  # fmt: skip
    moved = {"copy of one bank": 2, "masked_sgd_ with SWA": 7, "global_threshold": 5 + 5 / 4 + 1 / 4}
    copied = 2 * 4 * bench.numbers / times["copy of one bank"]["median"]
    table = []
    for name, each in times.items():
        row = {"": name, **{key: f"{value * 1e3:.3f} ms" for key, value in each.items()}}
        share = moved[name] * 4 * bench.numbers / each["median"] / copied if name in moved else None
        table.append(row | {"share of the copy's rate": "" if share is None else f"{share:.0%}"})
    bench.write("bank", table, numbers=bench.numbers)


def _steps(bench: Bench, slice_: str, contenders: dict[str, tuple[int, Callable[[], None]]], **about: Any) -> None:
    """A table of particle-steps; a contender is (particles of a call, call), the first what the others are against."""
    times = bench.seconds({name: run for name, (_, run) in contenders.items()})
    each = {name: times[name]["median"] / contenders[name][0] for name in contenders}
    first = next(iter(each.values()))
    table = [
        {"": name, "particles": contenders[name][0], "ms a particle-step": round(seconds * 1e3, 4),
         "p20": round(times[name]["p20"] / contenders[name][0] * 1e3, 4),
         "p80": round(times[name]["p80"] / contenders[name][0] * 1e3, 4),
         "particle-steps/s": round(1 / seconds, 1), "this / the first": round(seconds / first, 2)}
        for name, seconds in each.items()
    ]  # fmt: skip
    bench.write(slice_, table, **about)


def step(bench: Bench) -> None:
    """ResNet-20, 8 particles: fused, eager, and the naive loop; share of the memory roofline."""
    particles = 2 if bench.rehearse else 8
    problem = bench.problem("resnet20", particles)
    eager = EagerEngine(problem, eager_by_rule(problem))
    contenders = {
        "fused": (particles, fused(problem, particles)),
        "eager engine": (particles, step_of(eager, problem, particles)),
        "naive loop": (1, Loop(problem).step),
    }
    _, cost = estimate(problem.original, torch.zeros(bench.batch, 3, bench.size, bench.size), "bfloat16")
    found = measured_ceilings(bench.device, "bfloat16")
    floor = round(cost.moved / found.bytes * 1e3, 4)
    _steps(bench, "step", contenders, model="resnet20", memory_floor_ms=floor, eager=eager.why)


def rivals(bench: Bench) -> None:
    """ResNet-20, 8 particles, against the cheap ways to be fast: compiled, one graph of forked streams."""
    particles = 2 if bench.rehearse else 8
    problem = bench.problem("resnet20", particles)
    contenders = {"fused": (particles, fused(problem, particles))}
    if not bench.rehearse:
        contenders["naive loop, torch.compile(max-autotune)"] = (1, Loop(problem, "max-autotune").step)
        contenders["one CUDA graph of forked streams, compiled"] = (particles, _forked(problem, particles))
    contenders["stacked, vmap, compiled"] = (LANES, stacked_step(problem, compiled=not bench.rehearse))
    _steps(bench, "rivals", contenders, model="resnet20")


def _forked(problem: Problem, particles: int) -> Callable[[], None]:
    """All particles' compiled steps on streams of their own, captured in one graph."""
    loops = [Loop(problem, "max-autotune-no-cudagraphs") for _ in range(particles)]
    streams = [torch.cuda.Stream() for _ in loops]

    def fork() -> None:
        current = torch.cuda.current_stream()
        for loop, stream in zip(loops, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                loop.step()
        for stream in streams:
            current.wait_stream(stream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fork()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fork()
    return graph.replay


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
    loop = Loop(Bench(timing.RESULTS, None, rehearse).problem("resnet20", 1))
    count, began, measured = 0, time.perf_counter(), 0.0
    while time.perf_counter() - began < 2 * seconds:  # the first half waits until all are there
        loop.step()
        if device == "cuda":
            torch.cuda.synchronize()
        if time.perf_counter() - began > seconds:
            count += 1
            measured = measured or time.perf_counter()
    return (count - 1) / (time.perf_counter() - measured)


def networks(bench: Bench) -> None:
    """The other networks at 8 particles."""
    particles = 2 if bench.rehearse else 8
    for model in ("resnet20",) if bench.rehearse else ("wrn28_2", "vgg19"):
        problem = bench.problem(model, particles)
        contenders = {"fused": (particles, fused(problem, particles)), "naive loop": (1, Loop(problem).step)}
        _steps(bench, "networks", contenders, of=model, model=model)


def scale(bench: Bench) -> None:
    """ResNet-20 from 1 to 64 particles: particle-steps a second should never fall."""
    contenders = {}
    for particles in (1, 2) if bench.rehearse else (1, 2, 4, 8, 16, 32, 64):
        contenders[f"fused, {particles}"] = particles, fused(bench.problem("resnet20", particles), particles)
    _steps(bench, "scale", contenders, model="resnet20")


def epoch(bench: Bench) -> None:
    """An epoch over all of CIFAR-10 at 8 particles, by fast_swamp, with what is around the steps."""
    if bench.data is None:
        print("epoch: needs --data cifar10.npz", flush=True)
        return
    particles, count = (2, 64) if bench.rehearse else (8, 50_000)
    train = pictures(bench.data, "train", count)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = build_model("resnet20", 3, 32, 32, 10)
    settings: dict[str, Any] = {"particles": particles, "cycles": 1, "epochs": 1 if bench.rehearse else 10}
    settings |= {"ticket_epochs": 0, "batch_size": bench.batch, "augment": "crop_flip", "precision": "bfloat16"}
    settings |= {"engine": "fused", "device": str(bench.device)}
    began = time.perf_counter()
    result = fast_swamp(model, train, **settings)
    row = result.history[-1]
    bench.write(
        "epoch",
        [{"particles": particles, "seconds an epoch": round(row["train_seconds"] / settings["epochs"], 3),
          "whole run, s": round(time.perf_counter() - began, 1), "epochs": settings["epochs"]}],
        pictures=count,
    )  # fmt: skip


def accuracy(bench: Bench, seeds: int = 5) -> None:
    """Accuracy of a whole run on digits over seeds: the naive loop, and the fused engine by precision."""
    settings: dict[str, Any] = {"particles": 2, "cycles": 14, "epochs": 4, "ticket_epochs": 2, "batch_size": 64}
    if bench.rehearse:
        settings |= {"cycles": 1, "epochs": 1}
    table = []
    for name, function, own in (
        ("naive_swamp", naive_swamp, {}),
        ("fused", fast_swamp, {"engine": "fused"}),
        ("fused, bfloat16", fast_swamp, {"engine": "fused", "precision": "bfloat16"}),
    ):
        found = []
        for seed in range(1 if bench.rehearse else seeds):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = build_model("small_cnn", 1, 8, 8, 10)
            told = {"seed": seed, "device": str(bench.device), "progress": False}
            found.append(function(model, "digits", **settings, **own, **told).history[-1]["accuracy"])
        accuracies = torch.tensor(found, dtype=torch.float64)
        spread = float(accuracies.std()) if len(found) > 1 else 0.0
        table.append({"": name, "accuracy": f"{accuracies.mean():.2%}", "spread": f"{spread:.2%}", "seeds": len(found)})
    bench.write("accuracy", table, **settings)


def sweep(bench: Bench) -> None:
    """8 runs of 2 particles in one bank, against one by one."""
    settings: dict[str, Any] = {**sweeps.SETTINGS, "device": str(bench.device), "engine": "fused"}
    settings |= {"cycles": 0, "epochs": 1, "ticket_epochs": 0} if bench.rehearse else {"precision": "bfloat16"}
    ways = {"separate": lambda: sweeps.separate(settings), "packed": lambda: sweeps.packed(settings)}
    found = timing.interleaved(ways, 1 if bench.rehearse else 3)
    table = [
        {
            "": way,
            "s": round(each["median"], 2),
            "times as fast": round(found["separate"]["median"] / each["median"], 2),
        }
        for way, each in found.items()
    ]
    bench.write("sweep", table, **settings)


SLICES = {
    each.__name__: each
    for each in (tests, ceilings, bank, step, rivals, processes, networks, scale, epoch, accuracy, sweep)
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
    failed = []
    for name in given.only:
        began = time.perf_counter()
        try:
            SLICES[name](bench)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        sys.exit(f"benchmarks.gpu: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
