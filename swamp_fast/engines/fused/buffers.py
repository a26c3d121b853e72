"""The lanes' modules as the fused engine needs them: without weights, their running statistics side by side."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.engines.eager.lane_by_lane import read_buffers, write_buffers


class Buffers:
    """Modules that hold the lanes' buffers, and whether they train.

    mean, variance  [L, channels of all norms]  running statistics, of which the modules' buffers are views
    batches         [L, norms]                  how many they have seen
    """

    def __init__(self, template: nn.Module, norms: tuple[str, ...], lanes: int, dtype: torch.dtype) -> None:
        self.modules: list[nn.Module] = [_without_weights(template) for _ in range(lanes)]
        self.norms: list[list[Any]] = [[module.get_submodule(path) for path in norms] for module in self.modules]
        device = next(template.parameters()).device
        channels = [len(norm.running_mean) for norm in self.norms[0]]
        self.mean, self.variance = torch.zeros(2, lanes, sum(channels), dtype=dtype, device=device)
        self.batches = torch.zeros(lanes, len(channels), dtype=torch.int64, device=device)
        for lane, own in enumerate(self.norms):
            begin = 0
            for place, norm in enumerate(own):
                end = begin + channels[place]
                self.mean[lane, begin:end], self.variance[lane, begin:end] = norm.running_mean, norm.running_var
                self.batches[lane, place] = norm.num_batches_tracked
                norm.running_mean, norm.running_var = self.mean[lane, begin:end], self.variance[lane, begin:end]
                norm.num_batches_tracked = self.batches[lane, place]
                begin = end

    @property
    def by_batch(self) -> bool:
        """Whether the norms use a batch's statistics, and move the running ones."""
        return bool(self.norms[0]) and bool(self.norms[0][0].training)

    def move(self, lanes: slice, mean: Tensor, variance: Tensor, columns: Tensor | None = None) -> None:
        """Running statistics of some lanes, towards a batch's mean and unbiased variance [lanes, channels].

        columns  of which channels those are, if not of all
        """
        momentum = float(self.norms[0][0].momentum)
        for running, batch in ((self.mean[lanes], mean), (self.variance[lanes], variance)):
            if columns is None:
                running.lerp_(batch, momentum)
            else:
                running.index_copy_(1, columns, running[:, columns].lerp(batch, momentum))
        self.batches[lanes].add_(1)

    def write(self, buffers: dict[str, Tensor]) -> None:
        """Write buffers [L, ...] into the modules."""
        write_buffers(self.modules, buffers)

    def read(self) -> dict[str, Tensor]:
        """The modules' buffers as they are now, [L, ...]."""
        return read_buffers(self.modules)


def _without_weights(template: nn.Module) -> nn.Module:
    module = copy.deepcopy(template)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return module
