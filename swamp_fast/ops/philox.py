"""philox: counter-based random words. All random numbers of a run are made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import Contract, native, register, triton_kernels

MAX_WORDS = 4 << 32  # per stream: the block counter has 32 bits, and a block has 4 words


def philox(keys: Tensor, purpose: int, count: int) -> Tensor:
    """The first `count` random words of one stream per lane. They are the same on every device.

    Word j of a lane is word j % 4 of the Philox-4x32-10 block with key = seed and counter = (j // 4, time, stream,
    purpose).

    keys     [L, 3]  int64: seed, stream and time; only the low 32 bits of stream and time are used
    purpose          a number for the use of the words, 0 … 2**32 - 1, so that two uses get different words
    count            the number of words per lane

    Returns [L, count] int32, each with 32 random bits. Raises ValueError or TypeError if an argument is wrong.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c = Contract("philox")
    c.tensor("keys", keys, "L 3", [torch.int64], advice="A row is (seed, stream, time).")
    if not 0 <= purpose < 1 << 32:
        raise c.fail(f"`purpose` must lie in [0, 2**32), got {purpose}.")
    if not 0 <= count <= MAX_WORDS:
        raise c.fail(f"`count` must lie in [0, 2**34], got {count}.")
    words: Tensor = torch.ops.swamp_fast.philox(keys, purpose, count)
    return words


def _cpu(keys: Tensor, purpose: int, count: int) -> Tensor:
    words = _fake(keys, purpose, count)
    native().philox(keys.data_ptr(), words.data_ptr(), keys.shape[0], count, purpose, torch.get_num_threads())
    return words


def _cuda(keys: Tensor, purpose: int, count: int) -> Tensor:
    words: Tensor = triton_kernels("philox").philox(keys, purpose, count)
    return words


def _fake(keys: Tensor, purpose: int, count: int) -> Tensor:
    return keys.new_empty((keys.shape[0], count), dtype=torch.int32)


register("philox(Tensor keys, int purpose, int count) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
