"""The reference of masked_sgd_."""

from torch import Tensor


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
    """Take one masked SGD step in place; arguments as in swamp_fast/ops/masked_sgd.py."""
    prunable = masks.shape[1]
    for lane in range(weights.shape[0]):
        pruned = ~masks[run_of_lane[lane]]
        w, buffer = weights[lane], momentum_buffer[lane]
        grad = grads[lane] * (1.0 if grad_scale is None else grad_scale[lane].item())
        step = grad.add(w, alpha=weight_decay[lane].item())
        step[:prunable].masked_fill_(pruned, 0)
        buffer.mul_(momentum[lane].item()).add_(step)
        buffer[:prunable].masked_fill_(pruned, 0)
        step = step.add(buffer, alpha=momentum[lane].item()) if nesterov else buffer
        w.add_(step, alpha=-lr[lane].item())
        w[:prunable].masked_fill_(pruned, 0)
        if swa is not None and swa_weight is not None and swa_weight[lane] != 0:
            swa[lane].add_(w - swa[lane], alpha=swa_weight[lane].item())
