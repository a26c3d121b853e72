"""The memories of the PTX interpreter (ptx.py): parameters, global memory, and shared memory that detects races."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ptx_instructions import SEVERAL, TYPES, Fault, Race, Values
from torch import Tensor

SHARED = 0x1000  # address at which shared memory begins; tensors keep their addresses, which are far larger
GRANULE = 2  # races are detected per this many bytes of shared memory
NOBODY = -1  # stands for no thread where a thread's number is expected


class Region:
    """A range of memory: bytes and the address at which they begin."""

    def __init__(self, begin: int, content: NDArray[np.uint8]) -> None:
        self.begin, self.end = begin, begin + len(content)
        self.views = {size: content[: len(content) // size * size].view(f"V{size}") for size in (1, 2, 4, 8, 16)}

    def read(self, at: Values, size: int) -> Values:
        """Read `size` bytes at each address."""
        content: Values = self.views[size][(at - self.begin) // size]
        return content

    def write(self, at: Values, content: Values) -> None:
        """Write each number of `content` to its address."""
        size = content.dtype.itemsize
        self.views[size][(at - self.begin) // size] = content


class Parameters:
    """A kernel's parameters, which have a separate address space that begins at 0.

    begins  the address of each parameter, by name
    sizes   the size of each parameter in bytes, by name
    """

    def __init__(self, declaration: str) -> None:
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s[^,]*?(\w+)(?:\[(\d+)\])?\s*(?:,|$)"
        self.begins: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.end = 0
        for alignment, kind, name, count in re.findall(pattern, declaration.strip()):
            itemsize = TYPES[kind].itemsize
            step = int(alignment or itemsize)
            self.begins[name] = -(-self.end // step) * step
            self.sizes[name] = itemsize * int(count or 1)
            self.end = self.begins[name] + self.sizes[name]

    def filled(self, arguments: Sequence[Any]) -> Region:
        """The parameters' memory, filled with the given arguments. Raises TypeError if their sizes differ."""
        sizes = [ctypes.sizeof(argument) for argument in arguments]
        if sizes != list(self.sizes.values()):
            raise TypeError(f"the parameters have {self.sizes} bytes, the arguments have {sizes}")
        content = np.zeros(-(-self.end // 16) * 16, np.uint8)  # padded to the widest load
        for begin, argument in zip(self.begins.values(), arguments, strict=True):
            content[begin : begin + ctypes.sizeof(argument)] = np.frombuffer(bytes(argument), np.uint8)
        return Region(0, content)


class Memory:
    """Global memory, which consists of the tensors' storages at their addresses in the process."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        contents = {
            begin: torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            for begin, storage in storages.items()
            if storage.nbytes()
        }
        self.regions = [Region(begin, contents[begin]) for begin in sorted(contents)]
        self.begins = np.array([region.begin for region in self.regions])
        self.ends = np.array([region.end for region in self.regions])

    def read(self, at: Values, size: int) -> Values:
        """Read `size` bytes at each address. Raises Fault for an address outside the tensors."""
        out = np.empty(len(at), f"V{size}")
        for region, chosen in self._regions(at, size):
            out[chosen] = region.read(at[chosen], size)
        return out

    def write(self, at: Values, content: Values) -> None:
        """Write each number of `content` to its address. Raises Fault for an address outside the tensors."""
        for region, chosen in self._regions(at, content.dtype.itemsize):
            region.write(at[chosen], content[chosen])

    def _regions(self, at: Values, size: int) -> list[tuple[Region, Any]]:
        """The regions that contain the addresses, each with a mask of the addresses that it contains."""
        numbers = np.searchsorted(self.begins, at, "right") - 1
        if (numbers < 0).any() or (at + size > self.ends[numbers]).any():
            raise Fault("outside the tensors")
        if (numbers == numbers[0]).all():
            return [(self.regions[numbers[0]], slice(None))]
        return [(self.regions[number], numbers == number) for number in np.unique(numbers)]


class Shared:
    """A block's shared memory, with a record of the threads that wrote and read it since the last barrier.

    It is filled with NaN at the beginning.
    """

    def __init__(self, size: int) -> None:
        self.region = Region(SHARED, np.full(size, 0xFF, np.uint8))
        self.writer, self.reader = np.full((2, size // GRANULE), NOBODY)

    def barrier(self) -> None:
        """Clear the record of the threads that wrote and read."""
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)

    def read(self, at: Values, size: int, threads: Values) -> Values:
        """Read `size` bytes at each address by the given threads.

        Raises Fault for an address outside shared memory, and Race for a race.
        """
        places, threads = self._places(at, size, threads)
        self._refuse((self.writer[places] != NOBODY) & (self.writer[places] != threads), places, "read", "written")
        before = self.reader[places]
        self.reader[places] = np.where((before == NOBODY) | (before == threads), threads, SEVERAL)
        others = self.reader[places] != threads  # one instruction may read a granule by several threads
        self.reader[places[others]] = SEVERAL
        return self.region.read(at, size)

    def write(self, at: Values, content: Values, threads: Values) -> None:
        """Write each number of `content` to its address by the given threads.

        Raises Fault for an address outside shared memory, and Race for a race.
        """
        places, threads = self._places(at, content.dtype.itemsize, threads)
        self._refuse((self.reader[places] != NOBODY) & (self.reader[places] != threads), places, "written", "read")
        self._refuse((self.writer[places] != NOBODY) & (self.writer[places] != threads), places, "written", "written")
        self.writer[places] = threads
        self._refuse(self.writer[places] != threads, places, "written", "written")
        self.region.write(at, content)

    def _places(self, at: Values, size: int, threads: Values) -> tuple[Values, Values]:
        """The granules [n, size / GRANULE] of each access, and the thread that accesses each granule."""
        if (at < self.region.begin).any() or (at + size > self.region.end).any():
            raise Fault(f"outside the {self.region.end - self.region.begin} bytes of shared memory")
        if size < GRANULE:
            raise NotImplementedError("single bytes of shared memory")
        places = (at - SHARED)[:, None] // GRANULE + np.arange(size // GRANULE)
        return places, np.broadcast_to(threads[:, None], places.shape)

    def _refuse(self, clashes: Values, places: Values, now: str, before: str) -> None:
        if clashes.any():
            place = GRANULE * int(places[clashes][0])
            raise Race(f"byte {place} of shared memory is {now}, and another thread has {before} it without a barrier")
