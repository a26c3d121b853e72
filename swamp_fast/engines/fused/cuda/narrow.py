"""A plan without dead channels: those from which no kept weight leads to the output.

Such a channel's value reaches nothing, and the gradient of all that leads into it is exactly 0, so that skipping it
changes neither outputs nor other gradients; its weights still decay. One with no weight leading into it is no such
channel: it still sends relu(bias), and the bias trains. The running statistics of dead channels are not kept up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from swamp_fast.engines.fused.plan import Convolution, Norm, Plan, Pointwise, Pool
from swamp_fast.particles.layout import Layout

MULTIPLES = {64: 16, 128: 32}  # of how many channels, up to so many: kernels are compiled for each number
WIDE = 64  # and beyond
MAX_KEPT_PRODUCTS = 0.85  # of the products: more than that left, nothing is skipped


def narrow(plan: Plan, layout: Layout, mask: Tensor) -> tuple[Plan, list[Tensor]]:
    """The plan without dead channels under a mask [Q], and which channels are left of each value, by its number."""
    left = [_rounded(each) for each in _tied(plan, _alive(plan, layout, mask))]
    shapes = tuple((len(each), *shape[1:]) for each, shape in zip(left, plan.shapes, strict=True))
    narrowed = dataclasses.replace(plan, shapes=shapes)
    if _products(narrowed, layout) > MAX_KEPT_PRODUCTS * _products(plan, layout):
        return plan, [torch.arange(shape[0]) for shape in plan.shapes]
    return narrowed, left


def per_channel(plan: Plan, channels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of each bias, and weight of a norm, by name: which of its numbers belong to channels that are left."""
    return {
        name: channels[op.output]
        for op in plan.ops
        if isinstance(op, Convolution | Norm)
        for name in (op.bias, op.weight if isinstance(op, Norm) else None)
        if name is not None
    }


def norm_columns(plan: Plan, channels: Sequence[Tensor]) -> Tensor | None:
    """Which of all norms' channels, one norm after the other, are left; None if all are."""
    columns, begin = [], 0
    for op in plan.ops:
        if isinstance(op, Norm):
            columns.append(begin + channels[op.output])
            begin += plan.shapes[op.output][0]
    found = torch.cat(columns) if columns else torch.arange(0)
    return None if len(found) == begin else found


def _alive(plan: Plan, layout: Layout, mask: Tensor) -> list[Tensor]:
    """Of each value, which channels lead to the output."""
    alive = [torch.zeros(shape[0], dtype=torch.bool) for shape in plan.shapes]
    alive[plan.output][:] = True
    entries = {entry.name: entry for entry in layout.entries}
    there = torch.cat([mask.cpu(), torch.ones(layout.P - layout.Q, dtype=torch.bool)])
    for op in reversed(plan.ops):
        own = alive[op.output]
        if isinstance(op, Convolution) and op.groups == 1:
            entry = entries[op.weight]
            weight = there[entry.begin : entry.begin + entry.size].view(*entry.shape[:2], -1)
            alive[op.inputs[0]] |= weight[own].any(2).any(0)
        elif isinstance(op, Norm | Pointwise | Pool):
            for value in op.inputs:
                alive[value] |= own
        else:
            for value in op.inputs:
                alive[value][:] = True
            own[:] = True
    return alive


def _tied(plan: Plan, alive: list[Tensor]) -> list[Tensor]:
    """Of each value, the channels that it or another has which is of the same channels."""
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
    """The channels alive and as many others as make a number that kernels take, in order."""
    channels, count = len(alive), int(alive.sum())
    step = next((step for most, step in MULTIPLES.items() if channels <= most), WIDE)
    wanted = min(channels, max(1, -(-count // step)) * step)
    dead = (~alive).nonzero().flatten()[: wanted - count]
    return torch.cat([alive.nonzero().flatten(), dead]).sort().values


def _products(plan: Plan, layout: Layout) -> int:
    """Multiplications of a sample's forward pass, dense."""
    entries = {entry.name: entry for entry in layout.entries}
    total = 0
    for op in plan.ops:
        if isinstance(op, Convolution):
            pixels = torch.Size(plan.shapes[op.output][1:]).numel()
            taps = torch.Size(entries[op.weight].shape[2:]).numel()
            inputs = plan.shapes[op.inputs[0]][0] // op.groups
            total += pixels * taps * inputs * plan.shapes[op.output][0]
    return total
