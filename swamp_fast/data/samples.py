"""Reads a user's Dataset sample by sample, each with its own seed, or all samples at once if they fit in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from swamp_fast.common.memory import free_memory
from swamp_fast.common.tree import tensors, tree_leaves, tree_map, tree_stack
from swamp_fast.data.sources import Arrays, Samples, Source, as_tensor, described, nesting_checked
from swamp_fast.particles.random import generators_left_alone, generators_state, seed_generators

PROBE_SAMPLES = 32  # about this many samples are read twice to find out whether a Dataset is random


class SeededSamples(Dataset[Any]):
    """A Dataset's samples as tensors. They are indexed by (index, seed), so that a random Dataset repeats its draws."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Any:
        """Seed the global random generators, then read the sample `index`."""
        index, seed = index_and_seed
        seed_generators(seed)
        item = self.dataset[index]
        if isinstance(item, list | tuple) and len(item) == 2:
            return as_tensors(item[0]), as_tensors(item[1], pictures=False)
        return as_tensors(item)


class ArraySamples(Dataset[Any]):
    """A Dataset over arrays that don't fit on the device."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Any:
        """Return one sample. A picture becomes a NumPy array, because `as_tensors` takes arrays with channels last."""
        inputs = tree_map(lambda leaf: leaf[index], self.arrays.inputs)
        return inputs.numpy() if is_picture(inputs) else inputs, self.arrays.targets[index]


def as_tensors(item: Any, pictures: bool = True) -> Any:
    """Convert the leaves of a sample to tensors.

    uint8 pictures become [H, W, C]; they may be PIL pictures, arrays [H, W, C] or [H, W], or tensors [C, H, W] or
    [H, W]. Without `pictures`, as for targets, nothing is moved.
    """
    if isinstance(item, dict):
        return {key: as_tensors(value, pictures) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return tuple(as_tensors(value, pictures) for value in item)
    if hasattr(item, "getbands"):  # a PIL picture
        item = np.array(item)
    channels_first = isinstance(item, Tensor)
    if isinstance(item, np.ndarray):
        item = as_tensor(item, "a sample")
    if not isinstance(item, Tensor):
        return torch.as_tensor(item) if isinstance(item, bool | int | float | np.generic) else item
    if not pictures or item.dtype != torch.uint8 or item.dim() not in (2, 3):
        return item
    if item.dim() == 2:
        return item[..., None]
    return item.movedim(0, -1) if channels_first else item


def collected(source: Samples, device: torch.device) -> tuple[Source, str]:
    """Return the Dataset as arrays if it isn't random and fits on the device, else the Dataset itself.

    The second value is the reason why the Dataset must be streamed, or "". Raises TypeError or ValueError for samples
    that can't be used.
    """
    samples, stacked = SeededSamples(source.dataset), source.collate is default_collate
    with generators_left_alone():
        probed = range(0, len(source), max(1, len(source) // PROBE_SAMPLES))
        first = _read(samples, probed, source)
        if stacked:
            for sample in first:
                _check_sample(sample, described(source))
            _check_shapes(first, probed, described(source))
        if not _all_same(first, [samples[i, 0] for i in probed]):
            return replace(source, repeats=False), "its samples differ each time they are read"
        if not stacked:
            return source, "it has a custom collate function"
        if _is_random(samples, first, probed):
            return source, "its samples are random and are read again in each epoch"
        if not all(isinstance(target, Tensor) for _, target in first):
            return source, "its targets are not plain numbers or tensors"
        size = sum(leaf.numel() * leaf.element_size() for leaf in tensors(first[0])) * len(source)
        if not fits(size, device):
            return source, too_large(size, device)
        whole = [samples[i, 0] for i in range(len(source))]
    _check_shapes(whole, range(len(source)), described(source))
    inputs = tree_stack([input for input, _ in whole])
    targets = torch.stack([target for _, target in whole])
    return Arrays(source.name, inputs, targets, source.crops, source.argument), ""


def stacked(samples: list[Any]) -> Any:
    """Collate samples of one shape. Raises ValueError for samples of several."""
    try:
        return default_collate(samples)
    except RuntimeError:
        _check_shapes(samples, range(len(samples)), "a batch of the Dataset")
        raise


def form_of(sample: Any) -> str:
    """Return what a sample is, in words."""
    if isinstance(sample, dict):
        return f"a dict with {', '.join(map(str, sample))}"
    if isinstance(sample, list | tuple):
        return f"{len(sample)} values"
    return f"a {type(sample).__name__}"


def _read(samples: SeededSamples, indices: range, source: Samples) -> list[Any]:
    """Read samples with seed 0. Raises ValueError if they can't be read because only worker_init_fn prepares them."""
    try:
        with nesting_checked(f"{described(source)}: a sample"):
            return [samples[i, 0] for i in indices]
    except Exception as error:
        if source.worker_start is None:
            raise
        raise ValueError(
            f"{described(source)}: a sample can't be read outside of the DataLoader's workers ({error}), but some are. "
            "Let the Dataset open its files when it reads the first sample, rather than in worker_init_fn."
        ) from error


