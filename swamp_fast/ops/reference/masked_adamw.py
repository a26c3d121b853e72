"""The reference of masked_adamw_."""

from torch import Tensor


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
) -> None:
    """Take one masked AdamW step in place; arguments as in swamp_fast/ops/masked_adamw.py."""
    prunable = masks.shape[1]
    for lane in range(weights.shape[0]):
        pruned = ~masks[run_of_lane[lane]]
        w, mean, square = weights[lane], exp_avg[lane], exp_avg_sq[lane]
        rate, b1, b2, number = (setting[lane].item() for setting in (lr, beta1, beta2, step))
        grad = grads[lane] * (1.0 if grad_scale is None else grad_scale[lane].item())
        mean.lerp_(grad, 1 - b1)
        square.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        w.mul_(1 - rate * weight_decay[lane].item())
        w.addcdiv_(
            mean,
            square.sqrt().div_((1 - b2**number) ** 0.5).add_(eps[lane].item()),
            value=-rate / (1 - b1**number),
        )
        for state in (mean, square, w):
            state[:prunable].masked_fill_(pruned, 0)
        if swa is not None and swa_weight is not None and swa_weight[lane] != 0:
            swa[lane].add_(w - swa[lane], alpha=swa_weight[lane].item())
