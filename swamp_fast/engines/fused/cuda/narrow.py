"""Removes dead channels from a plan: channels from which no path of kept weights leads to the output.

A dead channel doesn't affect the output, and the gradients of the weights that lead into it are exactly 0. So a plan
without it computes the same outputs and the same gradients, and the weights that lead into it still decay. A channel
that no kept weight leads into is not dead: its value is relu(bias), and the bias is trained. The running statistics of
dead channels are not updated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from swamp_fast.engines.fused.plan import Convolution, Norm, Plan, Pointwise, Pool
from swamp_fast.particles.layout import Layout

# A kernel is compiled for each number of channels, so the number is rounded up to a multiple: of 16 if the value has at
# most 64 channels, of 32 if it has at most 128, otherwise of LARGEST_MULTIPLE.
CHANNEL_MULTIPLES = {64: 16, 128: 32}
LARGEST_MULTIPLE = 64
MAX_KEPT_PRODUCTS = 0.85  # no channel is removed if more than this fraction of the products would remain


def narrow(plan: Plan, layout: Layout, mask: Tensor) -> tuple[Plan, list[Tensor]]:
    """Return the plan without the channels that are dead under a mask [Q], and each value's remaining channels.

    The remaining channels are a list of index tensors, by the value's number.
    """
    left = [_rounded(alive) for alive in _tied(plan, _alive(plan, layout, mask))]
    shapes = tuple((len(channels), *shape[1:]) for channels, shape in zip(left, plan.shapes, strict=True))
    narrowed = dataclasses.replace(plan, shapes=shapes)
    if _products(narrowed, layout) > MAX_KEPT_PRODUCTS * _products(plan, layout):
        return plan, [torch.arange(shape[0]) for shape in plan.shapes]
    return narrowed, left


def channels_left(plan: Plan, layout: Layout, mask: Tensor) -> tuple[tuple[int, ...], ...]:
    """The remaining channels of each value, as `narrow` returns them, in a form that can be compared and hashed."""
    return tuple(tuple(channels.tolist()) for channels in narrow(plan, layout, mask)[1])


def per_channel(plan: Plan, channels: Sequence[Tensor]) -> dict[str, Tensor]:
    """For each bias and each norm's weight, by name: the indices of the elements that belong to remaining channels."""
    return {
        name: channels[op.output]
        for op in plan.ops
        if isinstance(op, Convolution | Norm)
        for name in (op.bias, op.weight if isinstance(op, Norm) else None)
        if name is not None
    }


def norm_columns(plan: Plan, channels: Sequence[Tensor]) -> Tensor | None:
    """The indices of the remaining channels among the concatenated channels of all norms; None if all remain."""
    columns, begin = [], 0
    for op in plan.ops:
        if isinstance(op, Norm):
            columns.append(begin + channels[op.output])
            begin += plan.shapes[op.output][0]
    left = torch.cat(columns) if columns else torch.arange(0)
    return None if len(left) == begin else left


def _alive(plan: Plan, layout: Layout, mask: Tensor) -> list[Tensor]:
    """For each value a mask [channels] of the channels from which a path of kept weights leads to the output."""
    alive = [torch.zeros(shape[0], dtype=torch.bool) for shape in plan.shapes]
    alive[plan.output][:] = True
    entries = {entry.name: entry for entry in layout.entries}
    kept = torch.cat([mask.cpu(), torch.ones(layout.P - layout.Q, dtype=torch.bool)])
    for op in reversed(plan.ops):
        out = alive[op.output]
        if isinstance(op, Convolution) and op.groups == 1:
            entry = entries[op.weight]
            weight = kept[entry.begin : entry.begin + entry.size].view(*entry.shape[:2], -1)
            alive[op.inputs[0]] |= weight[out].any(2).any(0)
        elif isinstance(op, Norm | Pointwise | Pool):
            for value in op.inputs:
                alive[value] |= out
        else:
            for value in op.inputs:
                alive[value][:] = True
            out[:] = True
    return alive


def _tied(plan: Plan, alive: list[Tensor]) -> list[Tensor]:
    """The masks `alive`, merged over all values that must keep the same channels, such as the terms of a sum."""
    group = list(range(len(plan.shapes)))

    def root(value: int) -> int:
        return value if group[value] == value else root(group[value])

    for op in plan.ops:
        if isinstance(op, Norm | Pointwise | Pool):
            for value in op.inputs:
                group[root(value)] = root(op.output)
    union = {value: alive[value].clone() for value in range(len(group))}
    for value in range(len(group)):
        union[root(value)] |= alive[value]
    union[root(plan.input)][:] = True
    return [union[root(value)] for value in range(len(group))]


def _rounded(alive: Tensor) -> Tensor:
    """The indices of the channels that are alive, plus enough dead ones to reach a multiple, in ascending order."""
    channels, count = len(alive), int(alive.sum())
    multiple = next((multiple for limit, multiple in CHANNEL_MULTIPLES.items() if channels <= limit), LARGEST_MULTIPLE)
    wanted = min(channels, max(1, -(-count // multiple)) * multiple)
    dead = (~alive).nonzero().flatten()[: wanted - count]
    return torch.cat([alive.nonzero().flatten(), dead]).sort().values


def _products(plan: Plan, layout: Layout) -> int:
    """The number of multiplications in one sample's forward pass if all convolutions are dense."""
    entries = {entry.name: entry for entry in layout.entries}
    total = 0
    for op in plan.ops:
        if isinstance(op, Convolution):
            pixels = torch.Size(plan.shapes[op.output][1:]).numel()
            taps = torch.Size(entries[op.weight].shape[2:]).numel()
            inputs = plan.shapes[op.inputs[0]][0] // op.groups
            total += pixels * taps * inputs * plan.shapes[op.output][0]
    return total
