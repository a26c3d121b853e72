"""Measures where the GPU time of a step goes: profiles all its launches, and launches single CUDA kernels alone."""

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

GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")  # the profiler's categories of work on the GPU
HALO_KINDS = ("forward", "by input", "by weights")
RECORDED_STEPS = 20


def profiled(step: Step, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Profile a step. Return a table of its launches, and their totals. Raise RuntimeError if there are none."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    step()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        for _ in range(RECORDED_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    categories = GPU_EVENTS if on_gpu else ("cpu_op",)
    return table([event for event in events if event.get("cat") in categories], RECORDED_STEPS)


def table(events: Iterable[Mapping[str, Any]], steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sum the profiler's events in `steps` steps by kernel and grid. Return the rows, longest first, and the totals.

    The busy share of the device is the fraction of the time from the start of the first launch to the end of the last.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        grid = "x".join(map(str, event.get("args", {}).get("grid", ())))
        groups[event["name"], grid].append(event)
    if not groups:
        raise RuntimeError("the profiler recorded no launch")
    launches = [event for group in groups.values() for event in group]
    total = sum(event["dur"] for event in launches)
    rows = []
    for (name, grid), group in sorted(groups.items(), key=lambda item: -sum(event["dur"] for event in item[1])):
        spent, arguments = sum(event["dur"] for event in group), group[0].get("args", {})
        rows.append(
            {"kernel": name[:90], "grid": grid, "launches a step": round(len(group) / steps, 2),
             "us a launch": round(spent / len(group), 2), "us a step": round(spent / steps, 1),
             "share": f"{spent / total:.1%}", "registers": arguments.get("registers per thread", ""),
             "occupancy, %": arguments.get("est. achieved occupancy %", "")}
        )  # fmt: skip
    span = max(event["ts"] + event["dur"] for event in launches) - min(event["ts"] for event in launches)
    sums = {"launches": round(len(launches) / steps, 1), "us_a_step": round(total / steps, 1)}
    return rows, sums | {"busy": f"{total / span:.0%}"}


def halo_step(halo: Halo, kind: str, blocks: int, lanes: int, samples: int) -> Step:
    """Return a call that launches a kernel of csrc/cuda, compiled so that a multiprocessor can hold `blocks` blocks.

    kind  one of HALO_KINDS
    """
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
        sums, weights = torch.empty(4, lanes, outputs, device=device), normal(lanes, 2 * outputs)
        arrivals = torch.zeros(lanes, outputs, dtype=torch.int32, device=device)
        statistics = Statistics(sums[0], sums[1], sums[2], sums[3], 0, weights, 0, outputs, 1e-5, arrivals)
        return lambda: halo.convolve(launch, source, prologue, dense, 0, None, out, False, False, statistics)
    if kind == "by input":  # this kernel accumulates into `source`, which must stay finite
        dense.zero_()
        return lambda: halo.convolve(launch, out, None, dense, size, None, source, True, True, None)
    partial = torch.empty(lanes, halo.parts(samples) * size, device=device)
    return lambda: halo.weight_grad(launch, source, prologue, out, partial, 0)
