"""The masked SGD step of every lane with the SWA running mean, in one pass over the bank."""

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
) -> None:
    """One SGD step in place; a pruned weight and its momentum are exactly 0 afterwards.

        g    = mask * (grad_scale * grads + weight_decay * weights)
        v    = mask * (momentum * v + g)
        w    = mask * (w - lr * v), or with Nesterov's momentum mask * (w - lr * (g + momentum * v))
        swa += (w - swa) * swa_weight

    It rounds as torch.optim.SGD does.

    weights          [L, P]  float32 or float64, changed in place; rows may be strided
    grads            [L, P]  like weights
    momentum_buffer  [L, P]  like weights, changed in place; zeros before the first step
    masks            [R, Q]  bool, False is pruned; parameters Q … P have no mask
    run_of_lane      [L]     int64, the run that a lane belongs to, whose mask it uses
    lr               [L]     float64, step size
    momentum         [L]     float64, 0 is plain SGD
    weight_decay     [L]     float64, 1/step
    grad_scale       [L]     float64, factor of a lane's gradient (see clip_scale), or None
    swa              [L, P]  running mean of the weights, changed in place, or None
    swa_weight       [L]     float64, 1 / (samples of the mean with this one); 0 leaves a lane's mean alone

    Raises ValueError or TypeError for shapes, types or devices that don't fit.
    Source: torch.optim.SGD (dampening 0); Izmailov et al. 2018, arXiv 1803.05407, equation of the running mean.
    """
    c = Contract("masked_sgd_")
    c.tensor("weights", weights, "L P", FLOATS, rows=True)
    c.tensor("grads", grads, "L P", [weights.dtype], rows=True)
    c.tensor("momentum_buffer", momentum_buffer, "L P", [weights.dtype], rows=True)
    c.lanes(masks, run_of_lane)
    c.rates(lr=lr, momentum=momentum, weight_decay=weight_decay)
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
) -> None:
    kernel = native().masked_sgd_float32 if weights.dtype == torch.float32 else native().masked_sgd_float64
    kernel(
        *(weights.data_ptr(), weights.stride(0)),
        *(grads.data_ptr(), grads.stride(0)),
        *(momentum_buffer.data_ptr(), momentum_buffer.stride(0)),
        *((swa.data_ptr(), swa.stride(0)) if swa is not None else (0, 0)),
        *(masks.data_ptr(), masks.stride(0)),
        *(run_of_lane.data_ptr(), lr.data_ptr(), momentum.data_ptr(), weight_decay.data_ptr()),
        grad_scale.data_ptr() if grad_scale is not None else 0,
        swa_weight.data_ptr() if swa_weight is not None else 0,
        *(weights.shape[0], weights.shape[1], masks.shape[1]),
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
    "Tensor? swa_weight) -> ()",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