def _check_sample(sample: Any, name: str) -> None:
    if not isinstance(sample, tuple) or len(sample) != 2:
        remedy = "Return a pair from the Dataset; several inputs can be a tuple or a dict, as in ((a, b), target)."
        if isinstance(sample, dict):
            remedy = (
                "Return a pair from the Dataset, (inputs, target), or pass a DataLoader with a collate_fn that does. "
                "The inputs may be a dict, as for forward=lambda model, inputs: model(**inputs).logits."
            )
        raise TypeError(f"{name}: a sample must be a pair (input, target), got {form_of(sample)}. {remedy}")
    if isinstance(sample[1], str):
        raise TypeError(f"{name}: targets must be numbers, got the text {sample[1]!r}. Number the labels from 0.")
    for part, tree in zip(("inputs", "targets"), sample, strict=True):
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{name}: a sample's {part} must be tensors, arrays or numbers, got {type(leaf).__name__}. Convert "
                    "them in the Dataset, or pass a DataLoader with a collate_fn."
                )
    if isinstance(sample[0], Tensor) and sample[0].dtype == torch.uint8 and not is_picture(sample[0]):
        raise ValueError(
            f"{name}: uint8 samples must be pictures, got shape {list(sample[0].shape)}. Give other inputs as "
            "floating-point tensors."
        )


def _check_shapes(samples: list[Any], indices: range, name: str) -> None:
    """Raise ValueError if samples differ in shape, naming the first that differs."""
    expected = _shapes(samples[0])
    for index, sample in zip(indices, samples, strict=True):
        if _shapes(sample) != expected:
            raise ValueError(
                f"{name}: its samples differ in shape, so they can't be stacked to a batch: sample {indices[0]} has "
                f"{expected}, sample {index} has {_shapes(sample)}. Resize them in the Dataset's transform, or pass a "
                "DataLoader with a collate_fn."
            )


def _shapes(sample: Any) -> str:
    return ", ".join(
        str(list(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in tree_leaves(sample)
    )


def _is_random(samples: SeededSamples, first: list[Any], probed: range) -> bool:
    """Whether the samples change with the seed, or whether reading one of them draws random numbers.

    first   the samples `probed`, read with seed 0
    probed  the indices of the samples to test
    """
    if not _all_same(first, [samples[i, 1] for i in probed]):
        return True
    seed_generators(0)
    untouched = generators_state()
    return any(samples[i, 0] is None or generators_state() != untouched for i in probed)


def _all_same(first: list[Any], again: list[Any]) -> bool:
    pairs = [list(tree_leaves(tree)) for tree in (first, again)]
    return len(pairs[0]) == len(pairs[1]) and all(_same(a, b) for a, b in zip(*pairs, strict=True))


def one_input(source: Samples) -> Any:
    """Return the input of the first sample, or None if a custom collate function makes the batches."""
    if source.collate is not default_collate:
        return None
    with generators_left_alone():
        return SeededSamples(source.dataset)[0, 0][0]


def is_picture(sample: Any) -> bool:
    """Whether a sample is a uint8 picture [H, W, C]."""
    return isinstance(sample, Tensor) and sample.dtype == torch.uint8 and sample.dim() == 3


def some_pictures(source: Samples, count: int) -> Tensor:
    """Read about `count` pictures [n, H, W, C] at evenly spaced indices of a streamed split."""
    samples = SeededSamples(source.dataset)
    with generators_left_alone():
        return torch.stack([samples[i, 0][0] for i in range(0, len(source), max(1, len(source) // count))])


def size_of(source: Arrays) -> int:
    """Return the number of bytes that a split takes in memory."""
    return sum(leaf.numel() * leaf.element_size() for leaf in [*tensors(source.inputs), source.targets])


def fits(size: int, device: torch.device) -> bool:
    """Whether data of `size` bytes are put on the device: if they take at most half of its free memory."""
    return size <= free_memory(device) // 2


def too_large(size: int, device: torch.device) -> str:
    """Return the reason why data of `size` bytes are streamed."""
    return f"{size / 1e9:.1f} GB don't fit {device}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return not isinstance(a, bool | int | float | str | bytes) or bool(a == b)  # other objects can't be compared
