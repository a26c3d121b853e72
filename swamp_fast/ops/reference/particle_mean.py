"""The reference of particle_mean."""

import torch
from torch import Tensor


def particle_mean(weights: Tensor, run_of_lane: Tensor, runs: int) -> Tensor:
    """Average the lanes of each run; the contract is in swamp_fast/ops/particle_mean.py."""
    means = []
    for run in range(runs):
        lanes = weights[run_of_lane == run].double()
        total = torch.zeros_like(lanes[0])
        for lane in lanes:
            total += lane
        means.append(total / total.new_tensor(len(lanes)))  # CUDA multiplies by a Python number's reciprocal
    return torch.stack(means).to(weights.dtype)
