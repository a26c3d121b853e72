"""clip_scale: the norm of each lane's kept gradient in float64, block by block, then the blocks of a lane in order."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def squares_kernel(
    grads,  # [L, P]
    masks,  # [R, Q]
    run_of_lane,  # [L]
    squares,  # [L, blocks] float64
    grads_stride,
    masks_stride,
    parameters,
    prunable,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = masks + tl.load(run_of_lane + lane) * masks_stride
    keep = (tl.load(mask + columns, mask=columns < prunable, other=1) != 0) & (columns < parameters)
    g = tl.load(grads + lane * grads_stride + columns, mask=keep, other=0.0).to(tl.float64)
    tl.store(squares + lane * tl.num_programs(0) + tl.program_id(0), tl.sum(g * g))


@triton.jit
def clip_scale_kernel(
    squares,  # [L, blocks]
    clip_norm,  # [L] float64
    scale,  # [L] float64
    blocks,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, blocks, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        total += tl.load(squares + lane * blocks + columns, mask=columns < blocks, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    found = tl.load(clip_norm + lane) / (norm + 1e-6)
    found = tl.where(found < 1, found, 1.0)
    tl.store(scale + lane, tl.where(norm < float("inf"), found, float("nan")))


def clip_scale(grads, masks, run_of_lane, clip_norm):
    """Launch the two; arguments as in swamp_fast/ops/clip_scale.py."""
    lanes, parameters = grads.shape
    blocks = triton.cdiv(parameters, BLOCK)
    squares = torch.empty(lanes, blocks, dtype=torch.float64, device=grads.device)
    scale = torch.empty_like(clip_norm)
    with torch.cuda.device_of(grads):
        squares_kernel[(blocks, lanes)](
            *(grads, masks, run_of_lane, squares),
            *(grads.stride(0), masks.stride(0), parameters, masks.shape[1]),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
        clip_scale_kernel[(lanes,)](squares, clip_norm, scale, blocks, BLOCK=BLOCK, enable_fp_fusion=False)
    return scale
