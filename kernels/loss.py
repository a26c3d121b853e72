"""cross_entropy: each lane's mean loss and its gradient, in one launch."""

import torch
import triton
import triton.language as tl

BLOCK_ELEMENTS = {4: 2048, 8: 1024}  # samples times classes of a block; keys are the bytes of an element
MAX_CLASSES = 1024
IGNORED = -100  # the target by which torch.nn.functional.cross_entropy excludes a sample from the loss


@triton.jit(do_not_specialize=["samples"])
def cross_entropy_kernel(
    outputs_ptr, targets_ptr, losses_ptr, out_grad_ptr, samples, classes,
    SKIP: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """losses[l] = mean over b of log(sum over k of exp(outputs[l, b, k])) - outputs[l, b, targets[l, b]].

    The gradient of losses[l] is out_grad[l, b, k] = (softmax(outputs)[l, b, k] - (1 if k == targets[l, b] else 0)) / B.
    A sample with target SKIP has a loss of 0. Any other target outside 0 … K - 1 makes the lane's loss NaN.

    outputs_ptr   [L, B, K]
    targets_ptr   [L, B]     int64
    losses_ptr    [L]        written
    out_grad_ptr  [L, B, K]  written

    Grid: L.
    Source: the mean over all B samples of torch.nn.functional.cross_entropy with reduction="none".
    """
    lane = tl.program_id(0).to(tl.int64)
    dtype = outputs_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_CLASSES)
    total = tl.zeros((BLOCK_SAMPLES,), dtype)
    for begin in range(0, samples, BLOCK_SAMPLES):
        b = begin + tl.arange(0, BLOCK_SAMPLES)
        at = (lane * samples + b)[:, None] * classes + k[None, :]
        inside = (b < samples)[:, None] & (k < classes)[None, :]
        value = tl.load(outputs_ptr + at, mask=inside, other=0.0)
        value = tl.where((k < classes)[None, :], value, float("-inf"))
        target = tl.load(targets_ptr + lane * samples + b, mask=b < samples, other=SKIP)
        chosen = k[None, :] == target[:, None]
        # The loss, with the largest output subtracted so that no exponential overflows.
        largest = tl.max(value, 1)
        power = tl.exp(value - largest[:, None])
        sums = tl.sum(power, 1)
        loss = tl.log(sums) + (largest - tl.sum(tl.where(chosen, value, 0.0), 1))
        counts = target != SKIP
        wrong = counts & ((target < 0) | (target >= classes))
        total += tl.where(counts, tl.where(wrong, float("nan"), loss), 0.0)
        # The gradient.
        grad = (power / sums[:, None] - chosen.to(dtype)) / samples
        tl.store(out_grad_ptr + at, tl.where(counts[:, None], grad, 0.0), mask=inside)
    tl.store(losses_ptr + lane, tl.sum(total, 0) / samples)


def cross_entropy(outputs, targets):
    """Compute each lane's mean cross-entropy [L], and its gradient with respect to the outputs [L, B, K].

    outputs  [L, B, K]  K at most MAX_CLASSES
    targets  [L, B]     int64; IGNORED gives a loss of 0, any other number outside 0 … K - 1 makes the lane's loss NaN
    """
    lanes, samples, classes = outputs.shape
    losses, out_grad = torch.empty_like(outputs[:, 0, 0]), torch.empty_like(outputs)
    block = max(16, triton.next_power_of_2(classes))
    with torch.cuda.device_of(outputs):
        cross_entropy_kernel[(lanes,)](
            *(outputs, targets, losses, out_grad, samples, classes),
            SKIP=IGNORED,
            BLOCK_SAMPLES=BLOCK_ELEMENTS[outputs.element_size()] // block,
            BLOCK_CLASSES=block,
            enable_fp_fusion=False,
            num_warps=8,
        )
    return losses, out_grad
