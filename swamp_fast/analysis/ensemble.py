"""How good is the ensemble of several models? Measures accuracy, likelihood and calibration of their mean softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.analysis.evaluator import Analysis, Outputs, checked_states
from swamp_fast.common.checked import checked
from swamp_fast.common.format import dtype_name
from swamp_fast.data.labels import Labels
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.particles.random import evaluation_time

BINS = 15  # number of confidence bins for the calibration error
MAX_SUM_ERROR = 0.02  # by which probabilities, rounded to bfloat16, may miss a sum of 1
LABEL_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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

    Raises ValueError without test data, labels or states, TypeError or ValueError for a state that doesn't fit the
    model.
    """
    states = checked_states(on, states)
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
        return softmax.sum(0), [_quality(model, labels) for model in softmax]

    passed = pass_in_stored_order(data, batch_size)
    labels = torch.cat([targets[rule.counted(targets)].cpu() for _, targets, _ in passed])
    shares = torch.eye(len(states), dtype=torch.float64)
    chunks = on.measured([on.solution(state) for state in states], shares, probabilities, reestimate=reestimate)
    together = _quality(torch.stack([total for total, _ in chunks]).sum(0) / len(states), labels)
    return Ensemble(**vars(together), single=[model for _, models in chunks for model in models])


def predictions(probabilities: Tensor, targets: Tensor) -> Predictions:
    """Accuracy, likelihood and calibration of predicted probabilities [n, C], given labels [n].

    A sample's confidence is its largest probability. Samples are put into 15 bins (k / 15, (k + 1) / 15] by confidence.
    The calibration error is the mean over samples of |accuracy - confidence| of the sample's bin (Guo et al. 2017,
    arXiv 1706.04599). With few samples it is biased upwards.

    Raises TypeError for tensors of another type, and ValueError for another shape, for rows that are not probabilities,
    such as logits, and for labels outside [0, C).
    """
    _check_probabilities(checked("probabilities", probabilities, Tensor))
    n, classes = probabilities.shape
    if checked("targets", targets, Tensor).dtype not in LABEL_TYPES:
        raise TypeError(f"`targets` must be a tensor of integers, got {dtype_name(targets.dtype)}.")
    if targets.shape != (n,):
        raise ValueError(f"`targets` must have one label per row, [{n}]; got shape {list(targets.shape)}.")
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(f"`targets` must lie in [0, {classes - 1}], got {int(targets.min())} … {int(targets.max())}.")
    return _quality(probabilities, targets.long())


def _check_probabilities(probabilities: Tensor) -> None:
    """Raise TypeError or ValueError unless every row [C] of a tensor [n, C] is a distribution."""
    if not probabilities.is_floating_point():
        raise TypeError(f"`probabilities` must be floating-point numbers, got {dtype_name(probabilities.dtype)}.")
    if probabilities.dim() != 2 or probabilities.numel() == 0:
        raise ValueError(f"`probabilities` must have shape [n, C], got {list(probabilities.shape)}.")
    sums = probabilities.double().sum(1)
    if bool((probabilities < 0).any()) or not bool(((sums - 1).abs() <= MAX_SUM_ERROR).all()):
        raise ValueError(
            "`probabilities` must be at least 0, and each row must add up to 1; of logits take softmax(1)."
        )


def _quality(probabilities: Tensor, targets: Tensor) -> Predictions:
    """The quality of probabilities [n, C], given labels [n]."""
    confidence, labels = probabilities.max(1)
    right = (labels == targets).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence.double())
    likelihood = probabilities.gather(1, targets[:, None]).squeeze(1).clamp_min(torch.finfo(torch.float64).tiny)
    return Predictions(float(right.mean()), float(-likelihood.log().mean()), float(gaps.abs().sum()) / len(targets))


def _rows(outputs: Tensor) -> Tensor:
    """Reshape outputs [B, C, ...] to one row per prediction, [B * ..., C]."""
    return outputs.movedim(1, -1).flatten(0, -2)
