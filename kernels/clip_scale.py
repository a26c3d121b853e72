"""clip_scale: the factor that clips each lane's gradient norm.

One kernel sums the squares of each block of parameters in float64. A second one adds the blocks in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .argument_groups import rows

BLOCK = 1024


@triton.jit
def squares_kernel(grads, masks, run_of_lane_ptr, squares_ptr, parameters, prunable, BLOCK: tl.constexpr):
    """squares[l, b] = sum of grads[l, p]^2 over the parameters p of block b that the mask of lane l keeps.

    grads            Rows [L, P]
    masks            Rows [R, Q]   bool; parameters Q … P have no mask
    run_of_lane_ptr  [L]           int64
    squares_ptr      [L, blocks]   float64, written

    Grid: blocks of parameters, L.
    Source: torch.nn.utils.clip_grad_norm_, as in swamp_fast/ops/reference/clip_scale.py.
    """
    lane = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask_ptr = masks.ptr + tl.load(run_of_lane_ptr + lane) * masks.stride
    keep = (tl.load(mask_ptr + columns, mask=columns < prunable, other=1) != 0) & (columns < parameters)
    g = tl.load(grads.ptr + lane * grads.stride + columns, mask=keep, other=0.0).to(tl.float64)
    tl.store(squares_ptr + lane * tl.num_programs(0) + tl.program_id(0), tl.sum(g * g))


@triton.jit
def clip_scale_kernel(squares_ptr, clip_norm_ptr, scale_ptr, blocks, BLOCK: tl.constexpr):
    """scale[l] = min(1, clip_norm[l] / (norm + 1e-6)) with norm = sqrt(sum of squares[l]); NaN if norm is not finite.

    squares_ptr    [L, blocks]  float64
    clip_norm_ptr  [L]          float64
    scale_ptr      [L]          float64, written

    Grid: L.
    Source: torch.nn.utils.clip_grad_norm_, as in swamp_fast/ops/reference/clip_scale.py.
    """
    lane = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, blocks, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        total += tl.load(squares_ptr + lane * blocks + columns, mask=columns < blocks, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    scale = tl.load(clip_norm_ptr + lane) / (norm + 1e-6)
    scale = tl.where(scale < 1, scale, 1.0)
    tl.store(scale_ptr + lane, tl.where(norm < float("inf"), scale, float("nan")))


def clip_scale(grads, masks, run_of_lane, clip_norm):
    """Compute the factors [L]; arguments as in swamp_fast/ops/clip_scale.py."""
    lanes, parameters = grads.shape
    blocks = triton.cdiv(parameters, BLOCK)
    squares = torch.empty(lanes, blocks, dtype=torch.float64, device=grads.device)
    scale = torch.empty_like(clip_norm)
    with torch.cuda.device_of(grads):
        squares_kernel[(blocks, lanes)](
            *(rows(grads), rows(masks), run_of_lane, squares, parameters, masks.shape[1]),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
        clip_scale_kernel[(lanes,)](squares, clip_norm, scale, blocks, BLOCK=BLOCK, enable_fp_fusion=False)
    return scale
