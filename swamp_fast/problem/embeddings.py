"""Checks that a model's embeddings have a row for every index in a split, not only for those in a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from swamp_fast.problem.value_reads import ValueReads


class NoSuchRow(ValueError):
    """An embedding was given an index for which it has no row."""


@contextmanager
def indices_checked(
    model: nn.Module, split: str, batch: Sequence[Tensor], whole: Sequence[Tensor], reads: ValueReads
) -> Iterator[None]:
    """A context in which a model's embeddings check indices first, and raise NoSuchRow for one out of range.

    split  the name of the data in messages
    batch  the tensors [B, ...] on which the model is run
    whole  the same tensors for the whole split, [n, ...]; where an embedding gets one of `batch`, all of it is checked
    reads  records the values that the model reads; those that are read here don't count
    """

    def check(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given, operation = args[0] if args else kwargs.get("input"), reads.operation
        indices = next((of for leaf, of in zip(batch, whole, strict=True) if leaf is given), given)
        _check_range(split, name, module.num_embeddings, indices)
        reads.operation = operation

    handles = [
        module.register_forward_pre_hook(partial(check, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_range(split: str, layer: str, rows: int, indices: Any) -> None:
    if not isinstance(indices, Tensor) or indices.is_floating_point() or not indices.numel():
        return  # the embedding says what it takes
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= rows:
        raise NoSuchRow(
            f"{split}: what the model's embedding {layer} looks up must lie in [0, {rows}), because it has {rows} "
            f"rows; got {low} … {high}. Give nn.Embedding as many rows as there are tokens in the vocabulary, or "
            "renumber the tokens."
        )
