"""What the slices of benchmarks.gpu share: the device, contenders kept apart, and each network proven once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.steps import Step, problem_of, step_of
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.engine import FusedEngine, faster_branch
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.step_time import timed_lanes
from swamp_fast.problem.problem import Problem

ROUNDS = 10
STEPS = 20  # between two looks at the clock
Contender = tuple[int, Callable[[], Step]]  # particles of a call, and what makes the call
Times = dict[str, dict[str, float] | str]  # of each contender: quantiles in seconds, or how it failed


class Bench:
    """What the slices share: the device, sizes, what was proven of each network, and where results go."""

    def __init__(self, out: Path, data: Path | None, rehearse: bool) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.data, self.rehearse = data, rehearse
        self.batch, self.numbers = (8, 200_000) if rehearse else (128, 20_000_000)
        self.size, self.particles = (8, 2) if rehearse else (32, 8)
        self.rounds, self.steps_a_turn = (2, 1) if rehearse else (ROUNDS, STEPS)
        self.name = "cpu" if rehearse else torch.cuda.get_device_name().lower().replace(" ", "_")
        self.proofs: dict[str, tuple[Plan, Launch | None] | str] = {}
        self.branches: dict[tuple[str, int], int | None] = {}
        self.said = ""  # of a slice, in a line
        timing.RESULTS = out

    def write(self, slice_: str, table: list[dict[str, Any]], of: str = "", **more: Any) -> None:
        """One table, as timing.write."""
        about = timing.header(self.rounds) | {"device": self.name, "batch": self.batch, **more}
        if not self.rehearse:
            import triton

            about |= {"triton": triton.__version__, "cuda": torch.version.cuda}
        timing.write(
            "_".join(filter(None, ("gpu", slice_, of, self.name))),
            f"python -m benchmarks.gpu --only {slice_}",
            about,
            table,
        )

    def timed(
        self,
        contenders: Mapping[str, Callable[[], Step]],
        write: Callable[[Times], None],
        steps: int | None = None,
        rounds: int | None = None,
    ) -> None:
        """Seconds of one call of each: made and timed one after the other, and at last all in turns.

        contenders  make the calls
        write       is given what there is after each. One that fails has how instead of its times.

        Raises RuntimeError for those at the end.
        """
        steps, rounds = steps or self.steps_a_turn, rounds or self.rounds
        found: Times = {}
        runs: dict[str, Step] = {}
        for name, make in contenders.items():
            if self.lost():
                found[name] = "failed: not tried, since the device was lost before"
            else:
                try:
                    runs[name] = make()
                    found[name] = self._interleaved({name: runs[name]}, steps, min(2, rounds))[name]
                except Exception as error:
                    traceback.print_exc()
                    runs.pop(name, None)
                    found[name] = failure(error)
            write(found)
        if runs and not self.lost():
            found |= self._interleaved(runs, steps, rounds)
            write(found)
        failed = [f"{name} {how}" for name, how in found.items() if isinstance(how, str)]
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

        times = timing.interleaved({name: turn(name) for name in runs}, rounds)
        each: Times = {name: {key: value / steps for key, value in own.items()} for name, own in times.items()}
        return each | failed

    def lost(self) -> bool:
        """Whether the GPU answers no more: after an illegal access none does, until the process ends."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def steps(self, slice_: str, contenders: Mapping[str, Contender], against: str, **about: Any) -> None:
        """A table of particle-steps."""

        def write(found: Times) -> None:
            each = {name: times["median"] / contenders[name][0]
                    for name, times in found.items() if isinstance(times, dict)}  # fmt: skip
            table = []
            for name, times in found.items():
                particles = contenders[name][0]
                row: dict[str, Any] = {"": name, "particles": particles, "ms a particle-step": times}
                row |= dict.fromkeys(("p20", "p80", "particle-steps/s", f"this / {against}"), "")
                if isinstance(times, dict):
                    row["ms a particle-step"] = round(each[name] * 1e3, 4)
                    row |= {key: round(times[key] / particles * 1e3, 4) for key in ("p20", "p80")}
                    row["particle-steps/s"] = round(1 / each[name], 1)
                    if against in each:
                        row[f"this / {against}"] = round(each[name] / each[against], 2)
                table.append(row)
            told = "; ".join(f"{row['']} {row['ms a particle-step']}" for row in table)
            self.said = f"ms a particle-step: {told}; "
            self.write(slice_, table, **about)

        self.timed({name: make for name, (_, make) in contenders.items()}, write)

    def problem(self, model: str, particles: int) -> Problem:
        """A network on random pictures."""
        return problem_of(model, particles, self.batch, "bfloat16", self.device, self.size)

    def engine(self, model: str, particles: int) -> tuple[FusedEngine, Problem]:
        """The fused engine; each network is planned and checked once. Raises RuntimeError for one that isn't right."""
        problem = self.problem(model, particles)
        if model not in self.proofs:
            self.proofs[model] = self._proof(problem)
        proof = self.proofs[model]
        if isinstance(proof, str):
            raise RuntimeError(proof)
        plan, launch = proof
        lanes = timed_lanes(problem)
        if (model, lanes) not in self.branches:
            self.branches[model, lanes] = faster_branch(problem, plan, launch)
            print(f"lanes of a branch of the graph: {self.branches[model, lanes] or 'all'}", flush=True)
        return FusedEngine(problem, plan, "benchmark", {}, launch, self.branches[model, lanes]), problem

    def _proof(self, problem: Problem) -> tuple[Plan, Launch | None] | str:
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
        """A step of the fused engine."""
        engine, problem = self.engine(model, particles)
        return step_of(engine, problem, particles)


def failure(error: Exception) -> str:
    """What stands in a table instead of a figure."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
