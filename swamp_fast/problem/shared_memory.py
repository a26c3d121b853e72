"""Refuses parameters that share memory with others without being the same parameter."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn


def check_memory(model: nn.Module) -> None:
    """Raise ValueError if a trained parameter shares memory with itself or with another parameter or buffer.

    A particle stores each parameter separately, so tensors that share memory would no longer change together. One
    parameter that is used in several places is allowed, and so are tensors in one storage that don't overlap.
    """
    by_memory: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout != torch.strided:
            raise ValueError(f"`model`: {name} is sparse; parameters and buffers must be dense, as by .to_dense().")
        if tensor.numel():
            by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for named in by_memory.values():
        for name, tensor in named:
            if tensor.requires_grad and 0 in tensor.stride() and len(_places(tensor).unique()) < tensor.numel():
                raise ValueError(
                    f"`model`: several elements of {name} are one number in memory (it was expanded); make it a tensor "
                    "of its own, as by .clone()."
                )
        for (one, a), (other, b) in combinations(named, 2):
            if (a.requires_grad or b.requires_grad) and _overlap(a, b):
                raise ValueError(
                    f"`model`: {one} and {other} share memory, but are not the same parameter, so particles can't tie "
                    f"them. Assign one parameter to both places, and use its transpose or slice in forward; or clone "
                    "one of them."
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in the same memory have an element in common."""
    if _end(a) <= b.storage_offset() or _end(b) <= a.storage_offset():
        return False
    return bool(torch.isin(_places(a), _places(b)).any())


def _end(tensor: Tensor) -> int:
    """Return the place in memory after a tensor's last element."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + sum(steps) + 1)


def _places(tensor: Tensor) -> Tensor:
    """Return the places of a tensor's elements in its memory, on the CPU."""
    places = torch.arange(_end(tensor))
    return places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten()
