"""The reference of masked_adamw_."""

from torch import Tensor

from swamp_fast.ops.reference.segments import segments_of


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
    """Take one masked AdamW step in place; arguments as in swamp_fast/ops/masked_adamw.py."""
    prunable = masks.shape[1]
    for lane in range(weights.shape[0]):
        run = int(run_of_lane[lane])
        pruned, segments = ~masks[run], segments_of(segment_ends, run, weights.shape[1])
        w, mean, square = weights[lane], exp_avg[lane], exp_avg_sq[lane]
        b1, b2, number = (setting[lane].item() for setting in (beta1, beta2, step))
        grad = grads[lane] * (1.0 if grad_scale is None else grad_scale[lane].item())
        mean.lerp_(grad, 1 - b1)
        square.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = square.sqrt().div_((1 - b2**number) ** 0.5).add_(eps[lane].item())
        for part, rate, decay in zip(segments, lr[lane].tolist(), weight_decay[lane].tolist(), strict=True):
            w[part].mul_(1 - rate * decay)
            w[part].addcdiv_(mean[part], root[part], value=-rate / (1 - b1**number))
        for state in (mean, square, w):
            state[:prunable].masked_fill_(pruned, 0)
        if swa is not None and swa_weight is not None and swa_weight[lane] != 0:
            swa[lane].add_(w - swa[lane], alpha=swa_weight[lane].item())
