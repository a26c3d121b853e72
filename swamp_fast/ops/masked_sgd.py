"""masked_sgd_: the masked SGD step and the SWA running mean of every lane, in one pass over the bank."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


def masked_sgd_(
    weights: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    masks: Tensor,
    run_of_lane: Tensor,
    *,
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    swa: Tensor | None = None,
    swa_weight: Tensor | None = None,
    segment_ends: Tensor | None = None,
) -> None:
    """Take one SGD step in place. Afterwards, every pruned weight and its momentum are exactly 0.

        g    = mask * (grad_scale * grads + weight_decay * w)
        v    = mask * (momentum * v + g)
        w    = mask * (w - lr * v), or with Nesterov's momentum mask * (w - lr * (g + momentum * v))
        swa += (w - swa) * swa_weight

    The rounding is that of torch.optim.SGD.

    weights          [L, P]  w, float32 or float64, changed in place; the row stride may exceed P
    grads            [L, P]  as weights
    momentum_buffer  [L, P]  v, as weights, changed in place; zeros before the first step
    masks            [R, Q]  bool, False for pruned weights; parameters Q … P have no mask
    run_of_lane      [L]     int64, the run of each lane; lanes use their run's mask
    lr               [L, S]  float64, the learning rate of each segment
    momentum         [L]     float64, 0 for plain SGD
    weight_decay     [L, S]  float64, the factor of w that is added to the gradient
    nesterov                 whether to use Nesterov's momentum
    grad_scale       [L]     float64, the factor of each lane's gradient (see clip_scale); None for 1
    swa              [L, P]  the running mean of the weights, changed in place, or None
    swa_weight       [L]     float64, 1 / (number of samples in the mean, with this one); with 0 a lane's mean stays
    segment_ends     [R, S]  int64, the end of each segment in the vector of a run, the last is P; None for one segment

    Raises ValueError or TypeError if a shape, dtype or device is wrong.
    Source: torch.optim.SGD (dampening 0); Izmailov et al. 2018, arXiv 1803.05407, for the running mean.
    """
    c = Contract("masked_sgd_")
    c.tensor("weights", weights, "L P", FLOATS, rows=True)
    c.tensor("grads", grads, "L P", [weights.dtype], rows=True)
    c.tensor("momentum_buffer", momentum_buffer, "L P", [weights.dtype], rows=True)
    c.lanes(masks, run_of_lane)
    c.segments(segment_ends, lr=lr, weight_decay=weight_decay)
    c.rates(momentum=momentum)
    c.update(weights, grad_scale, swa, swa_weight)
    torch.ops.swamp_fast.masked_sgd_(
        weights,
        grads,
        momentum_buffer,
        masks,
        run_of_lane,
        lr,
        momentum,
        weight_decay,
        nesterov,
        grad_scale,
        swa,
        swa_weight,
        segment_ends,
    )


def _cpu(
    weights: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    masks: Tensor,
    run_of_lane: Tensor,
    lr: Tensor,
    momentum: Tensor,
    weight_decay: Tensor,
    nesterov: bool,
    grad_scale: Tensor | None,
    swa: Tensor | None,
    swa_weight: Tensor | None,
    segment_ends: Tensor | None,
) -> None:
    kernel = native().masked_sgd_float32 if weights.dtype == torch.float32 else native().masked_sgd_float64
    kernel(
        *(weights.data_ptr(), weights.stride(0)),
        *(grads.data_ptr(), grads.stride(0)),
        *(momentum_buffer.data_ptr(), momentum_buffer.stride(0)),
        *((swa.data_ptr(), swa.stride(0)) if swa is not None else (0, 0)),
        *(masks.data_ptr(), masks.stride(0)),
        run_of_lane.data_ptr(),
        segment_ends.data_ptr() if segment_ends is not None else 0,
        *(lr.data_ptr(), momentum.data_ptr(), weight_decay.data_ptr()),
        grad_scale.data_ptr() if grad_scale is not None else 0,
        swa_weight.data_ptr() if swa_weight is not None else 0,
        *(weights.shape[0], weights.shape[1], masks.shape[1], lr.shape[1]),
        nesterov,
        torch.get_num_threads(),
    )


def _cuda(weights: Tensor, *rest: object) -> None:
    triton_kernels("masked_sgd").masked_sgd_(weights, *rest)


def _fake(weights: Tensor, *rest: object) -> None:
    return None


register(
    "masked_sgd_(Tensor(a!) weights, Tensor grads, Tensor(b!) momentum_buffer, Tensor masks, Tensor run_of_lane, "
    "Tensor lr, Tensor momentum, Tensor weight_decay, bool nesterov, Tensor? grad_scale, Tensor(c!)? swa, "
    "Tensor? swa_weight, Tensor? segment_ends) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
