"""What the GPU spends a step's time on: every launch of it, as the profiler saw them, and launches by themselves."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.steps import Step
from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.halo import Halo, Prologue, Statistics
from swamp_fast.engines.fused.cuda.params import Params

KINDS = ("kernel", "gpu_memcpy", "gpu_memset")  # of the profiler's events
HALO_KINDS = ("forward", "by input", "by weights")
STEPS = 20  # that are recorded


def profiled(step: Step, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table of a step's launches, and its sums. Raises RuntimeError where the profiler saw none."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    step()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kinds = KINDS if on_gpu else ("cpu_op",)
    return table([event for event in events if event.get("cat") in kinds], STEPS)


def table(events: Iterable[Mapping[str, Any]], steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events of `steps` steps by kernel and grid, the longest first; and their sums.

    The rate at which the device is busy is over the time from the first launch's begin to the last one's end.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        grid = "x".join(map(str, event.get("args", {}).get("grid", ())))
        groups[event["name"], grid].append(event)
    if not groups:
        raise RuntimeError("the profiler recorded no launch.")
    every = [event for group in groups.values() for event in group]
    total = sum(event["dur"] for event in every)
    rows = []
    for (name, grid), group in sorted(groups.items(), key=lambda item: -sum(event["dur"] for event in item[1])):
        spent, about = sum(event["dur"] for event in group), group[0].get("args", {})
        rows.append(
            {"kernel": name[:90], "grid": grid, "launches a step": round(len(group) / steps, 2),
             "us a launch": round(spent / len(group), 2), "us a step": round(spent / steps, 1),
             "share": f"{spent / total:.1%}", "registers": about.get("registers per thread", ""),
             "occupancy, %": about.get("est. achieved occupancy %", "")}
        )  # fmt: skip
    span = max(event["ts"] + event["dur"] for event in every) - min(event["ts"] for event in every)
    sums = {"launches": round(len(every) / steps, 1), "us_a_step": round(total / steps, 1)}
    return rows, sums | {"busy": f"{total / span:.0%}"}


def halo_step(halo: Halo, kind: str, blocks: int, lanes: int, samples: int) -> Step:
    """A launch of csrc/cuda as in a step, compiled so that a processor can hold `blocks` blocks at once."""
    device = torch.device("cuda", 0)
    launcher = nvrtc.launcher(device)

    def launch(
        name: str,
        constants: nvrtc.Constants,
        grid: tuple[int, int, int],
        shared_bytes: int,
        params: Params,
    ) -> None:
        launcher(name, {**constants, "MIN_BLOCKS": blocks}, grid, shared_bytes, params)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    inputs, outputs = halo.inputs, halo.outputs
    source = normal(lanes, samples, halo.height, halo.width, inputs).bfloat16()
    out = normal(lanes, samples, halo.height, halo.width, outputs).bfloat16()
    size = 9 * inputs * outputs
    dense = normal(lanes, 2 * size).bfloat16()
    prologue = Prologue(normal(lanes, inputs), normal(lanes, inputs), 0)
    if kind == "forward":
        found, weights = torch.empty(4, lanes, outputs, device=device), normal(lanes, 2 * outputs)
        arrivals = torch.zeros(lanes, outputs, dtype=torch.int32, device=device)
        to = Statistics(found[0], found[1], found[2], found[3], 0, weights, 0, outputs, 1e-5, arrivals)
        return lambda: halo.convolve(launch, source, prologue, dense, 0, None, out, False, False, to)
    if kind == "by input":  # adds, so that what it adds up must stay finite
        dense.zero_()
        return lambda: halo.convolve(launch, out, None, dense, size, None, source, True, True, None)
    partial = torch.empty(lanes, halo.parts(samples) * size, device=device)
    return lambda: halo.weight_grad(launch, source, prologue, out, partial, 0)
