"""The reference of particle_mean."""

import torch
from torch import Tensor


def particle_mean(weights: Tensor, run_of_lane: Tensor, runs: int) -> Tensor:
    """The mean [R, P] of each run's lanes; arguments as in swamp_fast/ops/particle_mean.py."""
    means = []
    for run in range(runs):
        lanes = weights[run_of_lane == run].double()
        total = torch.zeros_like(lanes[0])
        for lane in lanes:
            total += lane
        # Divide by a tensor: by a Python number, torch on CUDA would multiply by the rounded reciprocal.
        means.append(total / total.new_tensor(len(lanes)))
    return torch.stack(means).to(weights.dtype)
