"""Layout places a model's parameters in a flat vector: prunable ones first, each at a 64-byte boundary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements: 64 bytes of float32


@dataclass(frozen=True)
class Rates:
    """The rates of a parameter, relative to those of its run.

    lr_factor     the factor of the learning rate
    weight_decay  the weight decay; None for the run's
    """

    lr_factor: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Segment:
    """A range of a vector whose parameters have equal rates. It begins where the segment before it ends."""

    end: int
    rates: Rates


class Extent(Protocol):
    """Anything with the length P of a vector of parameters and the length Q of its prunable part, which comes first."""

    @property
    def P(self) -> int:
        """The length of the vector."""
        ...

    @property
    def Q(self) -> int:
        """The length of the prunable part."""
        ...

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The S segments of the vector, in order."""
        ...


@dataclass(frozen=True)
class Entry:
    """One parameter: its name in the model, its shape, and its first index in the vector."""

    name: str
    shape: tuple[int, ...]
    begin: int
    prunable: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The index after the last element; the next parameter begins at the next 64-byte boundary."""
        return self.begin + self.size


@dataclass(frozen=True)
class Layout:
    """The places of a model's parameters in a vector of length P, whose first Q elements are the prunable part.

    The padding between parameters is zero, is never kept by a mask, and is never counted.
    """

    entries: tuple[Entry, ...]
    Q: int
    P: int
    segments: tuple[Segment, ...]

    @classmethod
    def of(
        cls,
        parameters: Iterable[tuple[str, nn.Parameter]],
        prunable: AbstractSet[str],
        rates: Mapping[str, Rates] | None = None,
    ) -> Layout:
        """Lay out named parameters in the given order, but those in `prunable` before the others.

        rates  the rates of parameters by name; those of others are the run's
        """
        entries: list[Entry] = []
        position = Q = 0
        named = [(name, tuple(parameter.shape)) for name, parameter in parameters]
        for first in (True, False):
            for name, shape in named:
                if (name in prunable) == first:
                    entries.append(Entry(name, shape, position, first))
                    position += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
            Q = position if first else Q
        return cls(tuple(entries), Q, position, _segments_of(entries, position, rates or {}))

    @property
    def prunable(self) -> tuple[Entry, ...]:
        """The prunable parameters, in the order in which pruning keeps weights of equal score."""
        return tuple(entry for entry in self.entries if entry.prunable)

    @property
    def weights(self) -> int:
        """The number of prunable weights, the denominator of the density."""
        return sum(entry.size for entry in self.prunable)

    def view(self, vectors: Tensor, entry: Entry) -> Tensor:
        """Return a view [..., *shape] of one parameter in vectors [..., P] or masks [..., Q]."""
        return vectors[..., entry.begin : entry.end].view((*vectors.shape[:-1], *entry.shape))

    def views(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return views [..., *shape] of all parameters in vectors [..., P], by name."""
        return {entry.name: self.view(vectors, entry) for entry in self.entries}

    def flat(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Copy named tensors into a new vector [P]."""
        vector = torch.zeros(self.P, dtype=dtype, device=device)
        for entry in self.entries:
            self.view(vector, entry).copy_(tensors[entry.name].detach())
        return vector

    def mask_views(self, masks: Tensor) -> dict[str, Tensor]:
        """Return views [..., *shape] of all prunable parameters in masks [..., Q], by name."""
        return {entry.name: self.view(masks, entry) for entry in self.prunable}

    def full_mask(self, device: torch.device) -> Tensor:
        """Return the mask [Q] that keeps every weight but no padding."""
        mask = torch.zeros(self.Q, dtype=torch.bool, device=device)
        for entry in self.prunable:
            mask[entry.begin : entry.end] = True
        return mask


def _segments_of(entries: list[Entry], end: int, rates: Mapping[str, Rates]) -> tuple[Segment, ...]:
    """Return the segments of a vector that ends at `end`. Padding belongs to the segment before it."""
    equal = [(key, next(group).begin) for key, group in groupby(entries, lambda each: rates.get(each.name, Rates()))]
    if not equal:
        return (Segment(end, Rates()),)
    return tuple(Segment(stop, key) for (key, _), (_, stop) in pairwise([*equal, (Rates(), end)]))


def by_layer(layout: Layout, mask: Tensor) -> list[int]:
    """Return how many weights of each prunable parameter a mask [Q] keeps."""
    return [int(mask[entry.begin : entry.end].sum()) for entry in layout.prunable]
