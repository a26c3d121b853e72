"""The reference of clip_scale."""

import torch
from torch import Tensor


def clip_scale(grads: Tensor, masks: Tensor, run_of_lane: Tensor, clip_norm: Tensor) -> Tensor:
    """The factor [L] that limits each lane's gradient norm; arguments as in swamp_fast/ops/clip_scale.py."""
    kept = grads.to(torch.float64, copy=True)
    kept[:, : masks.shape[1]].masked_fill_(~masks[run_of_lane], 0)
    norm = kept.square().sum(1).sqrt()
    scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return scale.masked_fill(~norm.isfinite(), torch.nan)
