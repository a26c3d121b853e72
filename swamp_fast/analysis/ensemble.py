"""How good is the ensemble of several models? Measures accuracy, likelihood and calibration of their mean softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import Analysis, Outputs
from swamp_fast.data.labels import Labels
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.particles.random import evaluation_time

BINS = 15  # number of confidence bins for the calibration error


@dataclass(frozen=True)
class Predictions:
    """The quality of a model's predictions on test data.

    nll  mean negative log-likelihood, with the natural logarithm
    ece  expected calibration error
    """

    accuracy: float
    nll: float
    ece: float


@dataclass(frozen=True)
class Ensemble(Predictions):
    """The quality of an ensemble's predictions, and of those of each of its models (`single`)."""

    single: list[Predictions]

    @property
    def mean_single(self) -> Predictions:
        """The means of accuracy, nll and ece over the models."""
        models = [(model.accuracy, model.nll, model.ece) for model in self.single]
        return Predictions(*(sum(values) / len(models) for values in zip(*models, strict=True)))


def ensemble(on: Analysis, states: Sequence[Mapping[str, Tensor]], *, reestimate: bool = True) -> Ensemble:
    """Evaluate, on test data, the mean of the models' softmax outputs, and each model alone.

    See Lakshminarayanan et al. 2017, arXiv 1612.01474. An ensemble costs one forward pass per model; an average of
    weights costs only one. Independent runs make a better ensemble than the particles of one ticket.

    Raises ValueError without test data or labels.
    """
    if on.test is None or not isinstance(on.test.labels, Labels):
        reason = "there is no test data" if on.test is None else on.test.labels
        raise ValueError(f"the accuracy of an ensemble needs test data with class labels, but {reason}.")
    data, rule, batch_size = on.test, on.test.labels, on.problem.config.batch_size

    def probabilities(run: Outputs, channels_last: bool) -> tuple[Tensor, list[Predictions]]:
        """The sum over some models of their softmax outputs [n, C], and the quality of each model's predictions."""
        batches = []
        for number, (inputs, targets, _) in enumerate(pass_in_stored_order(data, batch_size, channels_last)):
            outputs, counted = run(inputs, evaluation_time(1, number)), rule.counted(targets).flatten()
            batches.append(torch.stack([_rows(out).double().softmax(1)[counted] for out in outputs]).cpu())
        softmax = torch.cat(batches, 1)  # [M, n, C]
        return softmax.sum(0), [predictions(model, labels) for model in softmax]

    passed = pass_in_stored_order(data, batch_size)
    labels = torch.cat([targets[rule.counted(targets)].cpu() for _, targets, _ in passed])
    shares = torch.eye(len(states), dtype=torch.float64)
    chunks = on.measured([on.solution(state) for state in states], shares, probabilities, reestimate=reestimate)
    together = predictions(torch.stack([total for total, _ in chunks]).sum(0) / len(states), labels)
    return Ensemble(**vars(together), single=[model for _, models in chunks for model in models])


def predictions(probabilities: Tensor, targets: Tensor) -> Predictions:
    """Accuracy, likelihood and calibration of predicted probabilities [n, C], given labels [n].

    A sample's confidence is its largest probability. Samples are put into 15 bins (k / 15, (k + 1) / 15] by confidence.
    The calibration error is the mean over samples of |accuracy - confidence| of the sample's bin (Guo et al. 2017,
    arXiv 1706.04599). With few samples it is biased upwards.
    """
    confidence, labels = probabilities.max(1)
    right = (labels == targets).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence.double())
    likelihood = probabilities.gather(1, targets[:, None]).squeeze(1).clamp_min(torch.finfo(torch.float64).tiny)
    return Predictions(float(right.mean()), float(-likelihood.log().mean()), float(gaps.abs().sum()) / len(targets))


def _rows(outputs: Tensor) -> Tensor:
    """Reshape outputs [B, C, ...] to one row per prediction, [B * ..., C]."""
    return outputs.movedim(1, -1).flatten(0, -2)
