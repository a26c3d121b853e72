"""gather_augment: batches of pictures by index, cropped, flipped and standardised."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.ops.contracts import FLOATS, Contract, native, register, triton_kernels


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
    """Gather each lane's pictures. uint8 pictures are mapped through the table; floating-point ones are copied.

    With pad > 0, a picture gets a border of `pad` black pixels (value 0 before the table) and is cropped at a random
    place to its original size. With flip, it is mirrored with probability 1/2. The random words are those of Philox
    block samples[l, b] of the lane's stream with purpose 1: word 0 gives the row, word 1 gives the column, and the top
    bit of word 2 gives the flip.

    images         [n, H, W, C]  uint8, or the dtype of the result
    table          [C, 256]      float32 or float64, the standardised value of every byte; None if `images` is not uint8
    index          [L, B]        int64, the pictures' numbers in [0, n)
    keys           [L, 3]        int64: seed, stream, epoch
    samples        [L, B]        int64, the numbers of the Philox blocks. If `images` is only a part of the data, these
                                 are the pictures' numbers in all data. None for `index`
    pad                          pixels, 0 … 64
    flip                         whether to mirror pictures at random
    channels_last                whether the result's memory order is [L, B, H, W, C]; its shape stays the same

    Returns [L, B, C, H, W]. Raises ValueError or TypeError if an argument's shape, dtype, device or value is wrong.
    """
    c = Contract("gather_augment")
    c.tensor("images", images, "n H W C", (torch.uint8, *FLOATS))
    if (images.dtype == torch.uint8) != (table is not None):
        raise c.fail("uint8 `images` need a `table`; for floating-point `images`, pass table=None.")
    if table is not None:
        c.tensor("table", table, "C 256", FLOATS)
    c.tensor("index", index, "L B", [torch.int64])
    c.tensor("keys", keys, "L 3", [torch.int64], advice="A row is (seed, stream, epoch).")
    if not 0 <= pad <= 64:
        raise c.fail(f"`pad` must lie in [0, 64] pixels, got {pad}.")
    c.in_range("index", index, c.size("n"), "n")
    if samples is None:
        samples = index
    c.tensor("samples", samples, "L B", [torch.int64])
    out: Tensor = torch.ops.swamp_fast.gather_augment(images, table, index, samples, keys, pad, flip, channels_last)
    return out


def _cpu(
    images: Tensor,
    table: Tensor | None,
    index: Tensor,
    samples: Tensor,
    keys: Tensor,
    pad: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    out = _fake(images, table, index, samples, keys, pad, flip, channels_last)
    kernel = native().gather_augment_float32 if out.dtype == torch.float32 else native().gather_augment_float64
    kernel(
        *(images.data_ptr(), table.data_ptr() if table is not None else 0),
        *(index.data_ptr(), samples.data_ptr(), keys.data_ptr(), out.data_ptr()),
        *(index.shape[0], index.shape[1], *images.shape[1:]),
        *(pad, flip, channels_last, torch.get_num_threads()),
    )
    return out


def _cuda(
    images: Tensor,
    table: Tensor | None,
    index: Tensor,
    samples: Tensor,
    keys: Tensor,
    pad: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    kernels = triton_kernels("gather_augment")
    out: Tensor = kernels.gather_augment(images, table, index, samples, keys, pad, flip, channels_last)
    return out


def _fake(
    images: Tensor,
    table: Tensor | None,
    index: Tensor,
    samples: Tensor,
    keys: Tensor,
    pad: int,
    flip: bool,
    channels_last: bool,
) -> Tensor:
    _, height, width, channels = images.shape
    lanes, batch = index.shape
    dtype = table.dtype if table is not None else images.dtype
    if channels_last:
        out = images.new_empty((lanes, batch, height, width, channels), dtype=dtype)
        return out.permute(0, 1, 4, 2, 3)
    return images.new_empty((lanes, batch, channels, height, width), dtype=dtype)


register(
    "gather_augment(Tensor images, Tensor? table, Tensor index, Tensor samples, Tensor keys, int pad, bool flip, "
    "bool channels_last) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
