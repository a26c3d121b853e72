"""ParticleBank holds all particles that are trained together, as rows of stacked tensors."""

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
# Optimizer -> {rate that the optimizer's op takes for each lane: setting of SwampConfig that gives it}.
RATES = {"sgd": {"momentum": "momentum"}, "adamw": {"beta1": "beta1", "beta2": "beta2", "eps": "adam_eps"}}


@dataclass(frozen=True)
class Solution:
    """The weights [P] and the buffers, by name, of one model: a ticket, a particle or an average."""

    weights: Tensor
    buffers: dict[str, Tensor]


class ParticleBank:
    """The weights of L lanes with their optimizer moments and SWA means, and R masks.

    Each of the R runs has L / R consecutive lanes. The bank keeps the same tensors from cycle to cycle, because CUDA
    graphs hold their addresses.

    weights, swa  [L, P]    the current weights, and their SWA means
    moments       [L, P]    each; by the names of the optimizer op's arguments
    masks         [R, Q]    bool: one mask per run
    run_of_lane   [L]       int64: the number of each lane's run
    keys          [L, 3]    int64: the key (seed, stream, 0) of each lane's random draws
    rates         [L]       float64 each; by the names of the optimizer op's arguments
    weight_decay  [L, S]    float64: the weight decay of each segment of the layout
    lr_factors    [S]       float64: the factor of the learning rate in each segment
    segment_ends  [R, S]    int64: the index after each segment in the vector of each run; None for one segment
    clip_norm     [L]       float64: the largest norm of each lane's gradient; None doesn't clip
    buffers       [L, ...]  each; the modules' buffers by name, at the start of a training, and afterwards at its end
    configs       the settings of the R runs
    """

    def __init__(
        self,
        layout: Extent,
        configs: Sequence[SwampConfig],
        lanes: int,
        dtype: torch.dtype,
        device: torch.device,
        own_optimizer: bool = False,
    ) -> None:
        """Allocate the tensors; without moments if the runs have optimizers of their own, which keep theirs."""
        self.layout, self.configs, self.config = layout, configs, configs[0]
        config, runs = configs[0], len(configs)
        names = () if own_optimizer else MOMENTS[config.optimizer]
        self.weights, self.swa, *moments = (
            torch.zeros(lanes, layout.P, dtype=dtype, device=device) for _ in range(2 + len(names))
        )
        self.moments = dict(zip(names, moments, strict=True))
        self.masks = torch.zeros(runs, layout.Q, dtype=torch.bool, device=device)
        self.run_of_lane = torch.arange(runs, device=device).repeat_interleave(lanes // runs)
        self.keys = torch.zeros(lanes, 3, dtype=torch.int64, device=device)

        def of_lanes(setting: str) -> Tensor:
            values = [getattr(config, setting) for config in configs for _ in range(lanes // runs)]
            return torch.tensor(values, dtype=torch.float64, device=device)

        self.rates = {name: of_lanes(setting) for name, setting in RATES[config.optimizer].items()}
        decays = [
            config.weight_decay if segment.rates.weight_decay is None else segment.rates.weight_decay
            for config in configs
            for _ in range(lanes // runs)
            for segment in layout.segments
        ]
        factors = [segment.rates.lr_factor for segment in layout.segments]
        self.weight_decay = torch.tensor(decays, dtype=torch.float64, device=device).view(lanes, len(factors))
        self.lr_factors = torch.tensor(factors, dtype=torch.float64, device=device)
        self.segment_ends = segment_ends_of([layout] * runs, device)
        self.clip_norm = None if config.clip_norm is None else of_lanes("clip_norm")
        self.buffers: dict[str, Tensor] = {}

    @property
    def lanes(self) -> int:
        """The number of lanes L."""
        return len(self.weights)

    def rewind_(self, starts: Sequence[Solution], masks: Tensor, particles: Sequence[int], cycle: int | None) -> None:
        """Set the lanes of each run to the run's start, with pruned weights, moments and SWA means of 0.

        starts     the start of each run
        masks      [R, Q]  the mask of each run
        particles  the numbers of the particles that a run's lanes train, the same for each run
        cycle      None for the ticket's training
        """
        count = len(particles)
        self.masks.copy_(masks)
        for lanes, start in zip(self.weights.split(count), starts, strict=True):
            lanes.copy_(start.weights.expand_as(lanes))
        self.weights[:, : self.layout.Q].mul_(self.masks[self.run_of_lane])
        for tensor in (*self.moments.values(), self.swa):
            tensor.zero_()
        streams = [stream_of(cycle, particle) for particle in particles] * len(starts)
        seeds = [config.seed for config in self.configs for _ in range(count)]
        self.keys.copy_(lane_keys(seeds, streams, self.keys.device))
        self.buffers = {
            name: torch.stack([start.buffers[name] for start in starts]).repeat_interleave(count, 0)
            for name in starts[0].buffers
        }

    def lanes_of(self, run: int) -> slice:
        """Return the slice of a run's lanes."""
        particles = self.lanes // len(self.configs)
        return slice(run * particles, (run + 1) * particles)

    def of_run(self, run: int) -> ParticleBank:
        """Return the lanes of one run as a bank, which shares memory with this one."""
        lanes, part = self.lanes_of(run), copy.copy(self)
        part.configs, part.config = [self.configs[run]], self.configs[run]
        part.weights, part.swa, part.keys = self.weights[lanes], self.swa[lanes], self.keys[lanes]
        part.moments = {name: moment[lanes] for name, moment in self.moments.items()}
        part.masks, part.run_of_lane = self.masks[run : run + 1], torch.zeros_like(self.run_of_lane[lanes])
        part.rates = {name: rate[lanes] for name, rate in self.rates.items()}
        part.weight_decay = self.weight_decay[lanes]
        part.segment_ends = None if self.segment_ends is None else self.segment_ends[run : run + 1]
        part.clip_norm = None if self.clip_norm is None else self.clip_norm[lanes]
        part.buffers = {name: buffer[lanes] for name, buffer in self.buffers.items()}
        return part

    def moving(self) -> dict[str, Tensor]:
        """Return the tensors [L, P] that a step changes, by name."""
        return {"weights": self.weights, **self.moments, "swa": self.swa}

    def state(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, on the CPU: those that a step changes, without the pruned weights.

        NAME/kept holds the kept weights of all lanes, one lane after the other; NAME/rest holds the parameters that are
        not prunable. Every engine returns the same state.
        """
        Q, kept = self.layout.Q, [self.masks[run] for run in self.run_of_lane.tolist()]
        state = {}
        for name, tensor in self.moving().items():
            pairs = zip(tensor, kept, strict=True)
            state[f"{name}/kept"] = torch.cat([lane[:Q].masked_select(mask).cpu() for lane, mask in pairs])
            state[f"{name}/rest"] = self.rest(tensor).cpu()
        return state

    def rest(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor [L, P] that is not prunable, in the layout's order."""
        return tensor[:, self.layout.Q :]

    def put_rest_(self, tensor: Tensor, rest: Tensor) -> None:
        """Write the part of a tensor [L, P] that `rest` returns."""
        tensor[:, self.layout.Q :] = rest

    def load_state_(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state`. The bank's masks must be the same as when `state` was called."""
        Q, kept = self.layout.Q, [self.masks[run] for run in self.run_of_lane.tolist()]
        counts = [int(mask.sum()) for mask in kept]
        for name, tensor in self.moving().items():
            values = state[f"{name}/kept"].to(tensor.device).split(counts)
            for lane, mask, value in zip(tensor, kept, values, strict=True):
                lane[:Q].masked_scatter_(mask, value)
            self.put_rest_(tensor, state[f"{name}/rest"].to(tensor.device))

    def solutions(self, averaged: bool) -> Tensor:
        """Return the trained weights [L, P]: SWA means if `averaged`, else the last iterates."""
        return self.expanded(self.swa if averaged else self.weights)

    def expanded(self, tensor: Tensor) -> Tensor:
        """Return a tensor [L, P] of the bank in the layout's full length; here that is the tensor itself."""
        return tensor

    def put_expanded_(self, tensor: Tensor, full: Tensor) -> None:
        """Write what `expanded` returned, and what has been changed since, into the tensor [L, P] of the bank."""
        if full is not tensor:
            tensor.copy_(full)

    def expanded_masks(self) -> Tensor:
        """Return the masks [R, Q] of the runs in the layout's full length."""
        return self.masks


def segment_ends_of(layouts: Sequence[Extent], device: torch.device) -> Tensor | None:
    """Return the ends of the segments in the vectors of R runs, int64 [R, S]; None for one segment."""
    if len(layouts[0].segments) == 1:
        return None
    ends = [[segment.end for segment in layout.segments] for layout in layouts]
    return torch.tensor(ends, dtype=torch.int64, device=device)
