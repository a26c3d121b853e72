"""Dense weights for matrix products, made of a compact bank each step, and their gradients brought back."""

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
    """Where a convolution's `size` weights [groups, taps, in, out] stand in a dense row, and then [.., out, in]."""

    forward: int
    by_input: int
    size: int
    kernel: tuple[int, int]


class DenseWeights:
    """The index tables between compact vectors [L, P'] and dense rows [L, T], of R runs' masks.

    index     [R, T]  int32: which compact number stands at a place of a dense row, -1 for a pruned weight or padding
    places    of every convolution, by its output's number
    channels  of each value, by its number: which of the model's the plan has, as narrow.py has it
    """

    def __init__(self, plan: Plan, compacts: Sequence[Compact], channels: Sequence[Tensor]) -> None:
        self.compacts = compacts
        self.places: dict[int, Place] = {}
        self.index = torch.stack([self._row(plan, compact, channels) for compact in compacts]).int()

    def _row(self, plan: Plan, compact: Compact, channels: Sequence[Tensor]) -> Tensor:
        """One run's row of the index; the places are the same for all."""
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
        return torch.cat([*rows, compact.where.new_zeros(0)])

    def expand(self, weights: Tensor, run_of_lane: Tensor, out: Tensor) -> None:
        """Compact weights [L, P'] -> dense rows [L, T], in the type of `out`."""
        triton_kernels("compact").expand_weights(weights, self.index, run_of_lane, out)


class Gradients:
    """Parts of the weights' dense gradients, [L, parts of all layers], and where each compact weight's stand.

    splits  parts of every convolution, by its output's number; they depend on the sizes alone
    first   where those of each begin in a row of `length`
    """

    def __init__(self, dense: DenseWeights, splits: dict[int, int]) -> None:
        compacts = dense.compacts
        self.splits = splits
        self.first, self.length = begins_of({output: place.size for output, place in dense.places.items()}, splits)
        shape, device = (len(compacts), compacts[0].P), dense.index.device
        self.base = torch.full(shape, -1, dtype=index_type(self.length), device=device)
        self.step, self.parts = torch.zeros(2, *shape, dtype=torch.int32, device=device)
        for output, place in dense.places.items():
            own = dense.index[:, place.forward : place.forward + place.size]
            run, there = (own >= 0).nonzero(as_tuple=True)
            where = own[run, there].long()
            self.base[run, where] = (self.first[output] + there).to(self.base.dtype)
            self.step[run, where], self.parts[run, where] = place.size, splits[output]

    def collect(self, partial: Tensor, run_of_lane: Tensor, grads: Tensor) -> None:
        """Add the sums over the parts, [L, self.length], to grads [L, P']."""
        tables = self.base, self.step, self.parts
        triton_kernels("compact").collect_gradients(partial, *tables, run_of_lane, grads)


def begins_of(sizes: dict[int, int], splits: dict[int, int]) -> tuple[dict[int, int], int]:
    """Where each layer's parts begin in a row of all, and that row's length, by the layers' weights and their parts."""
    first, length = {}, 0
    for layer, size in sizes.items():
        first[layer] = length
        length += size * splits[layer]
    return first, length


def index_type(length: int) -> torch.dtype:
    """What numbers the places of a row; the kernel multiplies and adds in 64 bits where this has them."""
    return torch.int32 if length <= torch.iinfo(torch.int32).max else torch.int64
