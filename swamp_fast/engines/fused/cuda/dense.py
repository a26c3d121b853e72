"""Expands a compact bank to dense weights for matrix products, and collects their gradients in compact form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.plan import Convolution, Plan
from swamp_fast.ops.contracts import triton_kernels
from swamp_fast.particles.layout import ALIGNMENT


@dataclass(frozen=True)
class Place:
    """Where a convolution's weights are in a dense row. They are stored twice, in the two orders that kernels read."""

    forward: int  # where the weights begin in the order [groups, taps, in, out], for the forward pass
    by_input: int  # where the weights begin in the order [groups, taps, out, in], for the input gradient
    size: int  # number of weights in each order
    kernel: tuple[int, int]  # height and width


class DenseWeights:
    """Converts compact rows [L, P'] of R runs to dense rows [L, T], in which pruned weights are 0.

    index     [R, T]  int32, the index in a compact row of each number of a dense row; -1 for a pruned weight or padding
    places    where each convolution's weights are in a dense row, by the number of its output
    """

    def __init__(self, plan: Plan, compacts: Sequence[Compact], channels: Sequence[Tensor]) -> None:
        """Build the index; `channels` lists the channels of each value that narrow.narrow left in the plan."""
        self.compacts = compacts
        self.places: dict[int, Place] = {}
        self.index = torch.stack([self._row(plan, compact, channels) for compact in compacts]).int()

    def _row(self, plan: Plan, compact: Compact, channels: Sequence[Tensor]) -> Tensor:
        """Build one run's row of the index, and `places`, which are the same for all runs."""
        entries = {entry.name: entry for entry in compact.layout.entries}
        rows: list[Tensor] = []
        length = 0
        for op in plan.ops:
            if not isinstance(op, Convolution):
                continue
            entry = entries[op.weight]
            shape = entry.shape if len(entry.shape) == 4 else (*entry.shape, 1, 1)
            where = compact.where[entry.begin : entry.end].view(*shape[:2], -1)
            if op.groups == 1:
                left = [channels[value].to(where.device) for value in (op.output, op.inputs[0])]
                where = where[left[0]][:, left[1]]
            where = where.view(op.groups, where.shape[0] // op.groups, where.shape[1], -1)
            begins = []
            for axes in ((0, 3, 2, 1), (0, 3, 1, 2)):
                begins.append(length)
                row = where.permute(axes).flatten()
                rows.append(torch.nn.functional.pad(row, (0, -len(row) % ALIGNMENT), value=-1))
                length += len(rows[-1])
            self.places[op.output] = Place(begins[0], begins[1], where.numel(), (shape[2], shape[3]))
        return torch.cat([*rows, compact.where.new_zeros(0)])

    def expand(self, weights: Tensor, run_of_lane: Tensor, out: Tensor) -> None:
        """Write the compact weights [L, P'] into the dense rows `out` [L, T], converted to the type of `out`."""
        triton_kernels("compact").expand_weights(weights, self.index, run_of_lane, out)


class Gradients:
    """Tables that locate each weight's gradient among the partial sums of all layers.

    The kernels sum each convolution's weight gradient in several parts. Each lane has one row with all parts of all
    layers, so the rows are [L, length].

    splits  the number of parts of each convolution, by the number of its output; it depends only on the sizes
    first   where the parts of each convolution begin in a row
    length  the length of a row
    base    [R, P']  where the first part of a weight's gradient is in a row; -1 if the weight has no dense gradient
    step    [R, P']  the distance from one part of a weight's gradient to the next
    parts   [R, P']  how many parts a weight's gradient has
    """

    def __init__(self, dense: DenseWeights, splits: dict[int, int]) -> None:
        compacts = dense.compacts
        self.splits = splits
        self.first, self.length = begins_of({output: place.size for output, place in dense.places.items()}, splits)
        shape, device = (len(compacts), compacts[0].P), dense.index.device
        self.base = torch.full(shape, -1, dtype=index_type(self.length), device=device)
        self.step, self.parts = torch.zeros(2, *shape, dtype=torch.int32, device=device)
        for output, place in dense.places.items():
            index = dense.index[:, place.forward : place.forward + place.size]
            run, column = (index >= 0).nonzero(as_tuple=True)
            where = index[run, column].long()
            self.base[run, where] = (self.first[output] + column).to(self.base.dtype)
            self.step[run, where], self.parts[run, where] = place.size, splits[output]

    def collect(self, partial: Tensor, run_of_lane: Tensor, grads: Tensor) -> None:
        """Sum the parts of each weight's gradient in `partial` [L, length], and add the sums to grads [L, P']."""
        tables = self.base, self.step, self.parts
        triton_kernels("compact").collect_gradients(partial, *tables, run_of_lane, grads)


def begins_of(sizes: dict[int, int], splits: dict[int, int]) -> tuple[dict[int, int], int]:
    """Return where each layer's parts begin in a row that holds all layers' parts, and the length of that row.

    sizes   the number of weights of each layer, by its number
    splits  the number of parts of each layer
    """
    first, length = {}, 0
    for layer, size in sizes.items():
        first[layer] = length
        length += size * splits[layer]
    return first, length


def index_type(length: int) -> torch.dtype:
    """The smallest integer type for indices into a row of this length; the kernel computes its indices in it."""
    return torch.int32 if length <= torch.iinfo(torch.int32).max else torch.int64
