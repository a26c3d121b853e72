"""Taps: a convolution's index structures under a mask, which inputs each output reads and with which weights.

They are built once per cycle and read by every lane, since all particles share the mask. Names as in
csrc/cpu/fused/fused.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swamp_fast.engines.fused.plan import Convolution

SAMPLES_PER_BLOCK = 16  # in a block of a map, which the kernels process as one vector
MAX_CHUNK_SUMS = 4096  # taps * rows whose sums one task of a weight gradient holds: 256 KB of float32


@dataclass(frozen=True)
class Geometry:
    """The distance between rows (pitch) and between channels (plane) of a map, in elements."""

    pitch: int
    plane: int


@dataclass(frozen=True)
class Taps:
    """For each group of `rows` outputs that share loads, the inputs that they read.

    A tap is one input place; a group's outputs all read it, each with its own weight.

    starts   [groups + 1]   where each group's taps begin; with several phases, [phases * groups + 1]
    offsets  [taps]         from the place of an output's pixel to the input that is read
    index    [taps, rows]   the place of each weight in the compact vector; -1 where it is pruned
    groups                  of one phase
    """

    starts: Tensor
    offsets: Tensor
    index: Tensor
    rows: int
    groups: int

    @property
    def count(self) -> int:
        """The number of weights in `index`, pruned ones included: taps * rows."""
        return self.index.numel()

    @property
    def waste(self) -> float:
        """Products per kept weight: outputs that share loads also multiply inputs that only others of them need."""
        return self.count / max(1, int((self.index >= 0).sum()))

    @cached_property
    def chunks(self) -> Tensor:
        """[chunks + 1] int64: the groups at which the chunks of a weight gradient begin, each of which is one task."""
        bounds, begin = [0], 0
        starts = (self.starts * self.rows).tolist()
        for group in range(1, self.groups + 1):
            if starts[group] - begin > MAX_CHUNK_SUMS and group - 1 > bounds[-1]:
                bounds.append(group - 1)
                begin = starts[group - 1]
        return torch.tensor([*bounds, self.groups], dtype=torch.int64)

    @cached_property
    def largest_chunk(self) -> int:
        """The largest taps * rows of a chunk."""
        return int((self.starts[self.chunks].diff() * self.rows).max())


@dataclass(frozen=True)
class ConvolutionMask:
    """The mask of a convolution.

    kept   [O, I / groups, K, K]  bool
    where  [O, I / groups, K, K]  int64, the place of each weight in the compact vector
    """

    op: Convolution
    kept: Tensor
    where: Tensor

    def forward_taps(self, rows: int, source: Geometry) -> Taps:
        """Taps of out = weight * in; offsets count from an output's pixel, times the stride, in the input."""
        op, (outputs, inputs, H, W) = self.op, self.kept.shape
        channel = torch.arange(outputs)[:, None] // (outputs // op.groups) * inputs + torch.arange(inputs)
        y = torch.arange(H) * op.dilation[0] - op.padding[0]
        x = torch.arange(W) * op.dilation[1] - op.padding[1]
        offsets = _offsets(channel, y, x, source)
        return _gathered([(self.kept, self.where, offsets)], rows)

    def backward_taps(self, rows: int, out_grad: Geometry) -> Taps:
        """Taps of in_grad = weight * out_grad, in stride * stride phases of the input's pixels."""
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
        """The largest number of outputs that can share loads; they must be in one group of channels."""
        outputs, inputs = self.kept.shape[:2]
        of_group = (inputs if backward else outputs // self.op.groups) if self.op.groups > 1 else 4
        return 4 if of_group % 4 == 0 else 2 if of_group % 2 == 0 else 1


def pads(
    op: Convolution, kernel: tuple[int, ...], inside: tuple[int, ...], outside: tuple[int, ...]
) -> tuple[int, int]:
    """The width of the border of zeros that the input needs, and of that of the output's gradient."""
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
    """[O, I / groups, K, K] -> [I, O / groups, K, K]."""
    outputs, inputs, H, W = weights.shape
    split = weights.view(groups, outputs // groups, inputs, H, W)
    return split.transpose(1, 2).reshape(groups * inputs, outputs // groups, H, W)


def _offsets(channel: Tensor, y: Tensor, x: Tensor, map_: Geometry) -> Tensor:
    """Offsets [N, M, H, W] in a map, from channels [N, M], rows [H] and columns [W]."""
    return channel[:, :, None, None] * map_.plane + y[:, None] * map_.pitch + x * SAMPLES_PER_BLOCK


def _gathered(phases: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> Taps:
    """Taps of one or more phases, each given as (kept, where, offsets) [N, M, H, W]."""
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
