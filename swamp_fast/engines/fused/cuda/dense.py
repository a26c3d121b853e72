"""Dense weights for matrix products, made of a compact bank each step, and their gradients brought back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.engines.fused.compact import Compact
from swamp_fast.layout import ALIGNMENT
from swamp_fast.ops._contract import triton_kernels
from swamp_fast.plan import Convolution, Plan


@dataclass(frozen=True)
class Place:
    """Where a convolution's `size` weights [groups, taps, in, out] stand in a dense row, and then [.., out, in]."""

    forward: int
    by_input: int
    size: int
    kernel: tuple[int, int]


class DenseWeights:
    """The index tables between compact vectors [L, P'] and dense rows [L, T], of one mask.

    index     [T]  int32: which compact number stands at a place of a dense row, -1 for a pruned weight or padding
    places    of every convolution, by its output's number
    channels  of each value, by its number: which of the model's the plan has, as narrow.py has it
    """

    def __init__(self, plan: Plan, compact: Compact, channels: Sequence[Tensor]) -> None:
        self.compact = compact
        self.places: dict[int, Place] = {}
        entries = {entry.name: entry for entry in compact.layout.entries}
        rows: list[Tensor] = []
        length = 0
        for op in plan.ops:
            if not isinstance(op, Convolution):
                continue
            entry = entries[op.weight]
            shape = entry.shape if len(entry.shape) == 4 else (*entry.shape, 1, 1)
            own = compact.where[entry.begin : entry.end].view(*shape[:2], -1)
            if op.groups == 1:
                own = own[channels[op.output].to(own.device)][:, channels[op.inputs[0]].to(own.device)]
            own = own.view(op.groups, own.shape[0] // op.groups, own.shape[1], -1)
            begins = []
            for axes in ((0, 3, 2, 1), (0, 3, 1, 2)):
                begins.append(length)
                row = own.permute(axes).flatten()
                rows.append(torch.nn.functional.pad(row, (0, -len(row) % ALIGNMENT), value=-1))
                length += len(rows[-1])
            self.places[op.output] = Place(begins[0], begins[1], own.numel(), (shape[2], shape[3]))
        self.index = torch.cat([*rows, compact.where.new_zeros(0)]).int()

    def expand(self, weights: Tensor, out: Tensor) -> None:
        """Compact weights [L, P'] -> dense rows [L, T], in the type of `out`."""
        triton_kernels("compact").expand_weights(weights, self.index, out)


class Gradients:
    """Parts of the weights' dense gradients, [L, parts of all layers], and where each compact weight's stand.

    splits  parts of every convolution, by its output's number; they depend on the sizes alone
    """

    def __init__(self, dense: DenseWeights, splits: dict[int, int]) -> None:
        compact = dense.compact
        self.splits, self.first = splits, dict[int, int]()
        base = torch.full((compact.P,), -1, dtype=torch.int32, device=compact.where.device)
        self.step, self.parts = torch.zeros_like(base), torch.zeros_like(base)
        self.length = 0
        for output, place in dense.places.items():
            own = dense.index[place.forward : place.forward + place.size]
            there = (own >= 0).nonzero().flatten()
            where = own[there].long()
            self.first[output] = self.length
            base[where] = (self.length + there).int()
            self.step[where], self.parts[where] = place.size, splits[output]
            self.length += place.size * splits[output]
        self.base = base

    def collect(self, partial: Tensor, grads: Tensor) -> None:
        """Add the sums over the parts, [L, self.length], to grads [L, P']."""
        triton_kernels("compact").collect_gradients(partial, self.base, self.step, self.parts, grads)
