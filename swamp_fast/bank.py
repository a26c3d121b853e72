"""ParticleBank: all particles of a training as rows of stacked tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.data.streams import lane_keys, stream_of
from swamp_fast.layout import Extent


@dataclass(frozen=True)
class Solution:
    """The weights [P] of one model, and its buffers by name: a ticket, a particle or an average."""

    weights: Tensor
    buffers: dict[str, Tensor]


class ParticleBank:
    """L lanes of weights, their momentum and SWA means, and R masks; reused from cycle to cycle, never replaced.

    weights, momentum_buffer, swa     [L, P]
    masks                             [R, Q]  bool, one row a run
    run_of_lane                       [L]     int64
    keys                              [L, 3]  int64: seed, stream, 0; what each lane draws with
    momentum, weight_decay            [L]     float64
    buffers                           what the lanes' modules start with; replaced by what they end with, [L, ...]
    """

    def __init__(
        self, layout: Extent, config: SwampConfig, lanes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.config = layout, config
        self.weights, self.momentum_buffer, self.swa = (
            torch.zeros(lanes, layout.P, dtype=dtype, device=device) for _ in range(3)
        )
        self.masks = torch.zeros(1, layout.Q, dtype=torch.bool, device=device)
        self.run_of_lane = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.keys = torch.zeros(lanes, 3, dtype=torch.int64, device=device)
        self.momentum = torch.full((lanes,), config.momentum, dtype=torch.float64, device=device)
        self.weight_decay = torch.full((lanes,), config.weight_decay, dtype=torch.float64, device=device)
        self.buffers: dict[str, Tensor] = {}

    @property
    def lanes(self) -> int:
        """L."""
        return len(self.weights)

    def rewind_(self, start: Solution, mask: Tensor, cycle: int | None) -> None:
        """Put every lane at `start` under a mask [Q], with fresh momentum; cycle None trains the ticket."""
        self.masks.copy_(mask)
        self.weights.copy_(start.weights.expand_as(self.weights))
        self.weights[:, : self.layout.Q].mul_(self.masks[self.run_of_lane])
        self.momentum_buffer.zero_()
        self.swa.zero_()
        streams = [stream_of(cycle, particle) for particle in range(self.lanes)]
        self.keys.copy_(lane_keys([self.config.seed] * self.lanes, streams, self.keys.device))
        self.buffers = {
            name: buffer.expand(self.lanes, *buffer.shape).clone() for name, buffer in start.buffers.items()
        }

    def moving(self) -> dict[str, Tensor]:
        """What a step changes, by name, each [L, P]."""
        return {"weights": self.weights, "momentum_buffer": self.momentum_buffer, "swa": self.swa}

    def state(self) -> dict[str, Tensor]:
        """What a step changes, on the CPU, without what is pruned: the kept of all lanes in a row, and the rest.

        It is the same for every engine.
        """
        Q, kept = self.layout.Q, [self.masks[run] for run in self.run_of_lane.tolist()]
        state = {}
        for name, tensor in self.moving().items():
            pairs = zip(tensor, kept, strict=True)
            state[f"{name}/kept"] = torch.cat([lane[:Q].masked_select(mask).cpu() for lane, mask in pairs])
            state[f"{name}/rest"] = tensor[:, Q:].cpu()
        return state

    def load_state_(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` back, under the masks that it was taken under."""
        Q, kept = self.layout.Q, [self.masks[run] for run in self.run_of_lane.tolist()]
        counts = [int(mask.sum()) for mask in kept]
        for name, tensor in self.moving().items():
            values = state[f"{name}/kept"].to(tensor.device).split(counts)
            for lane, mask, own in zip(tensor, kept, values, strict=True):
                lane[:Q].masked_scatter_(mask, own)
            tensor[:, Q:] = state[f"{name}/rest"].to(tensor.device)

    def solutions(self, averaged: bool) -> Tensor:
        """What the lanes trained to, [L, P]: their SWA means, or their last iterates."""
        return self.swa if averaged else self.weights
