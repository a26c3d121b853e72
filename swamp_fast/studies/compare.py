"""compare(): run several methods under the same seeds, as one sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from swamp_fast import distributed
from swamp_fast.common.checked import checked_list
from swamp_fast.common.csv_files import csv_bytes
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.config import SwampConfig, seed_of
from swamp_fast.methods import DECIDED, METHODS, particles_of, seeds_of
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Metrics, OnCycle, OnEpoch, Transform
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.recipe import Recipe
from swamp_fast.runs.files import write
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.comparison import Comparison, accuracy_over_seeds, paired_differences, rows_of, summary_of
from swamp_fast.studies.grid import Model, Point, folder_named, shared_settings
from swamp_fast.studies.result import SweepResult, SweptRun
from swamp_fast.studies.sweep import draw, folder_of_study, run_points

# Dense reference -> the method whose cycle 0 serves as that reference.
DENSE = {"sgd": "imp", "swa": "imp+swa"}

MethodAndSeed = tuple[str, int]


@one_at_a_time
def compare(
    model: Model,
    train: object,
    test: object,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    out: str | Path | None = None,
    val: object = None,
    baseline: str = "imp",
    forward: Forward | None = None,
    loss: Loss | None = None,
    transform: Transform | None = None,
    prunable: Prunable = None,
    initial_masks: Mapping[str, Tensor] | None = None,
    recipe: Recipe | None = None,
    metrics: Metrics | None = None,
    on_epoch: OnEpoch | None = None,
    on_cycle: OnCycle | None = None,
    config: SwampConfig | None = None,
    **common: Any,
) -> Comparison:
    """Compare methods under the same seeds. Compatible runs are trained together, and no run is repeated.

    Args:
        model: a factory, which is called once per run under the run's seed, so that initialisation and ticket vary;
            or a module, whose weights are the initialisation of every run. Differences between methods then hold for
            that initialisation only.
        train, test, val, forward, loss, transform, prunable, initial_masks, recipe, metrics: as for fast_swamp. The
            method "best-particle" needs val, because particles are never selected on test data.
        methods: names in swamp_fast.methods.METHODS, which describes each method and names its source.
        seeds: the seeds under which every method is run. Confidence intervals need at least two.
        out: a folder for the runs (as for sweep) and for comparison.json, .csv, .svg and .png.
        baseline: the method with which the others are compared; it must be one of `methods`.
        on_epoch, on_cycle: as for sweep. A run that StopRun ends has rows for the cycles that it has completed.
        config, common: the settings that all methods share. `particles` is the number N that methods with several
            particles use. The settings that the methods themselves change must keep their defaults.

    Raises ValueError for an unknown method, and whatever sweep raises.
    """
    base = shared_settings(config, common)
    methods = checked_list("methods", methods, str, 0)
    seeds = [seed_of("seeds", seed) for seed in checked_list("seeds", seeds, object, 0)]
    _check(methods, seeds, baseline, base)
    out = None if out is None else folder_named(out)
    done = _Runs(
        model,
        train,
        test,
        Arguments.of(locals()),
        base,
        out,
    )
    with folder_of_study(out):
        wanted = _wanted(methods, seeds, base)
        done.run(config for (method, _), configs in wanted.items() if not _layers_of(method) for config in configs)
        _take_layers(wanted, done)
        done.run(config for configs in wanted.values() for config in configs)

        runs = {key: [done.runs[config] for config in configs] for key, configs in wanted.items()}
        problems = {key: done.problems[configs[0]] for key, configs in wanted.items() if configs[0] in done.problems}
        comparison = _compared(methods, baseline, base, runs, problems)
        if out is not None and distributed.current().first:
            _write(comparison, SweepResult([*done.runs.values()]), out, base)
    return comparison


def _check(methods: Sequence[str], seeds: Sequence[int], baseline: str, base: SwampConfig) -> None:
    for name, values in (("methods", methods), ("seeds", seeds)):
        if len(values) == 0 or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must be a list with at least one entry and no duplicates; got {values!r}.")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f'`methods`: "{method}" is not a known method; known are {", ".join(METHODS)}.')
    if not isinstance(baseline, str) or baseline not in methods:
        raise ValueError(f'`baseline` must be one of the methods, {", ".join(methods)}; got "{baseline}".')
    particles_of(base)
    for name, default in DECIDED.items():
        if getattr(base, name) != default:
            raise ValueError(
                f"`{name}` is set by each method, so it can't be {getattr(base, name)!r} for all; leave it at its "
                f"default {default!r}, or use sweep."
            )


@dataclass
class _Runs:
    """The finished runs of a comparison by their settings: a run that several methods need is done only once."""

    model: Model
    train: object
    test: object
    arguments: Arguments
    base: SwampConfig
    out: Path | None
    runs: dict[SwampConfig, SweptRun] = field(default_factory=dict)
    problems: dict[SwampConfig, Problem] = field(default_factory=dict)

    def run(self, configs: Iterable[SwampConfig]) -> None:
        """Do the runs with these settings that are not done yet, as one sweep."""
        new = [config for config in dict.fromkeys(configs) if config not in self.runs]
        if new:
            points = [Point(_changes(self.base, config)) for config in new]
            result, problems = run_points(
                self.model, self.train, self.test, self.arguments, points, self.base, self.out
            )
            self.runs.update(zip(new, result.runs, strict=True))
            self.problems.update(zip(new, problems, strict=True))


def _changes(base: SwampConfig, config: SwampConfig) -> dict[str, Any]:
    """The point of a sweep that turns `base` into `config`: the settings that differ, and the seed."""
    shared = base.to_dict()
    changes = {name: value for name, value in config.to_dict().items() if value != shared[name]}
    if config.target_density is None:
        changes = {**changes, "cycles": config.cycles} if base.target_density is not None else changes
        changes.pop("target_density", None)
    return {**changes, "seed": config.seed}


def _wanted(methods: Sequence[str], seeds: Sequence[int], base: SwampConfig) -> dict[MethodAndSeed, list[SwampConfig]]:
    """The settings of all runs: of the methods, of methods that others copy from, and of the dense references."""
    wanted = {
        (method, seed): [
            base.replace(**METHODS[method].settings(base), seed=own) for own in seeds_of(METHODS[method], base, seed)
        ]
        for method in methods
        for seed in seeds
    }
    others = {other for other in map(_layers_of, methods) if other is not None}
    for name in others - {*methods}:
        wanted |= {(name, seed): [base.replace(**METHODS[name].settings(base), seed=seed)] for seed in seeds}
    for name in DENSE.values():
        if (name, seeds[0]) not in wanted:
            wanted |= {
                (_dense_of(name), seed): [base.replace(**METHODS[name].settings(base), seed=seed, cycles=0)]
                for seed in seeds
            }
    return wanted


def _dense_of(method: str) -> str:
    """The name for runs of a method's dense cycle only, which serve as a reference if the method isn't compared."""
    return f"dense of {method}"


def _layers_of(method: str) -> str | None:
    """The method whose kept weights per layer `method` copies in number; None if it copies none."""
    return METHODS[method].layers_of if method in METHODS else None


def _take_layers(wanted: dict[MethodAndSeed, list[SwampConfig]], done: _Runs) -> None:
    """Copy the number of kept weights per layer from other runs into the settings that need it.

    If a run failed that another depends on, its failure is recorded for the other run too, and both report one error.
    """
    for (method, seed), configs in wanted.items():
        other = _layers_of(method)
        if other is not None:
            (config,), run = configs, done.runs[wanted[other, seed][0]]
            if run.result is None:
                done.runs[config] = run
            else:
                layers = _layer_kept(run.result)
                shorter = {} if len(layers) == config.cycles else {"cycles": len(layers)}  # by StopRun
                wanted[method, seed] = [config.replace(layer_kept=layers, **shorter)]


def _layer_kept(result: SwampResult) -> list[list[int]]:
    """The number of weights that a run kept, by cycle from cycle 1 on, and by layer: [cycles, layers]."""
    cycles = range(1, len(result.history))
    return [[int(mask.sum()) for mask in result.at(cycle)[1].values()] for cycle in cycles]


def _compared(
    methods: Sequence[str],
    baseline: str,
    base: SwampConfig,
    runs: dict[MethodAndSeed, list[SweptRun]],
    problems: Mapping[MethodAndSeed, Problem],
) -> Comparison:
    rows, errors = [], []
    for (method, seed), members in runs.items():
        failed = next((run for run in members if run.error is not None), None)
        if failed is not None:
            errors.append({"method": method, "seed": seed, "error": failed.error_text})
        else:
            by_cycle = rows_of(method, base, problems[method, seed], members)
            rows += [{"method": method, "seed": seed, **row} for row in by_cycle]
    references = {
        name: {row["seed"]: row for row in rows if row["method"] in (method, _dense_of(method)) and row["cycle"] == 0}
        for name, method in DENSE.items()
    }
    dense = {name: accuracy_over_seeds([*by_seed.values()]) for name, by_seed in references.items()}
    rows = [row for row in rows if row["method"] in methods]
    metrics = [*next(iter(problems.values())).metrics] if problems else []
    summary, paired = summary_of(rows, references, metrics), paired_differences(rows, baseline)
    return Comparison(baseline, rows, summary, paired, dense, errors, runs)


def _write(comparison: Comparison, runs: SweepResult, folder: Path, base: SwampConfig) -> None:
    runs.write_csv(folder / "results.csv")
    write(folder / "comparison.csv", csv_bytes(comparison.rows))
    write(folder / "comparison.json", json.dumps(comparison.to_dict(), indent=1).encode())
    for suffix in ("svg", "png"):
        draw(comparison.figure, folder / f"comparison.{suffix}", base)
