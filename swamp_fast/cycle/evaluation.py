"""Evaluates a cycle's average, its particles and their ensemble, and makes the cycle's row of the history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from swamp_fast.cycle.training import TrainingOutcome
from swamp_fast.data.labels import Labels, predicted
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.particles.random import evaluation_time
from swamp_fast.problem.metrics import Meter, MetricValues, ensemble_outputs, goodness, higher_is_better, keys_of
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.result import SCORES

# (inputs [B, ...], time) -> a list with the outputs of each particle and, last, of their average.
Outputs = Callable[[Any, int], list[Any]]


@dataclass(frozen=True)
class Scores:
    """The scores of a cycle on one split.

    Accuracies are fractions of the labels that the loss doesn't ignore, or None if the split has no labels.

    loss, accuracy      of the average, or with combine="best" of the best particle
    particle_accuracy   of each particle
    particle_loss       of each particle
    ensemble_accuracy   of the mean of the particles' softmax
    metrics             the values of the user's metrics, by name
    """

    loss: float
    accuracy: float | None
    particle_accuracy: list[float] | None
    particle_loss: list[float]
    ensemble_accuracy: float | None
    metrics: dict[str, MetricValues] = field(default_factory=dict)

    def best(self, problem: Problem) -> int:
        """Return the index of the best particle according to `select_by`; of equals, the first.

        Raises ValueError if that is the accuracy and no label of the split counts.
        """
        by, accuracy = problem.config.select_by, self.particle_accuracy
        if by in self.metrics:
            each = goodness(self.metrics[by].particles, higher_is_better(problem.metrics[by]))
        elif by == "accuracy" and accuracy is None:
            raise ValueError('`select_by` = "accuracy", but no label of the validation data counts.')
        elif by == "loss" or accuracy is None:
            each = goodness(self.particle_loss, False)
        else:
            each = goodness(accuracy, True)
        return max(range(len(each)), key=each.__getitem__)

    def of(self, particle: int) -> Scores:
        """Return these scores with those of one particle in place of the average's."""
        accuracy = None if self.particle_accuracy is None else self.particle_accuracy[particle]
        metrics = {name: replace(each, average=each.particles[particle]) for name, each in self.metrics.items()}
        return replace(self, loss=self.particle_loss[particle], accuracy=accuracy, metrics=metrics)


def evaluate(problem: Problem, outputs: Outputs, channels_last: bool = False) -> tuple[Scores | None, Scores | None]:
    """Return the scores on the test and the validation data; None for a split that the problem doesn't have."""
    test, val = (
        None if data is None else score(problem, outputs, data, split, channels_last)
        for split, data in ((1, problem.test), (2, problem.val))
    )
    return test, val


@torch.no_grad()
def score(problem: Problem, outputs: Outputs, data: Data, split: int, channels_last: bool = False) -> Scores:
    """Return the scores on the data of a split, which is 1 for test and 2 for val."""
    entries = ensemble = 0
    total: Tensor | float = 0.0
    correct: Tensor | int = 0
    metrics = _Metrics(problem, data)
    batches = pass_in_stored_order(data, problem.config.batch_size, channels_last)
    for number, (inputs, targets, count) in enumerate(batches):
        *particles, average = outputs(inputs, evaluation_time(split, number))
        losses = [problem.losses(each, targets).double().mean() for each in (*particles, average)]
        total = total + torch.stack(losses) * count
        if isinstance(data.labels, Labels):
            counted = data.labels.counted(targets)
            entries += int(counted.sum())
            right = [((predicted(out) == targets) & counted).sum() for out in (*particles, average)]
            correct = correct + torch.stack(right)
            together = torch.stack([out.double().softmax(1) for out in particles]).mean(0)
            ensemble += int(((predicted(together) == targets) & counted).sum())
        metrics.update(particles, average, targets, count)
    assert isinstance(total, Tensor)  # no split is empty
    *each_loss, loss = (total / data.length).tolist()
    if not isinstance(correct, Tensor) or entries == 0:
        return Scores(loss, None, None, each_loss, None, metrics.values())
    *each, average = (int(number) / entries for number in correct)
    return Scores(loss, average, each, each_loss, ensemble / entries, metrics.values())


class _Metrics:
    """Computes the metrics of the particles, their average and their ensemble over a split, batch by batch."""

    def __init__(self, problem: Problem, data: Data) -> None:
        self.problem, self.data = problem, data
        self.meters: dict[str, list[Meter]] = {}

    def update(self, particles: list[Any], average: Any, targets: Any, count: int) -> None:
        """Add the outputs for a batch of `count` samples."""
        if not self.problem.metrics:
            return
        models = [*particles, average, ensemble_outputs(self.data.labels, particles, self.problem.dtype)]
        for name, metric in self.problem.metrics.items():
            if name not in self.meters:
                self.meters[name] = [Meter(name, metric, self.data.device) for _ in models]
            for meter, outputs in zip(self.meters[name], models, strict=True):
                meter.update(outputs, targets, count)

    def values(self) -> dict[str, MetricValues]:
        """Return the metrics of all batches."""
        values = {name: [meter.value() for meter in meters] for name, meters in self.meters.items()}
        return {name: MetricValues(each[-2], each[:-2], each[-1]) for name, each in values.items()}


def score_row(problem: Problem, test: Scores | None, val: Scores | None) -> dict[str, Any]:
    """Return the scores for a cycle's row in the history.

    `best_accuracy` is the test accuracy of the particle that is best on validation data.
    """
    row: dict[str, Any] = dict.fromkeys(SCORES)
    if test is not None:
        row |= {
            "accuracy": test.accuracy,
            "loss": test.loss,
            "particle_accuracy": test.particle_accuracy,
            "particle_loss": test.particle_loss,
            "ensemble_accuracy": test.ensemble_accuracy,
        }
        if test.particle_accuracy is not None:
            row["mean_accuracy"] = sum(test.particle_accuracy) / len(test.particle_accuracy)
    if val is not None:
        row["val_accuracy"] = val.accuracy
        if val.particle_accuracy is not None:
            row["val_mean_accuracy"] = sum(val.particle_accuracy) / len(val.particle_accuracy)
        if val.particle_accuracy is not None and test is not None and test.particle_accuracy is not None:
            row["best_accuracy"] = test.particle_accuracy[val.best(problem)]
    for name in problem.metrics:
        both = [None if scores is None else scores.metrics[name] for scores in (test, val)]
        values = [value for each in both for value in ((None,) * 3 if each is None else astuple(each))]
        row |= dict(zip(keys_of(name), values, strict=True))
    return row


def history_row(
    problem: Problem, cycle: int, mask: Tensor, outcome: TrainingOutcome, scores: dict[str, Any]
) -> dict[str, Any]:
    """Return the history row of a cycle that trained under a mask [Q]; see SwampResult.history.

    The run adds the time, the memory and the warnings later.
    """
    kept = int(mask.sum())
    return {
        "cycle": cycle,
        "particles": outcome.count,
        "density": kept / problem.layout.weights,
        "kept": kept,
        "flops": problem.flops(mask),
        "train_loss": [outcome.losses[lane] for lane in outcome.left],
        "train_seconds": outcome.seconds,
        "dropped": [{"lane": lane, "epoch": epoch} for lane, epoch in sorted(outcome.dropped.items())],
        **scores,
    }
