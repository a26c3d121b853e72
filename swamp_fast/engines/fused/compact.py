"""Compact banks, which store only the kept weights, followed by the parameters that are never pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.particles.bank import ParticleBank, Solution, segment_ends_of
from swamp_fast.particles.layout import ALIGNMENT, Layout, Segment


class Compact:
    """Converts parameter vectors [..., P] to a compact form [..., P'] without the pruned weights, and back.

    kept   [kept]   int64: the index of each kept weight in the full vector
    rest   [P - Q]  int64: the index in the full vector of each number that follows the kept weights
    where  [P]      int64: the index of each number in the compact vector; -1 for pruned weights
    Q               length of the compact vector's prunable part: the kept weights, padded to a 64-byte boundary
    P               length P' of the whole compact vector
    segments        the segments of the compact vector, as many as the full vector has

    first     for some never-pruned parameters, by name: the indices of the elements that `rest` lists first
    min_kept  Q has room for at least this many kept weights
    """

    def __init__(
        self, layout: Layout, mask: Tensor, first: Mapping[str, Tensor] | None = None, min_kept: int = 0
    ) -> None:
        self.layout, self.mask = layout, mask.clone()
        self.kept = mask.nonzero().flatten()
        self.Q = -(-max(min_kept, len(self.kept)) // ALIGNMENT) * ALIGNMENT
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
        ends = torch.tensor([segment.end for segment in layout.segments], device=mask.device)
        ends = torch.where(ends < layout.Q, torch.searchsorted(self.kept, ends), ends - layout.Q + self.Q)
        self.segments = tuple(map(Segment, ends.tolist(), (segment.rates for segment in layout.segments)))

    def compact(self, vectors: Tensor) -> Tensor:
        """Convert full vectors [..., P] to compact vectors [..., P'], dropping the pruned weights."""
        out = vectors.new_zeros((*vectors.shape[:-1], self.P))
        out[..., : len(self.kept)] = vectors[..., self.kept]
        out[..., self.Q :] = vectors[..., self.rest]
        return out

    def expand(self, vectors: Tensor) -> Tensor:
        """Convert compact vectors [..., P'] to full vectors [..., P], in which pruned weights are 0."""
        out = vectors.new_zeros((*vectors.shape[:-1], self.layout.P))
        out[..., self.kept] = vectors[..., : len(self.kept)]
        out[..., self.rest] = vectors[..., self.Q :]
        return out


class CompactBank(ParticleBank):
    """A bank of compact weights, optimiser moments and SWA means, each [L, P'].

    The pruned weights are not stored, so the bank's own masks [R, Q] are 0 only at the padding.

    compacts  one Compact per run, all of the same length
    """

    def __init__(
        self,
        compacts: Sequence[Compact],
        configs: Sequence[SwampConfig],
        lanes: int,
        dtype: torch.dtype,
        own_optimizer: bool = False,
    ) -> None:
        super().__init__(compacts[0], configs, lanes, dtype, compacts[0].mask.device, own_optimizer)
        self.compacts, self.segment_ends = compacts, segment_ends_of(compacts, self.weights.device)

    def rewind_(self, starts: Sequence[Solution], masks: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """Rewind as ParticleBank.rewind_ does, from full (not compact) solutions.

        The masks must be the ones that the bank was made for.
        """
        compact_starts = [
            Solution(compact.compact(start.weights), start.buffers)
            for compact, start in zip(self.compacts, starts, strict=True)
        ]
        place = torch.arange(self.layout.Q, device=self.masks.device)
        compact_masks = torch.stack([place < len(compact.kept) for compact in self.compacts])
        super().rewind_(compact_starts, compact_masks, particles, cycle)

    def of_run(self, run: int) -> CompactBank:
        """See ParticleBank.of_run."""
        bank = super().of_run(run)
        assert isinstance(bank, CompactBank)
        bank.compacts = self.compacts[run : run + 1]
        return bank

    def rest(self, tensor: Tensor) -> Tensor:
        """See ParticleBank.rest; the result is in the full layout's order."""
        rest = torch.empty_like(tensor[:, self.layout.Q :])
        rest[:, self._order] = tensor[:, self.layout.Q :]
        return rest

    def put_rest_(self, tensor: Tensor, rest: Tensor) -> None:
        """See ParticleBank.put_rest_."""
        tensor[:, self.layout.Q :] = rest[:, self._order]

    def expanded(self, tensor: Tensor) -> Tensor:
        """See ParticleBank.expanded; the result is a new tensor, in which pruned weights are 0."""
        by_run = tensor.split(self.lanes // len(self.compacts))
        return torch.cat([compact.expand(lanes) for compact, lanes in zip(self.compacts, by_run, strict=True)])

    def put_expanded_(self, tensor: Tensor, full: Tensor) -> None:
        """See ParticleBank.put_expanded_."""
        by_run = full.split(self.lanes // len(self.compacts))
        lanes = [compact.compact(lanes) for compact, lanes in zip(self.compacts, by_run, strict=True)]
        tensor.copy_(torch.cat(lanes))

    def expanded_masks(self) -> Tensor:
        """See ParticleBank.expanded_masks."""
        return torch.stack([compact.mask for compact in self.compacts])

    @property
    def _order(self) -> Tensor:
        return self.compacts[0].rest - self.compacts[0].layout.Q
