"""Where each parameter of a model stands in a flat vector: prunable ones first, each at a 64-byte boundary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements: 64 bytes of float32


class Extent(Protocol):
    """How long a vector of parameters is, P, and its prunable part, Q, which comes first."""

    @property
    def P(self) -> int:
        """All of it."""
        ...

    @property
    def Q(self) -> int:
        """The prunable part."""
        ...


@dataclass(frozen=True)
class Entry:
    """One parameter: its name in the model, its shape, and where it begins."""

    name: str
    shape: tuple[int, ...]
    begin: int
    prunable: bool

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Where it ends; the next begins at the next boundary."""
        return self.begin + self.size


@dataclass(frozen=True)
class Layout:
    """The parameters of one model as a vector of P numbers, the first Q of which are prunable.

    Between parameters stands padding, which is zero, never kept and never counted.
    """

    entries: tuple[Entry, ...]
    Q: int
    P: int

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, nn.Parameter]], prunable: AbstractSet[str]) -> Layout:
        """Lay named parameters out; those in `prunable` come first, otherwise in the given order."""
        entries: list[Entry] = []
        position = Q = 0
        named = [(name, tuple(parameter.shape)) for name, parameter in parameters]
        for first in (True, False):
            for name, shape in named:
                if (name in prunable) == first:
                    entries.append(Entry(name, shape, position, first))
                    position += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
            Q = position if first else Q
        return cls(tuple(entries), Q, position)

    @property
    def prunable(self) -> tuple[Entry, ...]:
        """The prunable parameters, in the order that ties are dealt out in."""
        return tuple(entry for entry in self.entries if entry.prunable)

    @property
    def weights(self) -> int:
        """How many weights can be pruned; the denominator of the density."""
        return sum(entry.size for entry in self.prunable)

    def view(self, vectors: Tensor, entry: Entry) -> Tensor:
        """One parameter [..., *shape] of vectors [..., P] (or masks [..., Q]), sharing their memory."""
        return vectors[..., entry.begin : entry.end].view((*vectors.shape[:-1], *entry.shape))

    def views(self, vectors: Tensor) -> dict[str, Tensor]:
        """All parameters [..., *shape] of vectors [..., P], by name."""
        return {entry.name: self.view(vectors, entry) for entry in self.entries}

    def flat(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector [P] from named tensors."""
        vector = torch.zeros(self.P, dtype=dtype, device=device)
        for entry in self.entries:
            self.view(vector, entry).copy_(tensors[entry.name].detach())
        return vector

    def mask_views(self, masks: Tensor) -> dict[str, Tensor]:
        """The masks [..., *shape] of the prunable parameters, by name, of masks [..., Q]."""
        return {entry.name: self.view(masks, entry) for entry in self.prunable}

    def full_mask(self, device: torch.device) -> Tensor:
        """The mask [Q] that keeps every weight; padding is never kept."""
        mask = torch.zeros(self.Q, dtype=torch.bool, device=device)
        for entry in self.prunable:
            mask[entry.begin : entry.end] = True
        return mask


def by_layer(layout: Layout, mask: Tensor) -> list[int]:
    """How many weights of each prunable parameter a mask [Q] keeps."""
    return [int(mask[entry.begin : entry.end].sum()) for entry in layout.prunable]
