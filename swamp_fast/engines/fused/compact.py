"""The compact form of a bank: the kept weights alone, then what isn't pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swamp_fast.bank import ParticleBank, Solution
from swamp_fast.config import SwampConfig
from swamp_fast.layout import ALIGNMENT, Layout


class Compact:
    """Vectors [..., P] of a layout under a mask [Q], and their compact form [..., P'].

    kept   [kept]   int64: where in the full vector each kept weight stands
    rest   [P - Q]  int64: where each of the numbers stands that aren't pruned
    where  [P]      int64: where in the compact vector each number stands, -1 where there is none
    Q, P            of the compact vector; the kept weights are padded to a 64-byte boundary

    In the rest, the numbers of a parameter named in `first` begin with those that it lists.
    """

    def __init__(self, layout: Layout, mask: Tensor, first: Mapping[str, Tensor] | None = None) -> None:
        self.layout, self.mask = layout, mask.clone()
        self.kept = mask.nonzero().flatten()
        self.Q = -(-len(self.kept) // ALIGNMENT) * ALIGNMENT
        self.P = self.Q + layout.P - layout.Q
        self.where = torch.full((layout.P,), -1, dtype=torch.int64, device=mask.device)
        self.where[self.kept] = torch.arange(len(self.kept), device=mask.device)
        self.rest = torch.arange(layout.Q, layout.P, device=mask.device)
        for entry in layout.entries:
            if first is not None and entry.name in first:
                own = torch.arange(entry.size)
                own = torch.cat([first[entry.name], own[~torch.isin(own, first[entry.name])]]).to(mask.device)
                self.rest[entry.begin - layout.Q : entry.end - layout.Q] = entry.begin + own
        self.where[self.rest] = torch.arange(self.Q, self.P, device=mask.device)

    def compact(self, vectors: Tensor) -> Tensor:
        """[..., P] -> [..., P']; what the mask prunes is left out."""
        out = vectors.new_zeros((*vectors.shape[:-1], self.P))
        out[..., : len(self.kept)] = vectors[..., self.kept]
        out[..., self.Q :] = vectors[..., self.rest]
        return out

    def expand(self, vectors: Tensor) -> Tensor:
        """[..., P'] -> [..., P]; what the mask prunes is 0."""
        out = vectors.new_zeros((*vectors.shape[:-1], self.layout.P))
        out[..., self.kept] = vectors[..., : len(self.kept)]
        out[..., self.rest] = vectors[..., self.Q :]
        return out


class CompactBank(ParticleBank):
    """A bank whose weights, moments and SWA means are compact, [L, P']; its mask keeps all of them but the padding."""

    def __init__(self, compact: Compact, config: SwampConfig, lanes: int, dtype: torch.dtype) -> None:
        super().__init__(compact, config, lanes, dtype, compact.mask.device)
        self.compact = compact

    def rewind_(self, start: Solution, mask: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """As ParticleBank.rewind_, with a full solution; the mask is the one that the bank was made for."""
        own = torch.arange(self.compact.Q, device=self.masks.device) < len(self.compact.kept)
        super().rewind_(Solution(self.compact.compact(start.weights), start.buffers), own, particles, cycle)

    def solutions(self, averaged: bool) -> Tensor:
        """As ParticleBank.solutions, in full."""
        return self.compact.expand(super().solutions(averaged))
