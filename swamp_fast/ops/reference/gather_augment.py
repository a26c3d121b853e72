"""The reference of gather_augment."""

import torch
from torch import Tensor

from swamp_fast.ops.reference.philox import philox_blocks

CROP_FLIP = 1  # the purpose of the random words, in their Philox counter


def gather_augment(
    images: Tensor,
    table: Tensor | None,
    index: Tensor,
    keys: Tensor,
    *,
    samples: Tensor | None = None,
    pad: int = 0,
    flip: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """Gather each lane's pictures [L, B, C, H, W]; arguments as in swamp_fast/ops/gather_augment.py."""
    _, height, width, channels = images.shape
    words = (
        philox_blocks(keys[:, None, :], CROP_FLIP, index if samples is None else samples).long() & 0xFFFFFFFF
    )  # [L, B, 4]
    dy, dx = ((words[..., :2] * (2 * pad + 1) >> 32) - pad).unbind(-1)
    mirrored = (words[..., 2] >> 31).bool() & flip

    y = torch.arange(height, device=index.device) + dy[..., None]  # [L, B, H]
    x = torch.arange(width, device=index.device).expand(*index.shape, width)
    x = torch.where(mirrored[..., None], width - 1 - x, x) + dx[..., None]  # [L, B, W]
    inside = ((y >= 0) & (y < height))[..., :, None] & ((x >= 0) & (x < width))[..., None, :]
    y, x = y.clamp(0, height - 1)[..., :, None], x.clamp(0, width - 1)[..., None, :]
    picked = images[index[..., None, None], y, x]  # [L, B, H, W, C]
    picked = picked * inside[..., None].to(picked.dtype)
    if table is not None:
        picked = table[torch.arange(channels, device=index.device), picked.long()]
    out = picked.movedim(-1, 2)
    return out if channels_last else out.contiguous()
