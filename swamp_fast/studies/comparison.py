"""The result of a comparison: one row per run and cycle, a summary over seeds, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swamp_fast.common.checked import checked_path
from swamp_fast.common.statistics import half_width
from swamp_fast.config import SwampConfig
from swamp_fast.data.labels import Labels
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.methods import METHODS
from swamp_fast.particles.random import at_time, evaluation_time, generators_left_alone
from swamp_fast.problem.arguments import cross_entropy
from swamp_fast.problem.metrics import Meter, ensemble_outputs
from swamp_fast.problem.problem import Problem
from swamp_fast.report.figures import accuracy_of_points
from swamp_fast.report.tables import comparison_table
from swamp_fast.studies.result import SweptRun, spread_of

Row = dict[str, Any]


@dataclass
class Comparison:
    """The result of `compare`.

    Attributes:
        baseline: the method that the others are compared with.
        rows: one row per method, seed and cycle, with method, seed, cycle, density, accuracy, loss and the metrics on
            test data, particle_epochs and seconds. The last two are the total cost of reaching that density: all
            trainings that it takes and, in particle_epochs only, the ticket, whose seconds no history records. Runs
            that were trained together share their seconds equally.
        summary: one row per method and cycle, with method, cycle, density, seeds, accuracy (the mean), accuracy_std,
            loss, loss_std, the same of each metric, matching_sgd, matching_swa, particle_epochs, seconds. A method
            matches a dense reference if its mean accuracy over the seeds that both have is at least the reference's,
            without any tolerance. The value is None without accuracies or without a common seed.
        paired: one row per cycle and method other than the baseline, with method, cycle, density, seeds, difference,
            low and high. The difference is the mean over seeds of the method's accuracy minus the baseline's under the
            same seed. low and high bound its 95 % interval by Student's t; they are None with one seed. Each interval
            is for its row alone: there is no correction for several comparisons.
        dense: "sgd" and "swa" -> accuracy, accuracy_std and seeds of one dense particle with the same schedule.
        errors: one row per method and seed that failed, with method, seed and error.
        runs: (method, seed) -> the runs; an ensemble consists of several.
    """

    baseline: str
    rows: list[Row]
    summary: list[Row]
    paired: list[Row]
    dense: dict[str, Row]
    errors: list[Row]
    runs: dict[tuple[str, int], list[SweptRun]]

    def to_dict(self) -> dict[str, Any]:
        """All attributes except `runs`, by name, as values that JSON can hold."""
        return {name: value for name, value in vars(self).items() if name != "runs"}

    def table(self) -> str:
        """The last cycle as a text table, one line per method."""
        return comparison_table(self.summary, self.paired, self.baseline)

    def figure(self, path: str | Path) -> Path:
        """Draw accuracy over density, one line per method, with the spread over seeds.

        Raises ImportError without matplotlib, ValueError without accuracies.
        """
        lines: dict[str, list[Row]] = {}
        for row in self.summary:
            lines.setdefault(row["method"], []).append(row)
        return accuracy_of_points(lines, checked_path("path", path))


def rows_of(method: str, base: SwampConfig, problem: Problem, runs: Sequence[SweptRun]) -> list[Row]:
    """The rows of a method under one seed, one row per cycle of the base settings.

    A method that prunes in finer steps reports only every k-th of its own cycles, which has the base cycle's density.
    If StopRun ended a run, the cycles that it lacks have no rows.
    """
    config, every = problem.config, METHODS[method].every(base) if method in METHODS else 1
    results = [run.result for run in runs if run.result is not None]
    rows = []
    for cycle in range(0, min(len(result.history) for result in results), every):
        row = results[0].history[cycle]
        scores = {name: row.get(name) for name in ("accuracy", "loss", *problem.metrics)}
        if len(results) > 1:
            scores = ensemble_scores(problem, [result.at(cycle)[0] for result in results])
        trained = {0, cycle} if config.mask_from == "dense" else range(cycle + 1)
        epochs = config.ticket_epochs + config.epochs * sum(config.particles_at(number) for number in trained)
        rows.append(
            {
                "cycle": cycle // every,
                "density": statistics.fmean(result.history[cycle]["density"] for result in results),
                **scores,
                "particle_epochs": len(results) * epochs,
                "seconds": sum(result.history[number]["seconds"] for result in results for number in trained),
            }
        )
    return rows


@torch.no_grad()
def ensemble_scores(problem: Problem, models: Sequence[nn.Module]) -> dict[str, float | None]:
    """Accuracy, cross-entropy and metrics, on test data, of an ensemble: of the mean of its models' softmax outputs.

    All are None without test data or classes. The loss is also None if the problem's loss is not cross-entropy,
    because another loss may not accept probabilities.
    """
    if problem.test is None or not isinstance(problem.test.labels, Labels):
        return {"accuracy": None, "loss": None, **dict.fromkeys(problem.metrics)}
    models = [model.to(problem.device, problem.dtype) for model in models]
    keys = [problem.keys_of(0, number) for number in range(len(models))]
    meters = [Meter(name, metric, problem.device) for name, metric in problem.metrics.items()]
    correct, entries, loss = 0, 0, 0.0
    with generators_left_alone():
        batches = pass_in_stored_order(problem.test, problem.config.batch_size)
        for number, (inputs, targets, count) in enumerate(batches):
            time = evaluation_time(1, number)
            outputs = [
                problem.outputs(model, inputs, at_time(key, time)) for model, key in zip(models, keys, strict=True)
            ]
            softmax = torch.stack([output.double().softmax(1) for output in outputs]).mean(0)
            counted = problem.test.labels.counted(targets)
            correct += int(((softmax.argmax(1) == targets) & counted).sum())
            entries += int(counted.sum())
            for meter in meters:
                meter.update(ensemble_outputs(problem.test.labels, outputs, problem.dtype), targets, count)
            if problem.loss is cross_entropy:
                logs = softmax.clamp_min(torch.finfo(torch.float64).tiny).log()
                loss += float(problem.losses(logs, targets).mean()) * count
    mean = loss / problem.test.length if problem.loss is cross_entropy else None
    values = {meter.name: meter.value() for meter in meters}
    return {"accuracy": correct / entries if entries else None, "loss": mean, **values}


def accuracy_over_seeds(rows: Sequence[Row]) -> Row:
    """The number of seeds, and the mean and standard deviation of accuracy, both None without accuracies."""
    spread = spread_of("accuracy", rows) if rows else {}
    return {"seeds": len(rows), "accuracy": None, "accuracy_std": None} | spread


def summary_of(
    rows: Sequence[Row], references: Mapping[str, Mapping[int, Row]], metrics: Sequence[str] = ()
) -> list[Row]:
    """The rows of Comparison.summary, one per method and cycle.

    references  name of a dense reference -> seed -> row
    metrics     the names of the user's metrics
    """
    summary = []
    for (method, cycle), by_seed in _grouped(rows).items():
        group = list(by_seed.values())
        matching = {f"matching_{name}": _matches(by_seed, dense) for name, dense in references.items()}
        means = {
            name: statistics.fmean(row[name] for row in group) for name in ("density", "particle_epochs", "seconds")
        }
        losses: Row = {key: None for name in ("loss", *metrics) for key in (name, f"{name}_std")}
        for name in ("loss", *metrics):
            losses |= spread_of(name, group)
        summary.append({"method": method, "cycle": cycle, **accuracy_over_seeds(group), **losses, **matching, **means})
    return summary


def paired_differences(rows: Sequence[Row], baseline: str) -> list[Row]:
    """The rows of Comparison.paired: each method's difference from the baseline, over the seeds that both have."""
    groups, paired = _grouped(rows), []
    for (method, cycle), by_seed in groups.items():
        base = groups.get((baseline, cycle), {})
        seeds = [seed for seed in by_seed if seed in base]
        if method == baseline or not seeds or any(by_seed[seed]["accuracy"] is None for seed in seeds):
            continue
        differences = [by_seed[seed]["accuracy"] - base[seed]["accuracy"] for seed in seeds]
        mean, low, high = statistics.fmean(differences), None, None
        if len(seeds) > 1:
            half = half_width(differences)
            low, high = mean - half, mean + half
        density = statistics.fmean(base[seed]["density"] for seed in seeds)
        paired.append({"method": method, "cycle": cycle, "density": density, "seeds": len(seeds)})
        paired[-1] |= {"difference": mean, "low": low, "high": high}
    return paired


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, int], dict[int, Row]]:
    """Group rows as (method, cycle) -> seed -> row."""
    groups: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["cycle"]), {})[row["seed"]] = row
    return groups


def _matches(rows: Mapping[int, Row], dense: Mapping[int, Row]) -> bool | None:
    """Whether the mean accuracy is at least that of `dense`, over the seeds that both have; None without accuracies."""
    seeds = [seed for seed in rows if seed in dense]
    accuracy, reference = (accuracy_over_seeds([of[seed] for seed in seeds])["accuracy"] for of in (rows, dense))
    return None if accuracy is None or reference is None else accuracy >= reference
