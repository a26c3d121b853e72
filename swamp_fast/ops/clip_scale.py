"""The factor that scales each lane's gradient down so that its norm is at most a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


def clip_scale(grads: Tensor, masks: Tensor, run_of_lane: Tensor, clip_norm: Tensor) -> Tensor:
    """Compute min(1, clip_norm / (norm + 1e-6)) of each lane, where norm is the Euclidean norm of its kept gradient.

    It is summed in float64, in an order that P and Q alone decide. A norm that is not finite gives NaN, so that a
    diverging lane shows. The result is meant for the `grad_scale` of masked_sgd_ and masked_adamw_.

    grads        [L, P]  float32 or float64; rows may be strided
    masks        [R, Q]  bool, False is pruned and doesn't count; parameters Q … P have no mask and count
    run_of_lane  [L]     int64, the run that a lane belongs to, whose mask it uses
    clip_norm    [L]     float64, the bound, above 0

    Returns [L] float64. Raises ValueError or TypeError for shapes, types or devices that don't fit.
    Source: torch.nn.utils.clip_grad_norm_, on gradients that are zero where pruned.
    """
    c = Contract("clip_scale")
    c.tensor("grads", grads, "L P", FLOATS, rows=True)
    c.lanes(masks, run_of_lane)
    c.rates(clip_norm=clip_norm)
    scale: Tensor = torch.ops.swamp_fast.clip_scale(grads, masks, run_of_lane, clip_norm)
    return scale


def _cpu(grads: Tensor, masks: Tensor, run_of_lane: Tensor, clip_norm: Tensor) -> Tensor:
    scale = torch.empty_like(clip_norm)
    kernel = native().clip_scale_float32 if grads.dtype == torch.float32 else native().clip_scale_float64
    kernel(
        *(grads.data_ptr(), grads.stride(0)),
        *(masks.data_ptr(), masks.stride(0)),
        *(run_of_lane.data_ptr(), clip_norm.data_ptr(), scale.data_ptr()),
        *(grads.shape[0], grads.shape[1], masks.shape[1]),
        torch.get_num_threads(),
    )
    return scale


def _cuda(grads: Tensor, masks: Tensor, run_of_lane: Tensor, clip_norm: Tensor) -> Tensor:
    scale: Tensor = triton_kernels("clip_scale").clip_scale(grads, masks, run_of_lane, clip_norm)
    return scale


def _fake(grads: Tensor, masks: Tensor, run_of_lane: Tensor, clip_norm: Tensor) -> Tensor:
    return torch.empty_like(clip_norm)


register(
    "clip_scale(Tensor grads, Tensor masks, Tensor run_of_lane, Tensor clip_norm) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
