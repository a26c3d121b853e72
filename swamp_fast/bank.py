"""ParticleBank: all particles of a training as rows of stacked tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.data.streams import lane_keys, stream_of
from swamp_fast.layout import Extent

MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
RATES = {  # of an optimizer's op, and the settings that they are
    "sgd": {"momentum": "momentum", "weight_decay": "weight_decay"},
    "adamw": {"beta1": "beta1", "beta2": "beta2", "eps": "adam_eps", "weight_decay": "weight_decay"},
}


@dataclass(frozen=True)
class Solution:
    """The weights [P] of one model, and its buffers by name: a ticket, a particle or an average."""

    weights: Tensor
    buffers: dict[str, Tensor]


class ParticleBank:
    """L lanes of weights, their moments and SWA means, and R masks; reused from cycle to cycle, never replaced.

    weights, swa                      [L, P]
    moments                           [L, P]  each, by the names that the optimizer's op has for them
    masks                             [R, Q]  bool, one row a run
    run_of_lane                       [L]     int64
    keys                              [L, 3]  int64: seed, stream, 0; what each lane draws with
    rates                             [L]     float64 each, by the names that the optimizer's op has for them
    clip_norm                         [L]     float64, or None
    buffers                           what the lanes' modules start with; replaced by what they end with, [L, ...]
    """

    def __init__(
        self, layout: Extent, config: SwampConfig, lanes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.config = layout, config
        self.weights, self.swa, *moments = (
            torch.zeros(lanes, layout.P, dtype=dtype, device=device) for _ in range(2 + len(MOMENTS[config.optimizer]))
        )
        self.moments = dict(zip(MOMENTS[config.optimizer], moments, strict=True))
        self.masks = torch.zeros(1, layout.Q, dtype=torch.bool, device=device)
        self.run_of_lane = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.keys = torch.zeros(lanes, 3, dtype=torch.int64, device=device)

        def in_each(value: float) -> Tensor:
            return torch.full((lanes,), value, dtype=torch.float64, device=device)

        self.rates = {name: in_each(getattr(config, setting)) for name, setting in RATES[config.optimizer].items()}
        self.clip_norm = None if config.clip_norm is None else in_each(config.clip_norm)
        self.buffers: dict[str, Tensor] = {}

    @property
    def lanes(self) -> int:
        """L."""
        return len(self.weights)

    def rewind_(self, start: Solution, mask: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """Put every lane at `start` under a mask [Q], with fresh moments; cycle None trains the ticket.

        particles  their numbers, one a lane
        """
        self.masks.copy_(mask)
        self.weights.copy_(start.weights.expand_as(self.weights))
        self.weights[:, : self.layout.Q].mul_(self.masks[self.run_of_lane])
        for tensor in (*self.moments.values(), self.swa):
            tensor.zero_()
        streams = [stream_of(cycle, particle) for particle in particles]
        self.keys.copy_(lane_keys([self.config.seed] * self.lanes, streams, self.keys.device))
        self.buffers = {
            name: buffer.expand(self.lanes, *buffer.shape).clone() for name, buffer in start.buffers.items()
        }

    def moving(self) -> dict[str, Tensor]:
        """What a step changes, by name, each [L, P]."""
        return {"weights": self.weights, **self.moments, "swa": self.swa}

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
