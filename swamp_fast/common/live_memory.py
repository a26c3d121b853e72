"""Measures the memory that the tensors of a computation take at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swamp_fast.common.tree import tensors


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations inside this context have made.

    now, peak  the current and the largest number of bytes
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted: set[int] = set()  # the live storages, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the memory that it takes."""
        given = {_address(tensor) for tensor in tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            self._count(tensor, given)
        return out

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if address in self._counted or address in given:
            return
        self._counted.add(address)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
