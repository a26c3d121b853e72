"""Packs: groups of runs that can share a bank. This module chooses each pack's engine and number of runs at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swamp_fast.common.fingerprint import model_fingerprint
from swamp_fast.common.timing import Stopwatch
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.footprint import particles_that_fit
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

MAX_TIMING_SECONDS = 10.0  # once timing has taken this long, no larger number of runs is tried
MAX_SLOWDOWN = 1.03  # a larger number of runs is rejected if the step time per lane grows by more than this factor

# Settings that may differ between the runs of a pack: they have a value per lane, or matter only between trainings.
PER_RUN = (
    *("seed", "lr", "swa_lr", "swa_start", "momentum", "beta1", "beta2", "adam_eps", "weight_decay"),
    *("average", "schedule"),
    *("prune", "cycles", "target_density", "rewind", "combine", "mask_score", "mask_from", "layer_kept"),
)


@dataclass(frozen=True)
class Pack:
    """Runs that can share a bank.

    numbers  the indices of the runs in the sweep
    engine   the description of the engine that the runs start with, as Engine.describe returns it
    at_once  how many of the runs are trained in one bank
    """

    numbers: list[int]
    engine: dict[str, Any]
    at_once: int


def packs_of(problems: Sequence[Problem]) -> list[list[int]]:
    """The indices of the runs, grouped into packs of runs that can share a bank.

    Runs of a pack have the same data, model and settings, except in what may differ by lane: trained weights, running
    statistics, and the settings in PER_RUN.
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
    """The names of the model's tensors that may differ by lane: trained parameters and buffers of norms."""
    names = {entry.name for entry in problem.layout.entries}
    for path, module in problem.original.named_modules():
        if norms_of([module]) == [module]:
            names |= {f"{path}.{name}" for name, _ in module.named_buffers()}
    return names


def unfinished_packs(problems: Sequence[Problem], runs: Sequence[SweptRun], console: Console) -> list[Pack]:
    """The packs of the unfinished runs. The results of finished runs are loaded from their folders.

    If engine and number of runs were measured for any run of a pack before, the whole pack uses that choice again.
    """
    packs = []
    for numbers in packs_of(problems):
        waiting = [number for number in numbers if not runs[number].load(problems[number])]
        for number in waiting:
            runs[number].warn_if_repaired(problems[number])
        if waiting:
            recorded = (_recorded_choice(runs[number], problems[number]) for number in numbers)
            choice = next((choice for choice in recorded if choice is not None), None)
            engine, at_once = choice or _measured_choice([problems[number] for number in waiting], console)
            packs.append(Pack(waiting, engine, at_once))
    return packs


def _recorded_choice(run: SweptRun, problem: Problem) -> tuple[dict[str, Any], int] | None:
    """The engine and number of runs at once that were measured for a run earlier, on the same kind of machine.

    None if nothing was measured, or if the record can't be used here.
    """
    if problem.config.engine != "fastest" or run.folder is None or not run.begun():
        return None
    try:
        about = RunDirectory(run.folder).about()
    except ValueError:  # opening the run will raise the same error again
        return None
    engine, at_once = about["engine"], about.get("at_once", 1)
    usable = about["place"] == place_of(problem.device) and recorded_selection(engine) is not None
    return (engine, at_once) if usable and isinstance(at_once, int) and at_once > 0 else None


def _measured_choice(problems: Sequence[Problem], console: Console) -> tuple[dict[str, Any], int]:
    """Measure which engine is fastest for runs that can share a bank, and how many of them to train at once."""
    config = problems[0].config.replace(run_dir=None, tensorboard=False, progress=False)
    with Run(dataclasses.replace(problems[0], config=config), "fast_swamp") as scratch:
        engine = start_engine(problems[0], scratch)
        at_once, why = runs_at_once(engine, problems)
    console.line(f"engine   {engine.name}, {at_once} of {len(problems)} runs at once: {why}")
    return engine.describe(), at_once


def runs_at_once(engine: Engine, problems: Sequence[Problem]) -> tuple[int, str]:
    """Measure how many runs should be trained in one bank. Returns that number and the reason for it."""
    if len(problems) == 1:
        return 1, "no other run can share its bank"
    if not isinstance(engine, EagerEngine | FusedEngine) or not engine.joins:
        return 1, "this engine's program is made for the mask of one run"
    particles = max(problems[0].config.particles_at(cycle) for cycle in range(problems[0].config.cycles + 1))
    runs, seconds = 1, seconds_of_steps(engine, problems[0], problems[0].mask, particles)
    alone, watch = seconds, Stopwatch()
    most = particles_that_fit(problems[0]) // particles  # a CPU without free memory raises no OutOfMemoryError
    while runs < min(most, len(problems)) and watch.seconds < MAX_TIMING_SECONDS:
        more = min(2 * runs, most, len(problems))
        try:
            measured = seconds_of_steps(engine, problems[0], problems[0].mask, more * particles)
        except torch.OutOfMemoryError:
            engine.release()
            break
        if measured > MAX_SLOWDOWN * seconds:
            break
        runs, seconds = more, min(measured, seconds)
    engine.release()
    return runs, f"a step takes {seconds * 1e3:.3g} ms per lane, against {alone * 1e3:.3g} ms with one run at a time"


def dealt(packs: Sequence[Pack], problems: Sequence[Problem], world: int) -> list[list[Pack]]:
    """Distribute the runs of all packs so that every rank has about the same number of particle-steps to train.

    Returns each rank's packs; a pack may be split between ranks.
    """
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
