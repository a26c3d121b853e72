"""ParticleBank: all particles of a training as rows of stacked tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.config import SwampConfig
from swamp_fast.particles.layout import Extent
from swamp_fast.particles.random import lane_keys, stream_of

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
    configs                           of the runs, as many lanes each, one run after the other
    buffers                           what the lanes' modules start with; replaced by what they end with, [L, ...]
    """

    def __init__(
        self, layout: Extent, configs: Sequence[SwampConfig], lanes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.configs, self.config = layout, configs, configs[0]
        config, runs = configs[0], len(configs)
        self.weights, self.swa, *moments = (
            torch.zeros(lanes, layout.P, dtype=dtype, device=device) for _ in range(2 + len(MOMENTS[config.optimizer]))
        )
        self.moments = dict(zip(MOMENTS[config.optimizer], moments, strict=True))
        self.masks = torch.zeros(runs, layout.Q, dtype=torch.bool, device=device)
        self.run_of_lane = torch.arange(runs, device=device).repeat_interleave(lanes // runs)
        self.keys = torch.zeros(lanes, 3, dtype=torch.int64, device=device)

        def of_lanes(setting: str) -> Tensor:
            each = [getattr(own, setting) for own in configs for _ in range(lanes // runs)]
            return torch.tensor(each, dtype=torch.float64, device=device)

        self.rates = {name: of_lanes(setting) for name, setting in RATES[config.optimizer].items()}
        self.clip_norm = None if config.clip_norm is None else of_lanes("clip_norm")
        self.buffers: dict[str, Tensor] = {}

    @property
    def lanes(self) -> int:
        """L."""
        return len(self.weights)

    def rewind_(self, starts: Sequence[Solution], masks: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """Put each run's lanes at its start under its mask [R, Q], with fresh moments; cycle None trains the ticket.

        particles  their numbers in a run, one a lane
        """
        each = len(particles)
        self.masks.copy_(masks)
        for lanes, start in zip(self.weights.split(each), starts, strict=True):
            lanes.copy_(start.weights.expand_as(lanes))
        self.weights[:, : self.layout.Q].mul_(self.masks[self.run_of_lane])
        for tensor in (*self.moments.values(), self.swa):
            tensor.zero_()
        streams = [stream_of(cycle, particle) for particle in particles] * len(starts)
        seeds = [config.seed for config in self.configs for _ in range(each)]
        self.keys.copy_(lane_keys(seeds, streams, self.keys.device))
        self.buffers = {
            name: torch.stack([start.buffers[name] for start in starts]).repeat_interleave(each, 0)
            for name in starts[0].buffers
        }

    def lanes_of(self, run: int) -> slice:
        """Where a run's lanes stand."""
        particles = self.lanes // len(self.configs)
        return slice(run * particles, (run + 1) * particles)

    def of_run(self, run: int) -> ParticleBank:
        """One run's lanes as a bank of their own, sharing their memory."""
        lanes, own = self.lanes_of(run), copy.copy(self)
        own.configs, own.config = [self.configs[run]], self.configs[run]
        own.weights, own.swa, own.keys = self.weights[lanes], self.swa[lanes], self.keys[lanes]
        own.moments = {name: moment[lanes] for name, moment in self.moments.items()}
        own.masks, own.run_of_lane = self.masks[run : run + 1], torch.zeros_like(self.run_of_lane[lanes])
        own.rates = {name: rate[lanes] for name, rate in self.rates.items()}
        own.clip_norm = None if self.clip_norm is None else self.clip_norm[lanes]
        own.buffers = {name: buffer[lanes] for name, buffer in self.buffers.items()}
        return own

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
            state[f"{name}/rest"] = self.rest(tensor).cpu()
        return state

    def rest(self, tensor: Tensor) -> Tensor:
        """What isn't pruned of [L, P], in the layout's order."""
        return tensor[:, self.layout.Q :]

    def put_rest_(self, tensor: Tensor, rest: Tensor) -> None:
        """The inverse of `rest`."""
        tensor[:, self.layout.Q :] = rest

    def load_state_(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` back, under the masks that it was taken under."""
        Q, kept = self.layout.Q, [self.masks[run] for run in self.run_of_lane.tolist()]
        counts = [int(mask.sum()) for mask in kept]
        for name, tensor in self.moving().items():
            values = state[f"{name}/kept"].to(tensor.device).split(counts)
            for lane, mask, own in zip(tensor, kept, values, strict=True):
                lane[:Q].masked_scatter_(mask, own)
            self.put_rest_(tensor, state[f"{name}/rest"].to(tensor.device))

    def solutions(self, averaged: bool) -> Tensor:
        """What the lanes trained to, [L, P]: their SWA means, or their last iterates."""
        return self.swa if averaged else self.weights
