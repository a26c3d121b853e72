"""Decides, before anything is trained, whether a split has accuracies and which of its labels count."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.format import dtype_name
from swamp_fast.config import SwampConfig
from swamp_fast.data.labels import Labels
from swamp_fast.data.store import Data, Stored, Streamed
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.problem.arguments import BatchTransform, Forward, Loss, cross_entropy
from swamp_fast.problem.checks import particle_of
from swamp_fast.problem.probe import MAX_SAMPLES, MISFITS, Trial
from swamp_fast.problem.shapes import are_logits, class_axes, is_of_torch, shapes_of

MAX_TESTED = 1 << 26  # numbers in the outputs on which a loss is run to find the labels that it ignores
# The logits at which a label is tested. One isn't enough: a loss with a margin is constant at high logits, a clamped
# loss at low ones.
LEVELS = (-5.0, 0.0, 5.0)


def decide_labels(
    template: nn.Module,
    splits: Mapping[str, Data],
    config: SwampConfig,
    forward: Forward,
    loss: Loss,
    transform: BatchTransform | None,
) -> None:
    """Run a copy of the model, as in evaluation, on a few samples of each split, and set the split's `labels`.

    Evaluation on train uses the targets as they are read. They need not be labels, because the transform may make
    labels of them.

    Raises ValueError if the model, the loss and the data of val or test don't fit together. The data of train need not
    fit, because no run evaluates on them.
    """
    for name, data in splits.items():
        keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
        trial = Trial(data, min(MAX_SAMPLES, data.length, config.batch_size), keys, forward, loss, None)
        try:
            data.labels = labels_of(data, trial, evaluated(particle_of(template).eval(), trial))
        except (TypeError, ValueError) as error:
            if name != "train":
                raise type(error)(f"in evaluation on `{name}`, {error}") from error
            data.labels = f"in evaluation, {error}"
        if name == "train" and isinstance(data, Streamed) and transform is not None and transform.takes_targets:
            data.classes = None


def accuracy_lines(name: str, data: Data) -> list[str]:
    """Return the console's lines on a split that has no accuracies, or has labels that don't count in them."""
    if isinstance(data.labels, str):
        return [f"accuracy none on {name}: {data.labels}"]
    if data.labels.ignored:
        ignored = ", ".join(str(label) for label in data.labels.ignored)
        return [f"accuracy on {name} without the labels that the loss ignores: {ignored}"]
    return []


def evaluated(model: nn.Module, trial: Trial) -> Any:
    """Return the outputs of a model in eval mode on a trial's batch."""
    with torch.no_grad(), generators_left_alone(), DropoutStream(trial.keys):
        outputs, _ = trial.run(model)
        trial.confirm(model)
    return outputs


def labels_of(data: Data, trial: Trial, outputs: Any) -> Labels | str:
    """Return which labels count in a split's accuracies, or the reason why it has no accuracies.

    All stored labels are tested. Streamed labels aren't known beforehand, so the labels of all classes are tested; any
    others that appear later don't count.

    trial    a batch of the split
    outputs  the model's outputs on this batch in evaluation
    """
    targets = trial.targets
    reason = _why_not_labels(outputs, targets) or _why_not_axis_1(trial.loss, outputs, targets)
    if reason is not None:
        return reason
    classes = outputs.shape[1]
    known = data.targets if isinstance(data, Stored) else _every_label(targets, classes)
    with generators_left_alone():
        ignored = _ignored(trial.loss, outputs, targets, *known.unique(return_counts=True))
    labels = Labels(classes, ignored)
    outside = (known < 0) | (known >= classes)
    for label in ignored:
        outside &= known != label
    if bool(outside.any()):
        low, high = (int(bound) for bound in known.aminmax())
        return f"the targets are integers from {low} to {high}, not labels in [0, {classes})"
    if not bool(labels.counted(known).any()):
        return "the loss ignores all labels"
    return labels


def _every_label(targets: Tensor, classes: int) -> Tensor:
    """Return the targets, followed by the labels of all classes."""
    return torch.cat([targets.flatten(), torch.arange(classes, device=targets.device)])


