"""Methods against each other: the same seeds, one sweep, differences paired by seed."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast import distributed
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.statistics import half_width
from swamp_fast.config import SwampConfig
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.methods import DECIDED, METHODS, particles_of, seeds_of
from swamp_fast.particles.random import at_time, evaluation_time, generators_left_alone
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Transform, cross_entropy
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.report.figures import accuracy_of_points
from swamp_fast.report.tables import comparison_table
from swamp_fast.runs.checkpoint import write
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.sweep import Model, SweepResult, SweptRun, drawn, spread_of, swept, without_folder, write_csv

DENSE = {"sgd": "imp", "swa": "imp+swa"}  # the methods whose cycle 0 is the dense reference


@dataclass
class Comparison:
    """What methods came to.

    Attributes:
        baseline: the method that the others are compared with.
        rows: one a method, seed and cycle: method, seed, cycle, density, accuracy and loss on test, and what it took to
            come to that density, the ticket and all trainings before it included: particle_epochs, and seconds (without
            the ticket's, which no history has; of runs that shared steps, a share each).
        summary: one a method and cycle: method, cycle, density, seeds, accuracy (the mean), accuracy_std, loss and
            loss_std in the same way, matching_sgd and matching_swa, particle_epochs, seconds. It matches if its mean
            accuracy is at least that of the dense reference over the seeds that both have, without any tolerance; None
            without accuracies or such seeds.
        paired: one a method, other than the baseline, and cycle: method, cycle, density, seeds, difference (the mean
            over seeds of its accuracy minus the baseline's of the same seed), low and high, the 95 % interval of
            Student's t; None with one seed. Intervals are of each row by itself, not of all at once.
        dense: "sgd" and "swa" -> accuracy, accuracy_std and seeds of one dense particle at the same schedule.
        errors: one a method and seed that failed: method, seed, error.
        runs: (method, seed) -> its runs; an ensemble has several.
    """

    baseline: str
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    paired: list[dict[str, Any]]
    dense: dict[str, dict[str, Any]]
    errors: list[dict[str, Any]]
    runs: dict[tuple[str, int], list[SweptRun]]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without the runs."""
        return {name: value for name, value in vars(self).items() if name != "runs"}

    def table(self) -> str:
        """The last cycle, a row a method, as text."""
        return comparison_table(self.summary, self.paired, self.baseline)

    def figure(self, path: str | Path) -> Path:
        """Draw the accuracy over the density, a line a method, with its spread over seeds; the suffix is the format.

        Raises ImportError without matplotlib, ValueError without accuracies.
        """
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in self.summary:
            lines.setdefault(row["method"], []).append(row)
        return accuracy_of_points(lines, Path(path))


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
    config: SwampConfig | None = None,
    **common: Any,
) -> Comparison:
    """Run methods under the same seeds, as one sweep: runs that can share a step are packed, none is done twice.

    Args:
        model: a factory, called under each seed, so that initialisation and ticket vary; or a module, the one
            initialisation of all, whose differences then say nothing of others.
        train, test, val, forward, loss, transform, prunable, initial_masks: as for fast_swamp. "best-particle" needs
            val: nothing is selected on test.
        methods: names in swamp_fast.methods.METHODS, which says what each is and whose.
        seeds: at least two for intervals.
        out: a folder for the runs, as of sweep, and for comparison.json, .csv, .svg and .png.
        baseline: one of the methods.
        config, common: what all methods share. `particles` is N; what methods differ in must not be among it.

    Raises as sweep does, ValueError for a method that is not known.
    """
    base = without_folder(SwampConfig.of(config, common))
    _check(methods, seeds, baseline, base)
    methods, seeds = list(methods), [operator.index(seed) for seed in seeds]
    wanted = {
        (method, seed): [
            base.replace(**METHODS[method].settings(base), seed=own) for own in seeds_of(METHODS[method], base, seed)
        ]
        for method in methods
        for seed in seeds
    }
    others = [METHODS[method].layers_of for method in methods]
    for name in {each for each in others if each is not None} - {*methods}:
        wanted |= {(name, seed): [base.replace(**METHODS[name].settings(base), seed=seed)] for seed in seeds}
    for name in DENSE.values():
        if (name, seeds[0]) not in wanted:
            wanted |= {
                (f"dense of {name}", seed): [base.replace(**METHODS[name].settings(base), seed=seed, cycles=0)]
                for seed in seeds
            }
    arguments = Arguments(
        val=val, forward=forward, loss=loss, transform=transform, prunable=prunable, initial_masks=initial_masks
    )
    runs: dict[SwampConfig, SweptRun] = {}
    problems: dict[SwampConfig, Problem] = {}

    def do(configs: Iterable[SwampConfig]) -> None:
        new = list(dict.fromkeys(configs))
        if not new:
            return
        done, of = swept(model, train, test, [_changes(base, own) for own in new], base, out, arguments)
        runs.update(zip(new, done.runs, strict=True))
        problems.update(zip(new, of, strict=True))

    later = {(method, seed): METHODS[method].layers_of for method in methods for seed in seeds}
    do(own for key, each in wanted.items() for own in each if not later.get(key))
    for (method, seed), other in later.items():
        if other is not None:
            (own,), told = wanted[method, seed], runs[wanted[other, seed][0]]
            if told.result is None:
                runs[own] = told  # it can't be done either
            else:
                wanted[method, seed] = [own.replace(layer_kept=_layer_kept(told.result))]
    do(own for each in wanted.values() for own in each if own not in runs)
    found = {key: [runs[own] for own in each] for key, each in wanted.items()}

    rows, errors = [], []
    for (method, seed), members in found.items():
        failed = [run.error for run in members if run.error is not None]
        if failed:
            errors.append({"method": method, "seed": seed, "error": f"{type(failed[0]).__name__}: {failed[0]}"})
        else:
            problem = problems[wanted[method, seed][0]]
            rows += [{"method": method, "seed": seed, **row} for row in _rows(method, base, problem, members)]
    references = {name: _reference(rows, method) for name, method in DENSE.items()}
    dense = {name: _spread([*there.values()]) for name, there in references.items()}
    rows = [row for row in rows if row["method"] in methods]
    summary = _summary(rows, references)
    compared = Comparison(baseline, rows, summary, _paired(rows, baseline), dense, errors, found)
    if out is not None and distributed.current().first:
        SweepResult([*runs.values()]).write_csv(Path(out) / "results.csv")
        write_csv(Path(out) / "comparison.csv", rows)
        write(Path(out) / "comparison.json", json.dumps(compared.to_dict(), indent=1).encode())
        for suffix in ("svg", "png"):
            drawn(compared.figure, Path(out) / f"comparison.{suffix}", base)
    return compared


def _check(methods: Sequence[str], seeds: Sequence[int], baseline: str, base: SwampConfig) -> None:
    for name, values in (("methods", methods), ("seeds", seeds)):
        if isinstance(values, str) or len(values) == 0 or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must be a list of at least one, each once; got {values!r}.")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f'`methods`: "{method}" is not known; there are {", ".join(METHODS)}.')
    if baseline not in methods:
        raise ValueError(f'`baseline` must be one of the methods, {", ".join(methods)}; got "{baseline}".')
    particles_of(base)
    for name, default in DECIDED.items():
        if getattr(base, name) != default:
            raise ValueError(
                f"`{name}` is what methods differ in, got {getattr(base, name)!r} for all of them; leave it at "
                f"{default!r}, or use sweep."
            )


def _layer_kept(result: SwampResult) -> list[list[int]]:
    """How many weights of each layer a run kept in each cycle from 1 on."""
    cycles = range(1, len(result.history))
    return [[int(mask.sum()) for mask in result.at(cycle)[1].values()] for cycle in cycles]


def _changes(base: SwampConfig, own: SwampConfig) -> dict[str, Any]:
    """A configuration as a sweep's point."""
    there = base.to_dict()
    changes = {name: value for name, value in own.to_dict().items() if value != there[name]}
    if own.target_density is None:
        changes = {**changes, "cycles": own.cycles} if base.target_density is not None else changes
        changes.pop("target_density", None)
    return {**changes, "seed": own.seed}


def _rows(method: str, base: SwampConfig, problem: Problem, members: Sequence[SweptRun]) -> list[dict[str, Any]]:
    """A method's rows under one seed, one for each of its cycles that stands for one of the base."""
    config, every = problem.config, METHODS[method].every(base) if method in METHODS else 1
    results = [run.result for run in members if run.result is not None]
    rows = []
    for cycle in range(0, config.cycles + 1, every):
        row = results[0].history[cycle]
        scores = {"accuracy": row["accuracy"], "loss": row["loss"]}
        if len(results) > 1:
            scores = ensemble_scores(problem, [result.at(cycle)[0] for result in results])
        taken = {0, cycle} if config.mask_from == "dense" else range(cycle + 1)
        epochs = config.ticket_epochs + config.epochs * sum(config.particles_at(each) for each in taken)
        rows.append(
            {"cycle": cycle // every, "density": statistics.fmean(each.history[cycle]["density"] for each in results)}
            | scores
            | {"particle_epochs": len(results) * epochs}
            | {"seconds": sum(each.history[number]["seconds"] for each in results for number in taken)}
        )
    return rows


@torch.no_grad()
def ensemble_scores(problem: Problem, models: Sequence[nn.Module]) -> dict[str, float | None]:
    """Accuracy and cross-entropy on test of the mean of the models' softmax.

    None without test data or classes; the loss is None where the problem's is another, which takes no probabilities.
    """
    if problem.test is None or not problem.classifies:
        return {"accuracy": None, "loss": None}
    models = [model.to(problem.device, problem.dtype) for model in models]
    keys = [problem.keys_of(0, number) for number in range(len(models))]
    correct, entries, loss = 0, 0, 0.0
    with generators_left_alone():
        batches = pass_in_stored_order(problem.test, problem.config.batch_size)
        for number, (inputs, targets, count) in enumerate(batches):
            time = evaluation_time(1, number)
            outputs = [
                problem.outputs(model, inputs, at_time(key, time)) for model, key in zip(models, keys, strict=True)
            ]
            together = torch.stack([each.double().softmax(1) for each in outputs]).mean(0)
            correct, entries = correct + int((together.argmax(1) == targets).sum()), entries + targets.numel()
            if problem.loss is cross_entropy:
                logs = together.clamp_min(torch.finfo(torch.float64).tiny).log()
                loss += float(problem.losses(logs, targets).mean()) * count
    mean = loss / problem.test.length if problem.loss is cross_entropy else None
    return {"accuracy": correct / entries, "loss": mean}


def _reference(rows: Sequence[dict[str, Any]], method: str) -> dict[int, dict[str, Any]]:
    """Seed -> the row of a method's dense cycle."""
    return {row["seed"]: row for row in rows if row["method"] in (method, f"dense of {method}") and row["cycle"] == 0}


def _spread(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seeds, mean accuracy and its standard deviation; None without accuracies."""
    spread = spread_of("accuracy", rows) if rows else {}
    return {"seeds": len(rows), "accuracy": None, "accuracy_std": None} | spread


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[int, dict[str, Any]]]:
    """Rows by method and cycle, and by seed."""
    groups: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["cycle"]), {})[row["seed"]] = row
    return groups


def _summary(
    rows: Sequence[dict[str, Any]], references: Mapping[str, Mapping[int, dict[str, Any]]]
) -> list[dict[str, Any]]:
    summary = []
    for (method, cycle), each in _grouped(rows).items():
        own = list(each.values())
        spread = _spread(own)
        matching = {f"matching_{name}": _matches(each, there) for name, there in references.items()}
        means = {name: statistics.fmean(row[name] for row in own) for name in ("density", "particle_epochs", "seconds")}
        losses = {"loss": None, "loss_std": None} | spread_of("loss", own)
        summary.append({"method": method, "cycle": cycle, **spread, **losses, **matching, **means})
    return summary


def _matches(own: Mapping[int, dict[str, Any]], dense: Mapping[int, dict[str, Any]]) -> bool | None:
    """Whether the mean accuracy over the seeds that both have is at least the dense one's."""
    both = [seed for seed in own if seed in dense]
    ours, theirs = (_spread([rows[seed] for seed in both])["accuracy"] for rows in (own, dense))
    return None if ours is None or theirs is None else ours >= theirs


def _paired(rows: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Each method's differences from the baseline, cycle by cycle, over the seeds that both have."""
    groups, paired = _grouped(rows), []
    for (method, cycle), own in groups.items():
        there = groups.get((baseline, cycle), {})
        both = [seed for seed in own if seed in there]
        if method == baseline or not both or any(own[seed]["accuracy"] is None for seed in both):
            continue
        differences = [own[seed]["accuracy"] - there[seed]["accuracy"] for seed in both]
        mean, low, high = statistics.fmean(differences), None, None
        if len(both) > 1:
            half = half_width(differences)
            low, high = mean - half, mean + half
        density = statistics.fmean(there[seed]["density"] for seed in both)
        paired.append({"method": method, "cycle": cycle, "density": density, "seeds": len(both)})
        paired[-1] |= {"difference": mean, "low": low, "high": high}
    return paired
