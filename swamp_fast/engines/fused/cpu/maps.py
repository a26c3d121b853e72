"""Maps: feature maps, or their gradients, in the memory layout of the kernels in csrc/cpu/fused."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.fused.cpu.taps import SAMPLES_PER_BLOCK, Geometry
from swamp_fast.ops.contracts import native

HUGE_PAGE = 2 << 20  # bytes
Allocate = Callable[[int, torch.dtype], Tensor]  # (size, dtype) -> zeroed memory


def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeroed memory [size]; large memory is put on huge pages if the system has them.

    A convolution's tile touches one page per channel and row. With 4 KB pages, these are more pages than the
    processor's address translation cache (TLB) holds.
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
    """A feature map, or its gradient; csrc/cpu/fused/fused.h explains the layout.

    blocks   how many blocks of 16 samples there are; 1 if flat
    pad      width of the border of zeros around each picture
    samples  B, the number of samples in the batch
    flat     the value has features and no pixels; the blocks of samples are stored as the map's columns
    """

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
        blocks = -(-samples // SAMPLES_PER_BLOCK)
        flat = len(shape) == 1
        channels, height, width = (shape[0], 1, blocks) if flat else shape
        blocks = 1 if flat else blocks
        size = blocks * channels * (height + 2 * pad) * (width + 2 * pad) * SAMPLES_PER_BLOCK
        return cls(allocate(size, dtype), size * dtype.itemsize, blocks, channels, height, width, pad, samples, flat)

    @property
    def geometry(self) -> Geometry:
        """The distances between this map's rows and between its channels."""
        pitch = (self.width + 2 * self.pad) * SAMPLES_PER_BLOCK
        return Geometry(pitch, (self.height + 2 * self.pad) * pitch)

    def handle(self, absent: bool = False) -> Any:
        """This map as the argument object of a kernel; `absent` gives a null pointer, which stands for no map."""
        return native().fused.Map(
            *(0 if absent else self.memory.data_ptr(), self.blocks, self.channels, self.height, self.width, self.pad),
            *(self.samples, self.flat),
        )
