"""Buffers: one copy of the model per lane, stripped of its weights, whose BatchNorm statistics are stored stacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.copying import copy_of
from swamp_fast.engines.lane_by_lane import read_buffers, write_buffers


class Buffers:
    """One module per lane, which holds the lane's buffers and whether the lane is in training or evaluation mode.

    mean, variance  [L, channels of all norms]  running statistics; the modules' buffers are views of them
    batches         [L, norms]                  how many batches the statistics contain; num_batches_tracked is a view
    """

    def __init__(self, template: nn.Module, norms: tuple[str, ...], lanes: int, dtype: torch.dtype) -> None:
        self.modules: list[nn.Module] = [_without_weights(template) for _ in range(lanes)]
        self.norms: list[list[Any]] = [[module.get_submodule(path) for path in norms] for module in self.modules]
        device = next(template.parameters()).device
        channels = [len(norm.running_mean) for norm in self.norms[0]]
        self.mean, self.variance = torch.zeros(2, lanes, sum(channels), dtype=dtype, device=device)
        self.batches = torch.zeros(lanes, len(channels), dtype=torch.int64, device=device)
        for lane, norms_of_lane in enumerate(self.norms):
            begin = 0
            for place, norm in enumerate(norms_of_lane):
                end = begin + channels[place]
                self.mean[lane, begin:end], self.variance[lane, begin:end] = norm.running_mean, norm.running_var
                self.batches[lane, place] = norm.num_batches_tracked
                norm.running_mean, norm.running_var = self.mean[lane, begin:end], self.variance[lane, begin:end]
                norm.num_batches_tracked = self.batches[lane, place]
                begin = end

    @property
    def by_batch(self) -> bool:
        """Whether the norms use the batch's statistics and update the running statistics (training mode)."""
        return bool(self.norms[0]) and bool(self.norms[0][0].training)

    def update(self, lanes: slice, mean: Tensor, variance: Tensor, columns: Tensor | None = None) -> None:
        """Update the running statistics of `lanes` with a batch's mean and unbiased variance, both [lanes, channels].

        columns  the index of each given channel among the channels of all norms; None if all channels are given
        """
        momentum = float(self.norms[0][0].momentum)
        for running, batch in ((self.mean[lanes], mean), (self.variance[lanes], variance)):
            if columns is None:
                running.lerp_(batch, momentum)
            else:
                running.index_copy_(1, columns, running[:, columns].lerp(batch, momentum))
        self.batches[lanes].add_(1)

    def write(self, buffers: dict[str, Tensor]) -> None:
        """Copy buffers [L, ...] into the modules."""
        write_buffers(self.modules, buffers)

    def read(self) -> dict[str, Tensor]:
        """Return the modules' current buffers [L, ...]."""
        return read_buffers(self.modules)


def _without_weights(template: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are empty tensors."""
    module = copy_of(template)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return module
