"""The reference of masked_sgd_."""

from torch import Tensor

from swamp_fast.ops.reference.segments import segments_of


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
    """Take one masked SGD step in place; arguments as in swamp_fast/ops/masked_sgd.py."""
    prunable = masks.shape[1]
    for lane in range(weights.shape[0]):
        run = int(run_of_lane[lane])
        pruned, segments = ~masks[run], segments_of(segment_ends, run, weights.shape[1])
        w, buffer = weights[lane], momentum_buffer[lane]
        step = grads[lane] * (1.0 if grad_scale is None else grad_scale[lane].item())
        for part, decay in zip(segments, weight_decay[lane].tolist(), strict=True):
            step[part].add_(w[part], alpha=decay)
        step[:prunable].masked_fill_(pruned, 0)
        buffer.mul_(momentum[lane].item()).add_(step)
        buffer[:prunable].masked_fill_(pruned, 0)
        step = step.add(buffer, alpha=momentum[lane].item()) if nesterov else buffer
        for part, rate in zip(segments, lr[lane].tolist(), strict=True):
            w[part].add_(step[part], alpha=-rate)
        w[:prunable].masked_fill_(pruned, 0)
        if swa is not None and swa_weight is not None and swa_weight[lane] != 0:
            swa[lane].add_(w - swa[lane], alpha=swa_weight[lane].item())
