"""Taps: index tables of a masked convolution, which say what inputs each output reads and with what weights.

They are built once per cycle and used by every lane, because all particles share the mask. The names are those of
csrc/cpu/fused/fused.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swamp_fast.engines.fused.plan import Convolution

SAMPLES_PER_BLOCK = 16  # the kernels process the samples of a block as one vector
MAX_CHUNK_SUMS = 4096  # vectors of sums (taps * rows) that one task of a weight gradient holds: 256 KB in float32


@dataclass(frozen=True)
class Geometry:
    """The distances between the rows (pitch) and between the channels (plane) of a map, in elements."""

    pitch: int
    plane: int


@dataclass(frozen=True)
class Taps:
    """The inputs that each group of `rows` output channels reads. The outputs of a group share their loads.

    A tap is one input position that a group reads. Each output of the group multiplies it by a weight of its own.

    starts   [groups + 1]   where each group's taps begin; with several phases, [phases * groups + 1]
    offsets  [taps]         distance from an output's pixel to the input that is read, in elements
    index    [taps, rows]   the index of each weight in the compact vector; -1 if the weight is pruned
    groups                  the number of groups in one phase
    """

    starts: Tensor
    offsets: Tensor
    index: Tensor
    rows: int
    groups: int

    @property
    def count(self) -> int:
        """The number of entries of `index`, including pruned weights: taps * rows."""
        return self.index.numel()

    @property
    def waste(self) -> float:
        """The number of products per kept weight.

        It exceeds 1 if outputs share loads: each output of a group is also multiplied with the inputs that only the
        others need.
        """
        return self.count / max(1, int((self.index >= 0).sum()))

    @cached_property
    def chunks(self) -> Tensor:
        """The group at which each chunk begins, [chunks + 1] int64. One task of a weight gradient sums one chunk."""
        bounds, begin = [0], 0
        starts = (self.starts * self.rows).tolist()
        for group in range(1, self.groups + 1):
            if starts[group] - begin > MAX_CHUNK_SUMS and group - 1 > bounds[-1]:
                bounds.append(group - 1)
                begin = starts[group - 1]
        return torch.tensor([*bounds, self.groups], dtype=torch.int64)

    @cached_property
    def largest_chunk(self) -> int:
        """The number of entries of `index` (taps * rows) in the largest chunk."""
        return int((self.starts[self.chunks].diff() * self.rows).max())


@dataclass(frozen=True)
class ConvolutionMask:
    """The mask of a convolution.

    kept   [O, I / groups, H, W]  bool
    where  [O, I / groups, H, W]  int64, the index of each weight in the compact vector
    """

    op: Convolution
    kept: Tensor
    where: Tensor

    def forward_taps(self, rows: int, source: Geometry) -> Taps:
        """The taps of the forward pass; offsets count from the input pixel at the output's pixel times the stride."""
        op, (outputs, inputs, H, W) = self.op, self.kept.shape
        channel = torch.arange(outputs)[:, None] // (outputs // op.groups) * inputs + torch.arange(inputs)
        y = torch.arange(H) * op.dilation[0] - op.padding[0]
        x = torch.arange(W) * op.dilation[1] - op.padding[1]
        offsets = _offsets(channel, y, x, source)
        return _gathered([(self.kept, self.where, offsets)], rows)

    def backward_taps(self, rows: int, out_grad: Geometry) -> Taps:
        """The taps of the input gradient, with one phase for each position of an input pixel modulo the stride."""
        op, (outputs, inputs, H, W) = self.op, self.kept.shape
        of_group = outputs // op.groups
        kept, where = (_transposed(weights, op.groups) for weights in (self.kept, self.where))
        channel = torch.arange(inputs * op.groups)[:, None] // inputs * of_group + torch.arange(of_group)
        phases = []
        for phase in range(op.stride**2):
            y = phase // op.stride + op.padding[0] - torch.arange(H) * op.dilation[0]
            x = phase % op.stride + op.padding[1] - torch.arange(W) * op.dilation[1]
            met = (y % op.stride == 0)[:, None] & (x % op.stride == 0)
            offsets = _offsets(channel, y // op.stride, x // op.stride, out_grad)
            phases.append((kept & met, where, offsets))
        return _gathered(phases, rows)

    def most_rows(self, backward: bool) -> int:
        """The largest number of output channels that can share loads; they must belong to one channel group."""
        outputs, inputs = self.kept.shape[:2]
        of_group = (inputs if backward else outputs // self.op.groups) if self.op.groups > 1 else 4
        return 4 if of_group % 4 == 0 else 2 if of_group % 2 == 0 else 1


def pads(
    op: Convolution, kernel: tuple[int, ...], inside: tuple[int, ...], outside: tuple[int, ...]
) -> tuple[int, int]:
    """The widths of the borders of zeros that the input and the output's gradient need.

    kernel, inside, outside  height and width of the kernel, the input and the output
    """
    forward = backward = 0
    for axis in (0, 1):
        reach = (kernel[axis] - 1) * op.dilation[axis]
        forward = max(
            forward, op.padding[axis], (outside[axis] - 1) * op.stride + reach - op.padding[axis] - inside[axis] + 1
        )
        for pixel in (*range(op.stride), *range(max(0, inside[axis] - op.stride), inside[axis])):
            for tap in range(kernel[axis]):
                place = pixel + op.padding[axis] - tap * op.dilation[axis]
                if place % op.stride == 0:
                    backward = max(backward, -place // op.stride, place // op.stride - outside[axis] + 1)
    return forward, backward


def _transposed(weights: Tensor, groups: int) -> Tensor:
    """Swap the input and output channels of each group: [O, I / groups, H, W] to [I, O / groups, H, W]."""
    outputs, inputs, H, W = weights.shape
    split = weights.view(groups, outputs // groups, inputs, H, W)
    return split.transpose(1, 2).reshape(groups * inputs, outputs // groups, H, W)


def _offsets(channel: Tensor, y: Tensor, x: Tensor, map_: Geometry) -> Tensor:
    """The offsets [N, M, H, W], in elements of a map, of channels [N, M], rows [H] and columns [W]."""
    return channel[:, :, None, None] * map_.plane + y[:, None] * map_.pitch + x * SAMPLES_PER_BLOCK


def _gathered(phases: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> Taps:
    """The taps of one or more phases. Each phase is given as (kept, where, offsets), all [N, M, H, W]."""
    counts, offsets, index = [torch.zeros(1, dtype=torch.int64)], [], []
    groups = -(-len(phases[0][0]) // rows)
    for kept, where, places in phases:
        missing = groups * rows - len(kept)
        wanted = torch.where(kept, where, -1).flatten(1)
        wanted = torch.cat([wanted, wanted.new_full((missing, wanted.shape[1]), -1)]).view(groups, rows, -1)
        group, place = (wanted >= 0).any(1).nonzero().unbind(1)
        counts.append(torch.bincount(group, minlength=groups))
        offsets.append(places.flatten(1)[group * rows, place])
        index.append(wanted[group, :, place])
    starts, offsets32 = torch.cat(counts).cumsum(0), torch.cat(offsets)
    return Taps(starts.int(), offsets32.int(), torch.cat(index).int().contiguous(), rows, groups)
