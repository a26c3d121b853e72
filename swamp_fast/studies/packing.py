"""Packs: runs that can share a step, the engine that each pack begins with, and how many runs it trains at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swamp_fast.common.fingerprint import model_fingerprint
from swamp_fast.common.timing import Stopwatch
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.start import Engine, recorded_selection, start_engine
from swamp_fast.engines.step_time import seconds_of_steps
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.schedule import total_particle_epochs
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.console import Console
from swamp_fast.runs.folder import RunDirectory
from swamp_fast.runs.record import Run
from swamp_fast.runs.resume import place_of
from swamp_fast.studies.result import SweptRun

TIMING_SECONDS = 10.0  # after which no larger number of runs is timed
MAX_SLOWDOWN = 1.03  # of a lane's step: if it grows by more, no more runs are trained at once

# Settings that may differ between the runs of a pack: a lane has its own value, or they matter between trainings only.
PER_RUN = (
    *("seed", "lr", "swa_lr", "swa_start", "momentum", "beta1", "beta2", "adam_eps", "weight_decay", "swa", "schedule"),
    *("prune", "cycles", "target_density", "rewind", "combine", "mask_score", "mask_from", "layer_kept"),
)


@dataclass(frozen=True)
class Pack:
    """Runs that can share a step, by their numbers.

    engine   how the engine that they begin with describes itself
    at_once  how many of them are trained in one bank
    """

    numbers: list[int]
    engine: dict[str, Any]
    at_once: int


def packs_of(problems: Sequence[Problem]) -> list[list[int]]:
    """The numbers of the runs that can share a step, pack by pack.

    They have the same model and settings, except for the values of a lane: its trained weights, its running
    statistics, and the settings PER_RUN.
    """
    packs: dict[str, list[int]] = {}
    for number, problem in enumerate(problems):
        settings = {name: value for name, value in problem.config.identity().items() if name not in PER_RUN}
        if problem.config.clip_norm is not None:
            settings["clip_norm"] = "one per lane"
        model = model_fingerprint(problem.original, _values_of_a_lane(problem))
        others = {name: value for name, value in problem.fingerprints.items() if name not in ("model", "mask")}
        packs.setdefault(repr((settings, model, others)), []).append(number)
    return list(packs.values())


def _values_of_a_lane(problem: Problem) -> set[str]:
    """The names of the trained parameters, and of the running statistics of norms."""
    names = {entry.name for entry in problem.layout.entries}
    for path, module in problem.original.named_modules():
        if norms_of([module]) == [module]:
            names |= {f"{path}.{name}" for name, _ in module.named_buffers()}
    return names


def unfinished_packs(problems: Sequence[Problem], runs: Sequence[SweptRun], console: Console) -> list[Pack]:
    """The packs of the runs that are still to be done; finished ones get their results.

    A choice that was measured for a run of the pack is used again, for new runs too.
    """
    packs = []
    for numbers in packs_of(problems):
        waiting = [number for number in numbers if not runs[number].load(problems[number])]
        if waiting:
            recorded = (_recorded_choice(runs[number], problems[number]) for number in numbers)
            choice = next((choice for choice in recorded if choice is not None), None)
            engine, at_once = choice or _measured_choice([problems[number] for number in waiting], console)
            packs.append(Pack(waiting, engine, at_once))
    return packs


def _recorded_choice(run: SweptRun, problem: Problem) -> tuple[dict[str, Any], int] | None:
    """The engine that was measured as the fastest for a run begun on such a machine, and how many runs at once."""
    if problem.config.engine != "fastest" or run.folder is None or not run.begun():
        return None
    try:
        about = RunDirectory(run.folder).about()
    except ValueError:  # the error is raised again when the run is opened
        return None
    engine, at_once = about["engine"], about.get("at_once", 1)
    usable = about["place"] == place_of(problem.device) and recorded_selection(engine) is not None
    return (engine, at_once) if usable and isinstance(at_once, int) and at_once > 0 else None


def _measured_choice(problems: Sequence[Problem], console: Console) -> tuple[dict[str, Any], int]:
    """The engine for runs that can share a step, and how many of them at once."""
    config = problems[0].config.replace(run_dir=None, tensorboard=False, progress=False)
    with Run(dataclasses.replace(problems[0], config=config), "fast_swamp") as scratch:
        engine = start_engine(problems[0], scratch)
        at_once, why = runs_at_once(engine, problems)
    console.line(f"engine   {engine.name}, {at_once} of {len(problems)} runs at once: {why}")
    return engine.describe(), at_once


def runs_at_once(engine: Engine, problems: Sequence[Problem]) -> tuple[int, str]:
    """How many runs that can share a step to train in one bank, measured; and the reason."""
    if len(problems) == 1:
        return 1, "no other run could share its steps"
    if not isinstance(engine, EagerEngine | FusedEngine) or not engine.joins:
        return 1, "this engine's program is made for one run's mask"
    particles = max(problems[0].config.particles_at(cycle) for cycle in range(problems[0].config.cycles + 1))
    runs, seconds = 1, seconds_of_steps(engine, problems[0], problems[0].mask, particles)
    alone, watch = seconds, Stopwatch()
    while runs < len(problems) and watch.seconds < TIMING_SECONDS:
        more = min(2 * runs, len(problems))
        try:
            measured = seconds_of_steps(engine, problems[0], problems[0].mask, more * particles)
        except torch.OutOfMemoryError:
            engine.release()
            break
        if measured > MAX_SLOWDOWN * seconds:
            break
        runs, seconds = more, min(measured, seconds)
    engine.release()
    return runs, f"a lane's step takes {seconds * 1e3:.3g} ms, and {alone * 1e3:.3g} ms with one run at a time"


def dealt(packs: Sequence[Pack], problems: Sequence[Problem], world: int) -> list[list[Pack]]:
    """The packs of each rank: runs are dealt out so that all ranks have about as much to train."""
    load = [0] * world
    ranks: list[list[Pack]] = [[] for _ in range(world)]
    for pack in packs:
        parts: list[list[int]] = [[] for _ in range(world)]
        for number in pack.numbers:
            rank = load.index(min(load))
            load[rank] += total_particle_epochs(problems[number].config) * len(problems[number].bounds)
            parts[rank].append(number)
        for packs_of_rank, numbers in zip(ranks, parts, strict=True):
            if numbers:
                packs_of_rank.append(dataclasses.replace(pack, numbers=numbers))
    return ranks
