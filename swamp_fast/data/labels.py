"""Which targets of a split are class labels, and which of them count in accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.format import dtype_name

PROBABILITY_TOLERANCE = 1e-3  # by which the sum of a sample's class probabilities may differ from 1


@dataclass(frozen=True)
class Labels:
    """The labels [B, ...] of outputs [B, classes, ...].

    ignored  the labels that the loss ignores
    """

    classes: int
    ignored: tuple[int, ...] = ()

    def counted(self, targets: Tensor) -> Tensor:
        """Return where targets count in accuracies: where they are labels of a class that the loss doesn't ignore."""
        counts = (targets >= 0) & (targets < self.classes)
        for label in self.ignored:
            counts &= targets != label
        return counts


def predicted(outputs: Tensor) -> Tensor:
    """Return the class [B, ...] with the largest output [B, classes, ...], or -1, no label, where an output is NaN."""
    return outputs.argmax(1).masked_fill(outputs.isnan().any(1), -1)


def check_labels(name: str, targets: Any, classes: int) -> None:
    """Raise TypeError or ValueError for targets that cross-entropy can't take.

    It takes integers in [0, classes), or floating-point probabilities [n, classes, ...].
    """
    if isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape[1:2] == (classes,):
        _check_probabilities(name, targets)
        return
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        kind = dtype_name(targets.dtype) if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(
            f"{name}: cross-entropy needs integer labels, got {kind}. Convert them with .long(), or pass a `loss` "
            "that takes such targets."
        )
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= classes:
        ignored = (
            ' Or pass loss=nn.CrossEntropyLoss(reduction="none"), which ignores samples with the label -100.'
            if low == -100
            else ""
        )
        raise ValueError(
            f"{name}: labels must lie in [0, {classes}), because the model has {classes} outputs; got {low} … {high}. "
            f"Number the classes from 0, or give the model one output per class.{ignored}"
        )


def _check_probabilities(name: str, targets: Tensor) -> None:
    sums = targets.sum(1)
    off = (sums - 1).abs().amax() > PROBABILITY_TOLERANCE
    if bool(off) or bool((targets < 0).any()) or not bool(torch.isfinite(sums).all()):
        raise ValueError(
            f"{name}: cross-entropy takes floating-point targets {list(targets.shape)} as the probabilities of the "
            f"classes, but they are not all at least 0 with sum 1: their sums are {float(sums.min()):g} … "
            f"{float(sums.max()):g}. Pass a `loss` that takes such targets."
        )
