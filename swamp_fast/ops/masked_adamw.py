"""masked_adamw_: the masked AdamW step and the SWA running mean of every lane, in one pass over the bank."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


def masked_adamw_(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    masks: Tensor,
    run_of_lane: Tensor,
    *,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    grad_scale: Tensor | None = None,
    swa: Tensor | None = None,
    swa_weight: Tensor | None = None,
    segment_ends: Tensor | None = None,
) -> None:
    """Take one AdamW step in place. Afterwards, every pruned weight and both its moments are exactly 0.

        g    = grad_scale * grads
        m    = mask * (beta1 * m + (1 - beta1) * g)
        v    = mask * (beta2 * v + (1 - beta2) * g^2)
        w    = mask * (w * (1 - lr * weight_decay)
                       - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps))
        swa += (w - swa) * swa_weight

    weights       [L, P]  w, float32 or float64, changed in place; the row stride may exceed P
    grads         [L, P]  as weights
    exp_avg       [L, P]  m, the first moment, as weights, changed in place; zeros before the first step
    exp_avg_sq    [L, P]  v, the second moment, as weights, changed in place; zeros before the first step
    masks         [R, Q]  bool, False for pruned weights; parameters Q … P have no mask
    run_of_lane   [L]     int64, the run of each lane; lanes use their run's mask
    lr            [L, S]  float64, the learning rate of each segment
    beta1, beta2  [L]     float64, the moments' decay rates, in [0, 1)
    eps           [L]     float64, added to the root of the second moment; must be above 0 to avoid 0/0
    weight_decay  [L, S]  float64, multiplied by lr
    step          [L]     float64, the number of this step for the bias correction, counted from 1
    grad_scale    [L]     float64, the factor of each lane's gradient (see clip_scale); None for 1
    swa           [L, P]  the running mean of the weights, changed in place, or None
    swa_weight    [L]     float64, 1 / (number of samples in the mean, with this one); with 0 a lane's mean stays
    segment_ends  [R, S]  int64, the end of each segment in the vector of a run, the last is P; None for one segment

    Raises ValueError or TypeError if a shape, dtype or device is wrong.
    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2. The rounding is that of torch.optim.AdamW.
    """
    c = Contract("masked_adamw_")
    c.tensor("weights", weights, "L P", FLOATS, rows=True)
    for name, state in (("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        c.tensor(name, state, "L P", [weights.dtype], rows=True)
    c.lanes(masks, run_of_lane)
    c.segments(segment_ends, lr=lr, weight_decay=weight_decay)
    c.rates(beta1=beta1, beta2=beta2, eps=eps, step=step)
    c.update(weights, grad_scale, swa, swa_weight)
    torch.ops.swamp_fast.masked_adamw_(
        *(weights, grads, exp_avg, exp_avg_sq, masks, run_of_lane),
        *(lr, beta1, beta2, eps, weight_decay, step),
        *(grad_scale, swa, swa_weight, segment_ends),
    )


def _cpu(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    masks: Tensor,
    run_of_lane: Tensor,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    grad_scale: Tensor | None,
    swa: Tensor | None,
    swa_weight: Tensor | None,
    segment_ends: Tensor | None,
) -> None:
    kernel = native().masked_adamw_float32 if weights.dtype == torch.float32 else native().masked_adamw_float64
    kernel(
        *(weights.data_ptr(), weights.stride(0)),
        *(grads.data_ptr(), grads.stride(0)),
        *(exp_avg.data_ptr(), exp_avg.stride(0)),
        *(exp_avg_sq.data_ptr(), exp_avg_sq.stride(0)),
        *((swa.data_ptr(), swa.stride(0)) if swa is not None else (0, 0)),
        *(masks.data_ptr(), masks.stride(0), run_of_lane.data_ptr()),
        segment_ends.data_ptr() if segment_ends is not None else 0,
        *(each.data_ptr() for each in (lr, beta1, beta2, eps, weight_decay, step)),
        grad_scale.data_ptr() if grad_scale is not None else 0,
        swa_weight.data_ptr() if swa_weight is not None else 0,
        *(weights.shape[0], weights.shape[1], masks.shape[1], lr.shape[1]),
        torch.get_num_threads(),
    )


def _cuda(weights: Tensor, *rest: object) -> None:
    triton_kernels("masked_adamw").masked_adamw_(weights, *rest)


def _fake(weights: Tensor, *rest: object) -> None:
    return None


register(
    "masked_adamw_(Tensor(a!) weights, Tensor grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor masks, "
    "Tensor run_of_lane, Tensor lr, Tensor beta1, Tensor beta2, Tensor eps, Tensor weight_decay, Tensor step, "
    "Tensor? grad_scale, Tensor(d!)? swa, Tensor? swa_weight, Tensor? segment_ends) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