def _why_not_labels(outputs: Any, targets: Any) -> str | None:
    """Return why targets aren't the labels of outputs, judged by types and shapes; None if they are."""
    if not are_logits(outputs):
        return f"the model's outputs in evaluation are {shapes_of(outputs)}, not one tensor [B, classes, ...]"
    if outputs.shape[1] < 2:
        return f"the model's outputs {list(outputs.shape)} are not the logits of two or more classes"
    if not isinstance(targets, Tensor):
        return f"the targets are {shapes_of(targets)}, not one tensor of labels"
    if targets.dtype != torch.int64:
        return f"the targets are {list(targets.shape)} {dtype_name(targets.dtype)}, not integer labels"
    first, last = class_axes(outputs, targets)
    shapes = f"the targets are {list(targets.shape)} and the outputs {list(outputs.shape)}"
    if not first:
        hint = "; to count accuracies, return [B, classes, ...] from `forward`" if last else ""
        return f"{shapes}, not labels [B, ...] of outputs [B, classes, ...]{hint}"
    return None


def _why_not_axis_1(loss: Loss, outputs: Tensor, targets: Tensor) -> str | None:
    """Return why axis 1 of outputs may not hold the classes, although labels fit it; None if it holds them.

    If labels fit the last axis, too, the loss tells: if axis 1 holds the classes, the losses of the labels [..., 0]
    depend on the outputs [..., 0] alone.
    """
    if not class_axes(outputs, targets)[1]:
        return None
    tested = outputs.detach().clone().requires_grad_()
    with torch.enable_grad(), generators_left_alone():
        losses = copy.deepcopy(loss)(tested.clone(), targets)
    if losses.shape == targets.shape:
        used = torch.autograd.grad(losses[..., 0].sum(), tested)[0] != 0
        if bool(used.any()) and not bool(used[..., 1:].any()):
            return None
    return (
        f"the outputs {list(outputs.shape)} aren't known to be [B, classes, ...]; return that from `forward`, and one "
        "loss per label from `loss`"
    )


def _ignored(loss: Loss, outputs: Tensor, targets: Tensor, values: Tensor, counts: Tensor) -> tuple[int, ...]:
    """Return the labels that a loss ignores.

    A loss may name the label in an attribute `ignore_index`, as nn.CrossEntropyLoss does. Otherwise the loss is run,
    and the ignored labels are those for which it has no gradient.

    values, counts  [K]  the labels of the split, and how often they occur
    """
    if loss is cross_entropy:
        return ()
    given = getattr(loss, "ignore_index", None)
    if isinstance(loss, partial) and is_of_torch(loss):
        given = loss.keywords.get("ignore_index", -100)
    if isinstance(given, int):
        return (given,)
    most_frequent = values[counts.argsort(descending=True, stable=True)]
    try:
        return tuple(_without_gradient(copy.deepcopy(loss), outputs, targets, most_frequent))
    except MISFITS:  # the loss accepts only the targets that belong to the outputs, so it can't be tested
        return ()


def _without_gradient(loss: Loss, outputs: Tensor, targets: Tensor, values: Tensor) -> list[int]:
    """Return the labels among `values` [K] for which a loss has no gradient, whatever the outputs are."""
    found: list[int] = []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype).to(outputs.device)
    for labels in values[: max(MAX_TESTED // outputs.numel(), 1) * targets.numel()].split(targets.numel()):
        tested = labels.repeat(-(-targets.numel() // len(labels)))[: targets.numel()].view_as(targets)
        index = tested.clamp(0, outputs.shape[1] - 1)[:, None]
        used = torch.zeros_like(tested, dtype=torch.bool)
        for level in LEVELS:
            outputs_at = noise.scatter(1, index, level).requires_grad_()
            with torch.enable_grad():
                losses = loss(outputs_at.clone(), tested)
            # A mean over the labels that aren't ignored is 0 / 0 if all labels are ignored.
            grads = torch.autograd.grad(losses.sum(), outputs_at)[0].nan_to_num()
            used |= (grads != 0).any(1)
        found += labels[~torch.isin(labels, tested[used].unique())].tolist()
    return sorted(found)
