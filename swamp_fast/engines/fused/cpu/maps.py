"""Maps: the memory of one value, or of its gradient, as the kernels of csrc/cpu/fused address it."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.fused.cpu.taps import SAMPLES, Geometry
from swamp_fast.ops.contracts import native

HUGE_PAGE = 2 << 20  # bytes
Allocate = Callable[[int, torch.dtype], Tensor]  # (size, dtype) -> zeroed memory


def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeroed memory [size], on huge pages where it is large and the system has them.

    A convolution's tile touches one page per channel and row. With pages of 4 KB these outnumber the entries of the
    processor's translation table.
    """
    length = size * dtype.itemsize
    if length < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, length + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + length].view(dtype)


@dataclass(frozen=True)
class Map:
    """The memory of one value, or of its gradient; csrc/cpu/fused/fused.h explains the layout."""

    memory: Tensor
    bytes: int
    blocks: int
    channels: int
    height: int
    width: int
    pad: int
    samples: int
    flat: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], samples: int, pad: int, dtype: torch.dtype, allocate: Allocate = zeros) -> Map:
        """A zeroed map for values [B, *shape]."""
        blocks = -(-samples // SAMPLES)
        flat = len(shape) == 1
        channels, height, width = (shape[0], 1, blocks) if flat else shape
        blocks = 1 if flat else blocks
        size = blocks * channels * (height + 2 * pad) * (width + 2 * pad) * SAMPLES
        return cls(allocate(size, dtype), size * dtype.itemsize, blocks, channels, height, width, pad, samples, flat)

    @property
    def geometry(self) -> Geometry:
        """The distances between rows and between channels."""
        pitch = (self.width + 2 * self.pad) * SAMPLES
        return Geometry(pitch, (self.height + 2 * self.pad) * pitch)

    def handle(self, absent: bool = False) -> Any:
        """The kernels' form of this map; `absent` makes one without memory, by which they know that there is no map."""
        return native().fused.Map(
            *(0 if absent else self.memory.data_ptr(), self.blocks, self.channels, self.height, self.width, self.pad),
            *(self.samples, self.flat),
        )
