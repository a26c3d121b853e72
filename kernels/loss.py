"""cross_entropy: the mean loss of every lane, and its gradient, in one launch."""

import torch
import triton
import triton.language as tl

ELEMENTS = {4: 2048, 8: 1024}  # of a block of samples and classes, by the bytes of a number
MOST_CLASSES = 1024
IGNORED = -100  # torch's target of a sample without a loss


@triton.jit(do_not_specialize=["samples"])
def cross_entropy_kernel(
    outputs,  # [L, B, K]
    targets,  # [L, B] int64
    losses,  # [L] written
    out_grad,  # [L, B, K] written
    samples,
    classes,
    SKIP: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    kind = outputs.dtype.element_ty
    k = tl.arange(0, BLOCK_CLASSES)
    total = tl.zeros((BLOCK_SAMPLES,), kind)
    for begin in range(0, samples, BLOCK_SAMPLES):
        b = begin + tl.arange(0, BLOCK_SAMPLES)
        at = (lane * samples + b)[:, None] * classes + k[None, :]
        inside = (b < samples)[:, None] & (k < classes)[None, :]
        value = tl.load(outputs + at, mask=inside, other=0.0)
        value = tl.where((k < classes)[None, :], value, float("-inf"))
        target = tl.load(targets + lane * samples + b, mask=b < samples, other=SKIP)
        chosen = k[None, :] == target[:, None]
        most = tl.max(value, 1)
        power = tl.exp(value - most[:, None])
        sums = tl.sum(power, 1)
        loss = tl.log(sums) + (most - tl.sum(tl.where(chosen, value, 0.0), 1))
        counts = target != SKIP
        wrong = counts & ((target < 0) | (target >= classes))
        total += tl.where(counts, tl.where(wrong, float("nan"), loss), 0.0)
        grad = (power / sums[:, None] - chosen.to(kind)) / samples
        tl.store(out_grad + at, tl.where(counts[:, None], grad, 0.0), mask=inside)
    tl.store(losses + lane, tl.sum(total, 0) / samples)


def cross_entropy(outputs, targets):
    """Launch the mean cross-entropy of each lane, [L], and its gradient by outputs [L, B, K], K at most MOST_CLASSES.

    A target of IGNORED counts as a loss of 0, as in torch; any other that is no class makes the lane's loss NaN.
    """
    lanes, samples, classes = outputs.shape
    losses, out_grad = torch.empty_like(outputs[:, 0, 0]), torch.empty_like(outputs)
    block = max(16, triton.next_power_of_2(classes))
    with torch.cuda.device_of(outputs):
        cross_entropy_kernel[(lanes,)](
            *(outputs, targets, losses, out_grad, samples, classes),
            SKIP=IGNORED,
            BLOCK_SAMPLES=ELEMENTS[outputs.element_size()] // block,
            BLOCK_CLASSES=block,
            enable_fp_fusion=False,
            num_warps=8,
        )
    return losses, out_grad
