"""clip_scale: the factor that limits the norm of each lane's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


def clip_scale(grads: Tensor, masks: Tensor, run_of_lane: Tensor, clip_norm: Tensor) -> Tensor:
    """Compute min(1, clip_norm / (norm + 1e-6)) for each lane, where norm is the Euclidean norm of its kept gradient.

    The squares are summed in float64, in an order that depends only on P and Q. If the norm is not finite, the result
    is NaN, so that clipping does not hide a diverging lane. The result serves as the `grad_scale` of masked_sgd_ and
    masked_adamw_.

    grads        [L, P]  float32 or float64; the row stride may exceed P
    masks        [R, Q]  bool, False for pruned weights, which do not count; parameters Q … P have no mask and count
    run_of_lane  [L]     int64, the run of each lane; lanes use their run's mask
    clip_norm    [L]     float64, the bound, above 0

    Returns [L] float64. Raises ValueError or TypeError if a shape, dtype or device is wrong.
    Source: torch.nn.utils.clip_grad_norm_, on gradients that are 0 for pruned weights.
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
