"""Index structures of a convolution under a mask: which places of the input each output reads, and with which weight.

Built once a cycle and read by every lane: all particles share the mask. Names as in csrc/cpu/fused/fused.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from swamp_fast.engines.fused.plan import Convolution

SAMPLES = 16  # of a vector
CHUNK = 4096  # taps * rows that one task of a weight gradient holds sums of: 256 KB of float32


@dataclass(frozen=True)
class Geometry:
    """Where the numbers of a map stand, in elements: the distance of rows and of channels."""

    pitch: int
    plane: int


@dataclass(frozen=True)
class Taps:
    """starts [groups + 1], offsets [taps], index [taps, rows] into the compact weights, -1 where there is none."""

    starts: Tensor
    offsets: Tensor
    index: Tensor
    rows: int
    groups: int  # of one phase

    @property
    def count(self) -> int:
        """Taps * rows."""
        return self.index.numel()

    @property
    def waste(self) -> float:
        """Products per kept weight: sharing loads between outputs costs those that one of them doesn't need."""
        return self.count / max(1, int((self.index >= 0).sum()))

    @cached_property
    def chunks(self) -> Tensor:
        """Groups [chunks + 1] that one task of a weight gradient takes."""
        bounds, begin = [0], 0
        starts = (self.starts * self.rows).tolist()
        for group in range(1, self.groups + 1):
            if starts[group] - begin > CHUNK and group - 1 > bounds[-1]:
                bounds.append(group - 1)
                begin = starts[group - 1]
        return torch.tensor([*bounds, self.groups], dtype=torch.int64)

    @cached_property
    def largest_chunk(self) -> int:
        """The most taps * rows of a chunk."""
        return int((self.starts[self.chunks].diff() * self.rows).max())


@dataclass(frozen=True)
class ConvolutionMask:
    """The kept weights of a convolution: bool [O, I / groups, K, K], and where in the compact vector each stands."""

    op: Convolution
    kept: Tensor
    where: Tensor

    def forward_taps(self, rows: int, source: Geometry) -> Taps:
        """For out = weight * in; offsets from the input place of an output's pixel (stride times it)."""
        op, (outputs, inputs, H, W) = self.op, self.kept.shape
        channel = torch.arange(outputs)[:, None] // (outputs // op.groups) * inputs + torch.arange(inputs)
        y = torch.arange(H) * op.dilation[0] - op.padding[0]
        x = torch.arange(W) * op.dilation[1] - op.padding[1]
        offsets = _offsets(channel, y, x, source)
        return _gathered([(self.kept, self.where, offsets)], rows)

    def backward_taps(self, rows: int, out_grad: Geometry) -> Taps:
        """For in_grad = weight * out_grad, in stride * stride phases of the input's pixels."""
        op, (outputs, inputs, H, W) = self.op, self.kept.shape
        own = outputs // op.groups
        kept, where = (_transposed(each, op.groups) for each in (self.kept, self.where))
        channel = torch.arange(inputs * op.groups)[:, None] // inputs * own + torch.arange(own)
        phases = []
        for phase in range(op.stride**2):
            y = phase // op.stride + op.padding[0] - torch.arange(H) * op.dilation[0]
            x = phase % op.stride + op.padding[1] - torch.arange(W) * op.dilation[1]
            met = (y % op.stride == 0)[:, None] & (x % op.stride == 0)
            offsets = _offsets(channel, y // op.stride, x // op.stride, out_grad)
            phases.append((kept & met, where, offsets))
        return _gathered(phases, rows)

    def most_rows(self, backward: bool) -> int:
        """How many outputs may share loads: those of one group of channels."""
        outputs, inputs = self.kept.shape[:2]
        own = (inputs if backward else outputs // self.op.groups) if self.op.groups > 1 else 4
        return 4 if own % 4 == 0 else 2 if own % 2 == 0 else 1


def pads(
    op: Convolution, kernel: tuple[int, ...], inside: tuple[int, ...], outside: tuple[int, ...]
) -> tuple[int, int]:
    """How wide a border of zeros the input needs, and the output's gradient."""
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
    """[N, M, H, W] from channels [N, M], rows [H] and columns [W]."""
    return channel[:, :, None, None] * map_.plane + y[:, None] * map_.pitch + x * SAMPLES


def _gathered(phases: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> Taps:
    """The lists of one or more phases, of (kept, where, offsets) [N, M, H, W] each."""
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
