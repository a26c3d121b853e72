"""The compact form of a bank: only the kept weights, followed by the parameters that are never pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.layout import ALIGNMENT, Layout


class Compact:
    """Converts vectors [..., P] of a layout under a mask [Q] to their compact form [..., P'] and back.

    kept   [kept]   int64: the place of each kept weight in the full vector
    rest   [P - Q]  int64: the place in the full vector of each number behind the kept weights
    where  [P]      int64: the place of each number in the compact vector; -1 for pruned weights
    Q, P            the compact vector's; the kept weights are padded to a 64-byte boundary

    first  by parameter: places in it that come first among its numbers in `rest`
    room   the least number of kept weights to make room for
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
                places = torch.arange(entry.size)
                others = places[~torch.isin(places, first[entry.name])]
                places = torch.cat([first[entry.name], others]).to(mask.device)
                self.rest[entry.begin - layout.Q : entry.end - layout.Q] = entry.begin + places
        self.where[self.rest] = torch.arange(self.Q, self.P, device=mask.device)

    def compact(self, vectors: Tensor) -> Tensor:
        """[..., P] -> [..., P'], without the pruned weights."""
        out = vectors.new_zeros((*vectors.shape[:-1], self.P))
        out[..., : len(self.kept)] = vectors[..., self.kept]
        out[..., self.Q :] = vectors[..., self.rest]
        return out

    def expand(self, vectors: Tensor) -> Tensor:
        """[..., P'] -> [..., P], with pruned weights 0."""
        out = vectors.new_zeros((*vectors.shape[:-1], self.layout.P))
        out[..., self.kept] = vectors[..., : len(self.kept)]
        out[..., self.rest] = vectors[..., self.Q :]
        return out


class CompactBank(ParticleBank):
    """A bank of compact weights, moments and SWA means [L, P']; its masks [R, Q] exclude only the padding.

    compacts  one per run, all of the same length
    """

    def __init__(
        self, compacts: Sequence[Compact], configs: Sequence[SwampConfig], lanes: int, dtype: torch.dtype
    ) -> None:
        super().__init__(compacts[0], configs, lanes, dtype, compacts[0].mask.device)
        self.compacts = compacts

    def rewind_(self, starts: Sequence[Solution], masks: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """As ParticleBank.rewind_, with full solutions. The masks must be those that the bank was made for."""
        compact_starts = [
            Solution(compact.compact(start.weights), start.buffers)
            for compact, start in zip(self.compacts, starts, strict=True)
        ]
        place = torch.arange(self.layout.Q, device=self.masks.device)
        compact_masks = torch.stack([place < len(compact.kept) for compact in self.compacts])
        super().rewind_(compact_starts, compact_masks, particles, cycle)

    def of_run(self, run: int) -> CompactBank:
        """As ParticleBank.of_run."""
        bank = super().of_run(run)
        assert isinstance(bank, CompactBank)
        bank.compacts = self.compacts[run : run + 1]
        return bank

    def rest(self, tensor: Tensor) -> Tensor:
        """As ParticleBank.rest, in the full layout's order."""
        rest = torch.empty_like(tensor[:, self.layout.Q :])
        rest[:, self._order] = tensor[:, self.layout.Q :]
        return rest

    def put_rest_(self, tensor: Tensor, rest: Tensor) -> None:
        """As ParticleBank.put_rest_."""
        tensor[:, self.layout.Q :] = rest[:, self._order]

    def solutions(self, averaged: bool) -> Tensor:
        """As ParticleBank.solutions, expanded."""
        by_run = super().solutions(averaged).split(self.lanes // len(self.compacts))
        return torch.cat([compact.expand(lanes) for compact, lanes in zip(self.compacts, by_run, strict=True)])

    @property
    def _order(self) -> Tensor:
        return self.compacts[0].rest - self.compacts[0].layout.Q
