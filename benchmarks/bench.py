"""What the slices of benchmarks.gpu share: device and sizes, timing that survives failures, and checked networks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import measuring
from benchmarks.steps import Step, problem_of, step_of
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.engine import FusedEngine, faster_branch
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.step_time import timed_lanes
from swamp_fast.problem.problem import Problem

ROUNDS = 10
STEPS_PER_TURN = 20  # steps between two readings of the clock
Contender = tuple[int, Callable[[], Step]]  # particles that a step trains, and a function that prepares the step
Times = dict[str, dict[str, float] | str]  # contender -> quantiles in seconds, or its error


class Bench:
    """The state of one call of benchmarks.gpu.

    checked     model -> its plan and the launcher of its CUDA kernels, or the reason why it can't be used
    branches    (model, lanes) -> lanes per branch of the CUDA graph; None if all lanes are in one branch
    summary     what the current slice will report on its last line
    """

    def __init__(self, out: Path, data: Path | None, rehearse: bool) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.data, self.rehearse = data, rehearse
        self.batch, self.numbers = (8, 200_000) if rehearse else (128, 20_000_000)
        self.size, self.particles = (8, 2) if rehearse else (32, 8)
        self.rounds, self.steps_per_turn = (2, 1) if rehearse else (ROUNDS, STEPS_PER_TURN)
        self.name = "cpu" if rehearse else torch.cuda.get_device_name().lower().replace(" ", "_")
        self.checked: dict[str, tuple[Plan, Launch | None] | str] = {}
        self.branches: dict[tuple[str, int], int | None] = {}
        self.summary = ""
        measuring.RESULTS = out

    def write(self, slice_: str, table: list[dict[str, Any]], of: str = "", **more: Any) -> None:
        """Write the table of a slice, or of its part `of`. `more` are further entries of the table's header."""
        about = measuring.header(self.rounds) | {"device": self.name, "batch": self.batch, **more}
        if not self.rehearse:
            import triton

            about |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        name = "_".join(filter(None, ("gpu", slice_, of, self.name)))
        measuring.write(name, f"python -m benchmarks.gpu --only {slice_}", about, table)

    def timed(
        self,
        contenders: Mapping[str, Callable[[], Step]],
        write: Callable[[Times], None],
        steps: int | None = None,
        rounds: int | None = None,
    ) -> None:
        """Time one call of each contender: first each contender alone, then all in turns.

        contenders  name -> function that prepares a contender and returns the call to time
        write       is called with the times so far after each contender; a failed contender has an error instead

        Raises RuntimeError at the end if any contender failed.
        """
        steps, rounds = steps or self.steps_per_turn, rounds or self.rounds
        times: Times = {}
        runs: dict[str, Step] = {}
        for name, make in contenders.items():
            if self.device_is_lost():
                times[name] = "failed: not tried, since the device was lost before"
            else:
                try:
                    runs[name] = make()
                    times[name] = self._interleaved({name: runs[name]}, steps, min(2, rounds))[name]
                except Exception as error:
                    traceback.print_exc()
                    runs.pop(name, None)
                    times[name] = failure(error)
            write(times)
        if runs and not self.device_is_lost():
            times |= self._interleaved(runs, steps, rounds)
            write(times)
        failed = [f"{name} {how}" for name, how in times.items() if isinstance(how, str)]
        if failed:
            raise RuntimeError("; ".join(failed))

    def _interleaved(self, runs: Mapping[str, Step], steps: int, rounds: int) -> Times:
        failed: Times = {}

        def turn(name: str) -> Callable[[], None]:
            def many() -> None:
                if name in failed:
                    return
                try:
                    for _ in range(steps):
                        runs[name]()
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                except Exception as error:
                    failed[name] = failure(error)

            return many

        turns = measuring.interleaved({name: turn(name) for name in runs}, rounds)
        times: Times = {name: {key: value / steps for key, value in each.items()} for name, each in turns.items()}
        return times | failed

    def device_is_lost(self) -> bool:
        """Whether the GPU no longer answers. After an illegal memory access, it doesn't until the process ends."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def steps(self, slice_: str, contenders: Mapping[str, Contender], against: str, **about: Any) -> None:
        """Time contenders and write a table of times per particle-step, with ratios to the contender `against`."""

        def write(times: Times) -> None:
            medians = {name: quantiles["median"] / contenders[name][0]
                       for name, quantiles in times.items() if isinstance(quantiles, dict)}  # fmt: skip
            table = []
            for name, quantiles in times.items():
                row: dict[str, Any] = {"": name, **particle_step_cells(quantiles, contenders[name][0])}
                row |= dict.fromkeys(("particle-steps/s", f"this / {against}"), "")
                if name in medians:
                    row["particle-steps/s"] = round(1 / medians[name], 1)
                    if against in medians:
                        row[f"this / {against}"] = round(medians[name] / medians[against], 2)
                table.append(row)
            cells = "; ".join(f"{row['']} {row['ms a particle-step']}" for row in table)
            self.summary = f"ms per particle-step: {cells}"
            self.write(slice_, table, **about)

        self.timed({name: make for name, (_, make) in contenders.items()}, write)

    def problem(self, model: str, particles: int) -> Problem:
        """Prepare the training of a network on random pictures in bfloat16."""
        shape = (3, self.size, self.size)
        return problem_of(model, particles, self.batch, shape, precision="bfloat16", device=str(self.device))

    def engine(self, model: str, particles: int) -> tuple[FusedEngine, Problem]:
        """Return the fused engine for a network and its problem. Each network is planned and checked only once.

        Raises RuntimeError if the engine doesn't cover the network or differs from autograd.
        """
        problem = self.problem(model, particles)
        if model not in self.checked:
            self.checked[model] = self._check(problem)
        checked = self.checked[model]
        if isinstance(checked, str):
            raise RuntimeError(checked)
        plan, launch = checked
        lanes = timed_lanes(problem)
        if (model, lanes) not in self.branches:
            self.branches[model, lanes] = faster_branch(problem, plan, launch)
            print(f"lanes per branch of the graph: {self.branches[model, lanes] or 'all'}", flush=True)
        return FusedEngine(problem, plan, "benchmark", {}, launch, self.branches[model, lanes]), problem

    def _check(self, problem: Problem) -> tuple[Plan, Launch | None] | str:
        plan = fused_plan(problem)
        if isinstance(plan, str):
            return plan
        difference = differs_from_autograd(problem, plan)
        if difference is not None:
            return difference
        launch = tensor_cores(problem, plan)
        if isinstance(launch, str):
            print(f"without the CUDA kernels: {launch}", flush=True)
            return plan, None
        return plan, launch

    def fused(self, model: str, particles: int) -> Step:
        """Return a training step of the fused engine."""
        engine, problem = self.engine(model, particles)
        return step_of(engine, problem, particles)


def cells(quantiles: dict[str, float] | str, name: str, shown: Callable[[float], Any]) -> dict[str, Any]:
    """Return a contender's cells of a table: median (under `name`), p20 and p80, or its error."""
    if isinstance(quantiles, str):
        return {name: quantiles, "p20": "", "p80": ""}
    return {column: shown(quantiles[key]) for column, key in ((name, "median"), ("p20", "p20"), ("p80", "p80"))}


def particle_step_cells(quantiles: dict[str, float] | str, particles: int) -> dict[str, Any]:
    """Return a contender's cells of a table: number of particles, and times of a step per particle."""
    shown = cells(quantiles, "ms a particle-step", lambda seconds: round(seconds / particles * 1e3, 4))
    return {"particles": particles, **shown}


def failure(error: Exception) -> str:
    """Describe an error in one line, which a table shows instead of a time."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
