"""Prediction ensembles: the softmax average of several models, and how well it is calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import Analysis, Outputs
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.particles.random import evaluation_time

BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Predictions:
    """Accuracy, mean negative log-likelihood (natural logarithm) and expected calibration error on test data."""

    accuracy: float
    nll: float
    ece: float


@dataclass(frozen=True)
class Ensemble(Predictions):
    """Of the ensemble, of each model (`single`), and their means (`mean_single`)."""

    single: list[Predictions]

    @property
    def mean_single(self) -> Predictions:
        """The mean over the models alone."""
        each = [(one.accuracy, one.nll, one.ece) for one in self.single]
        return Predictions(*(sum(values) / len(each) for values in zip(*each, strict=True)))


def ensemble(on: Analysis, states: Sequence[Mapping[str, Tensor]], *, reestimate: bool = True) -> Ensemble:
    """The mean of the models' softmax on test data, beside each model's own (Lakshminarayanan et al. 2017, 1612.01474).

    An ensemble costs as many forwards as it has models; the average of weights costs one. Independent runs (other
    tickets) make a better ensemble than particles of one. Raises ValueError without test data or labels.
    """
    if on.test is None or not on.problem.classifies:
        raise ValueError("an ensemble's accuracy needs test data with labels of the model's outputs.")
    data, batch_size = on.test, on.problem.config.batch_size

    def probabilities(run: Outputs, channels_last: bool) -> tuple[Tensor, list[Predictions]]:
        """The sum of a chunk's softmax [n, C], and each model's predictions."""
        chunk = []
        for number, (inputs, _, _) in enumerate(pass_in_stored_order(data, batch_size, channels_last)):
            outputs = run(inputs, evaluation_time(1, number))
            chunk.append(torch.stack([_rows(out).double().softmax(1) for out in outputs]).cpu())
        every = torch.cat(chunk, 1)
        return every.sum(0), [predictions(own, targets) for own in every]

    targets = torch.cat([each.flatten().cpu() for _, each, _ in pass_in_stored_order(data, batch_size)])
    shares = torch.eye(len(states), dtype=torch.float64)
    found = on.measured([on.solution(state) for state in states], shares, probabilities, reestimate=reestimate)
    together = predictions(torch.stack([own for own, _ in found]).sum(0) / len(states), targets)
    single: list[Any] = [each for _, singles in found for each in singles]
    return Ensemble(**vars(together), single=single)


def predictions(probabilities: Tensor, targets: Tensor) -> Predictions:
    """Of probabilities [n, C] and labels [n].

    The calibration error is the mean over samples of |accuracy - confidence| of their bin, of 15 bins
    (k / 15, (k + 1) / 15] of the confidence, which is the largest probability (Guo et al. 2017, arXiv 1706.04599). Few
    samples bias it upwards.
    """
    confidence, labels = probabilities.max(1)
    right = (labels == targets).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence.double())
    likelihood = probabilities.gather(1, targets[:, None]).squeeze(1).clamp_min(torch.finfo(torch.float64).tiny)
    return Predictions(float(right.mean()), float(-likelihood.log().mean()), float(gaps.abs().sum()) / len(targets))


def _rows(outputs: Tensor) -> Tensor:
    """[B, C, ...] -> [B * ..., C]."""
    return outputs.movedim(1, -1).flatten(0, -2)
