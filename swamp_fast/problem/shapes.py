"""Checks of the shapes that a model and a loss return. A shape that can be read in two ways is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.common.tree import tensors, tree_map

EXPLICIT_LOSS = 'lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none")'


def shapes_of(tree: Any) -> Any:
    """Return the tree with each tensor replaced by its shape, and other leaves by the names of their types."""
    return tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)


def are_logits(outputs: Any) -> bool:
    """Whether outputs have the form of logits, a floating-point tensor [B, classes, ...]."""
    return isinstance(outputs, Tensor) and outputs.dim() >= 2 and outputs.is_floating_point()


def class_axes(outputs: Tensor, targets: Tensor) -> tuple[bool, bool]:
    """Return whether labels [B, ...] fit outputs [B, classes, ...], and whether they fit outputs [B, ..., classes].

    Both are true for outputs [B, T, T] with labels [B, T]. For outputs [B, classes], only the first can be true.
    """
    first = targets.shape == outputs.shape[:1] + outputs.shape[2:]
    return first, outputs.dim() > 2 and targets.shape == outputs.shape[:-1]


def check_losses(losses: Any, outputs: Any, targets: Any, samples: int) -> None:
    """Raise ValueError unless a loss has the shape [B], or [B, ...] with the axes of the targets after the first."""
    allowed = {(samples,)} | {(samples, *leaf.shape[1:]) for leaf in tensors(targets)}
    if isinstance(losses, Tensor) and tuple(losses.shape) in allowed:
        return
    text = (
        f"`loss(outputs, targets)` must return one number per sample, [B] = [{samples}], or one per target, with the "
        f"targets' shape; got {shapes_of(losses)} from outputs {shapes_of(outputs)} and targets {shapes_of(targets)}"
    )
    if not isinstance(losses, Tensor) or losses.dim() == 0:
        raise ValueError(f'{text}. Use reduction="none".')
    if losses.shape[0] == samples and samples in losses.shape[1:]:
        raise ValueError(
            f"{text}. Each output was compared with every sample's target, by broadcasting. Give both the same shape, "
            "as with outputs.squeeze(1) or targets[:, None] in the `loss`."
        )
    raise ValueError(f'{text}. Use reduction="none", and average over other axes, as with .flatten(1).mean(1).')


def could_be_chance(losses: Tensor, outputs: Any, targets: Any) -> bool:
    """Whether a loss may have an allowed shape only because another axis is as long as the batch.

    A batch of another size then tells whether the shape is right.
    """
    samples = len(losses)
    others = {size for leaf in tensors((outputs, targets)) for size in leaf.shape[1:]}
    return samples in (losses.shape[1:] if losses.dim() > 1 else others)


def is_of_torch(loss: object) -> bool:
    """Whether a loss is torch's cross-entropy or negative log-likelihood, as a module or a partial of the function."""
    if isinstance(loss, partial):
        return loss.func in (F.cross_entropy, F.nll_loss)
    return isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)


def check_class_axis(outputs: Any, targets: Any) -> None:
    """Raise ValueError if two axes of outputs are equally long, so that either could be the classes of labels [B, ...].

    A user who writes a function for the loss has chosen the axis; torch's own losses take axis 1.
    """
    if are_logits(outputs) and isinstance(targets, Tensor) and all(class_axes(outputs, targets)):
        raise ValueError(
            f"the model's outputs {list(outputs.shape)} can be [B, classes, ...] or [B, ..., classes], because the "
            "axes are equally long. If the classes are on axis 1, pass the `loss` as a function of your own, such as "
            f"{EXPLICIT_LOSS}. If they are on the last axis, move them in your `forward`, as with "
            "outputs.movedim(-1, 1), and pass the same `loss`."
        )


def check_for_cross_entropy(outputs: Any, targets: Any) -> None:
    """Raise ValueError if outputs and targets have the wrong shapes for the default loss. No values are read."""
    if not are_logits(outputs):
        raise ValueError(
            f"the model's output must be a tensor [B, classes] for cross-entropy, got {shapes_of(outputs)}. Pass "
            "`forward(model, inputs)` that returns the logits, or a `loss` of your own."
        )
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return  # check_labels says what to do
    check_class_axis(outputs, targets)
    first, last = class_axes(outputs, targets)
    text = f"labels {list(targets.shape)} don't fit the model's outputs {list(outputs.shape)} in cross-entropy"
    if first:
        return
    if last:
        raise ValueError(
            f"{text}, which takes [B, classes, ...]. Here the classes are on the last axis, so pass "
            "forward=lambda model, inputs: model(inputs).movedim(-1, 1)."
        )
    if targets.shape == (len(outputs), 1):
        raise ValueError(f"{text}: they are a column. Pass targets.squeeze(1), one label per sample.")
    if targets.shape == outputs.shape:
        raise ValueError(f"{text}. If they are one-hot, pass targets.argmax(1), one label per sample.")
    expected = [*outputs.shape[:1], *outputs.shape[2:]]
    raise ValueError(f"{text}, which takes labels {expected}. Change one of them, or pass a `loss` of your own.")
