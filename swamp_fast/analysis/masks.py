"""What do masks look like? The overlap of two masks, the density of each layer, and dead channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from swamp_fast.analysis.evaluator import Analysis
from swamp_fast.common.checked import checked
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.engines.fused.plan import Concatenate, Convolution, Flatten, Plan
from swamp_fast.engines.fused.trace import NotCovered, plan_of
from swamp_fast.problem.checks import check_masks
from swamp_fast.runs.result import SwampResult

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Overlap:
    """How similar two masks are.

    hamming               fraction of weights that exactly one of the masks keeps
    iou                   number of weights kept by both / kept by at least one; 1 if both masks are empty
    density_a, density_b  fraction of weights that each mask keeps
    """

    hamming: float
    iou: float
    density_a: float
    density_b: float


@dataclass(frozen=True)
class MaskOverlap(Overlap):
    """The overlap of two masks over all layers together, and by layer."""

    layers: dict[str, Overlap]


@dataclass(frozen=True)
class Channels:
    """Counts of a layer's output channels.

    channels  all output channels
    dead_in   channels without any kept incoming weight
    dead_out  channels without any kept outgoing weight; None if it is unknown which layers read the channels
    """

    channels: int
    dead_in: int
    dead_out: int | None


def mask_overlap(a: Masks, b: Masks) -> MaskOverlap:
    """How similar two masks are, in total and by layer: for example those of IMP and SWAMP at equal density.

    Two random masks of density d have a Hamming distance of 2 d (1 - d) and an IoU of d / (2 - d) on average. So masks
    of denser layers overlap more by chance.

    Raises TypeError for masks that aren't bool tensors, ValueError if the masks are of different layers or shapes.
    """
    for argument, masks in (("a", a), ("b", b)):
        _check_own(argument, masks)
    differing = [name for name in {**a, **b} if name not in a or name not in b or a[name].shape != b[name].shape]
    if differing or not a:
        raise ValueError(
            "`a` and `b` must be masks of the same layers and shapes; "
            f"{'differing: ' + ', '.join(differing) if differing else 'there are no layers'}."
        )
    layers = {name: _overlap(a[name].flatten(), b[name].flatten()) for name in a}
    whole = _overlap(*(torch.cat([masks[name].flatten() for name in a]) for masks in (a, b)))
    return MaskOverlap(**vars(whole), layers=layers)


def densities(masks: Masks) -> dict[str, float]:
    """The fraction of weights that each layer keeps. Raises TypeError for masks that aren't bool tensors."""
    _check_own("masks", masks)
    return {name: float(mask.double().mean()) for name, mask in masks.items()}


def channels(masks: Masks | SwampResult, on: Analysis | None = None) -> dict[str, Channels]:
    """Count dead output channels of each pruned convolution and linear layer.

    A channel without kept incoming weights is constant, and a channel without kept outgoing weights is never read; both
    could be removed. Weights that are not prunable count as kept. Masks are [out, in, ...].

    Pass `on` to count channels that are never read, for which the model must be traced, and if the model has transposed
    convolutions, whose masks are [in, out / groups, ...] and look like those of other layers.

    Raises TypeError for masks that aren't bool tensors, and ValueError for masks that don't fit the model of `on`.
    """
    masks = masks.masks if isinstance(masks, SwampResult) else masks
    _check_own("masks", masks)
    if on is not None:
        checked("on", on, Analysis).mask(masks)
    read = {} if on is None else _channels_read(on, masks)
    by_output = masks if on is None else {**masks, **_transposed(on, masks)}
    counts = {}
    for name, mask in by_output.items():
        rows = mask.flatten(1) if mask.dim() > 1 else mask.flatten()[:, None]
        counts[name] = Channels(
            len(rows), int((~rows.any(1)).sum()), int((~read[name]).sum()) if name in read else None
        )
    return counts


def _check_own(argument: str, masks: Masks) -> None:
    """Raise TypeError or ValueError unless masks are a dict of bool tensors that have entries."""
    check_masks(argument, masks, masks)
    empty = [name for name, mask in masks.items() if not mask.numel()]
    if empty:
        raise ValueError(f'`{argument}`: "{empty[0]}" is a mask without entries; leave it out.')


def _transposed(on: Analysis, masks: Masks) -> dict[str, Tensor]:
    """The masks of transposed convolutions, with their dimensions rearranged to [out, in / groups, ...]."""
    names = {id(parameter): name for name, parameter in on.problem.template.named_parameters()}
    layers = [module for module in on.problem.template.modules() if isinstance(module, _ConvTransposeNd)]
    groups = {names.get(id(layer.weight), ""): layer.groups for layer in layers}
    return {
        name: mask.unflatten(0, (groups[name], -1)).transpose(1, 2).flatten(0, 1)
        for name, mask in masks.items()
        if name in groups
    }


def _overlap(a: Tensor, b: Tensor) -> Overlap:
    both, either = int((a & b).sum()), int((a | b).sum())
    iou = both / either if either else 1.0
    return Overlap((either - both) / len(a), iou, int(a.sum()) / len(a), int(b.sum()) / len(b))


def _channels_read(on: Analysis, masks: Masks) -> dict[str, Tensor]:
    """Which output channels [C] bool of each layer are read, by a kept weight or as outputs of the model.

    Returns {} if the model can't be traced.
    """
    inputs, _, _ = next(pass_in_stored_order(on.train, on.problem.config.batch_size))
    try:
        plan = plan_of(on.problem.template, on.problem.forward, inputs)
    except NotCovered:
        return {}
    whole = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in on.problem.template.named_parameters()}
    values = _values_read(plan, {**whole, **masks})
    return {op.weight: values[op.output] for op in plan.ops if isinstance(op, Convolution)}


def _values_read(plan: Plan, masks: Masks) -> list[Tensor]:
    """Which channels [C] bool of each value in the plan are read. Goes backwards from the model's output."""
    read = [torch.zeros(shape[0], dtype=torch.bool) for shape in plan.shapes]
    read[plan.output][:] = True
    for op in reversed(plan.ops):
        used = read[op.output]
        if isinstance(op, Convolution):
            kept = masks[op.weight].cpu().unflatten(0, (op.groups, -1)).transpose(1, 2)  # [groups, in, out, ...]
            read[op.inputs[0]] |= kept.flatten(2).any(2).flatten()
        elif isinstance(op, Concatenate):
            for value, part in zip(op.inputs, used.split([len(read[value]) for value in op.inputs]), strict=True):
                read[value] |= part
        elif isinstance(op, Flatten):
            read[op.inputs[0]] |= used.view(len(read[op.inputs[0]]), -1).any(1)
        else:
            for value in op.inputs:
                read[value] |= used
    return read
