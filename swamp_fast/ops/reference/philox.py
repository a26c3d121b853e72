"""The reference of philox."""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(keys: Tensor, purpose: int, count: int) -> Tensor:
    """The first `count` random words [L, count] of each lane's stream; arguments as in swamp_fast/ops/philox.py."""
    blocks = torch.arange((count + 3) // 4, device=keys.device)
    return philox_blocks(keys[:, None, :], purpose, blocks).flatten(1)[:, :count]


def philox_blocks(keys: Tensor, purpose: int, blocks: Tensor) -> Tensor:
    """The four int32 words of each Philox block, [..., n, 4], for block numbers [..., n] and keys [..., 1, 3].

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, Philox4x32-10.
    """
    seed, stream, time = keys.unbind(-1)
    c0, c1, c2, c3 = torch.broadcast_tensors(blocks & LOW, time & LOW, stream & LOW, torch.full_like(blocks, purpose))
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        # int64 products wrap like unsigned ones, so a and b have the bits of the unsigned 64-bit products.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW, ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    words = torch.stack([c0, c1, c2, c3], -1)
    return (words - ((words >> 31) << 32)).to(torch.int32)
