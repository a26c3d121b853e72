"""The compact form of a bank: the kept weights alone, then what isn't pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.layout import ALIGNMENT, Layout


class Compact:
    """Vectors [..., P] of a layout under a mask [Q], and their compact form [..., P'].

    kept   [kept]   int64: where in the full vector each kept weight stands
    rest   [P - Q]  int64: where each of the numbers stands that aren't pruned
    where  [P]      int64: where in the compact vector each number stands, -1 where there is none
    Q, P            of the compact vector; the kept weights are padded to a 64-byte boundary

    In the rest, the numbers of a parameter named in `first` begin with those that it lists. There is room for at least
    `room` kept weights.
    """

    def __init__(self, layout: Layout, mask: Tensor, first: Mapping[str, Tensor] | None = None, room: int = 0) -> None:
        self.layout, self.mask = layout, mask.clone()
        self.kept = mask.nonzero().flatten()
        self.Q = -(-max(room, len(self.kept)) // ALIGNMENT) * ALIGNMENT
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
    """A bank whose weights, moments and SWA means are compact, [L, P']; masks [R, Q] keep all of them but the padding.

    compacts  of the runs, of one length
    """

    def __init__(
        self, compacts: Sequence[Compact], configs: Sequence[SwampConfig], lanes: int, dtype: torch.dtype
    ) -> None:
        super().__init__(compacts[0], configs, lanes, dtype, compacts[0].mask.device)
        self.compacts = compacts

    def rewind_(self, starts: Sequence[Solution], masks: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """As ParticleBank.rewind_, with full solutions; the masks are those that the bank was made for."""
        place, compact = torch.arange(self.layout.Q, device=self.masks.device), []
        for own, start in zip(self.compacts, starts, strict=True):
            compact.append(Solution(own.compact(start.weights), start.buffers))
        own_masks = torch.stack([place < len(own.kept) for own in self.compacts])
        super().rewind_(compact, own_masks, particles, cycle)

    def of_run(self, run: int) -> CompactBank:
        """As ParticleBank.of_run."""
        own = super().of_run(run)
        assert isinstance(own, CompactBank)
        own.compacts = self.compacts[run : run + 1]
        return own

    def rest(self, tensor: Tensor) -> Tensor:
        """As ParticleBank.rest, in the full layout's order."""
        rest = torch.empty_like(tensor[:, self.layout.Q :])
        rest[:, self._order] = tensor[:, self.layout.Q :]
        return rest

    def put_rest_(self, tensor: Tensor, rest: Tensor) -> None:
        """As ParticleBank.put_rest_."""
        tensor[:, self.layout.Q :] = rest[:, self._order]

    def solutions(self, averaged: bool) -> Tensor:
        """As ParticleBank.solutions, in full."""
        each = super().solutions(averaged).split(self.lanes // len(self.compacts))
        return torch.cat([own.expand(lanes) for own, lanes in zip(self.compacts, each, strict=True)])

    @property
    def _order(self) -> Tensor:
        return self.compacts[0].rest - self.compacts[0].layout.Q
