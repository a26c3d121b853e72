"""Reads a user's Dataset sample by sample, each with its own seed, or all samples at once if they fit in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from swamp_fast.common.memory import free_memory
from swamp_fast.common.tree import tensors, tree_leaves, tree_map, tree_stack
from swamp_fast.data.sources import Arrays, Samples, Source
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
        return as_tensors(self.dataset[index])


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


def as_tensors(item: Any) -> Any:
    """Convert the leaves of a sample to tensors.

    uint8 pictures become [H, W, C]; they may be PIL pictures, arrays [H, W, C] or [H, W], or tensors [C, H, W].
    """
    if isinstance(item, dict):
        return {key: as_tensors(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return tuple(as_tensors(value) for value in item)
    if isinstance(item, Tensor):
        return item.movedim(0, -1) if item.dtype == torch.uint8 and item.dim() == 3 else item
    if hasattr(item, "getbands"):  # a PIL picture
        item = np.array(item)
    if isinstance(item, np.ndarray):
        tensor = torch.from_numpy(item)
        return tensor[..., None] if tensor.dtype == torch.uint8 and tensor.dim() == 2 else tensor
    return torch.as_tensor(item) if isinstance(item, bool | int | float | np.generic) else item


def collected(source: Samples, device: torch.device) -> tuple[Source, str]:
    """Return the Dataset as arrays if it isn't random and fits on the device, else the Dataset itself.

    The second value is the reason why the Dataset must be streamed, or "". Raises TypeError or ValueError for samples
    that can't be used.
    """
    if source.collate is not default_collate:
        return source, "it has a custom collate function"
    samples = SeededSamples(source.dataset)
    with generators_left_alone():
        probed = range(0, len(source), max(1, len(source) // PROBE_SAMPLES))
        first = [samples[i, 0] for i in probed]
        for sample in first:
            _check_sample(sample, source.name)
        if _is_random(samples, first, probed):
            return source, "its samples are random and are read again in each epoch"
        if len({str([leaf.shape for leaf in tensors(sample)]) for sample in first}) > 1:
            raise ValueError(
                f"{source.name}: its samples differ in shape, so they can't be stacked into a batch. Resize them in "
                "the Dataset's transform, or pass a DataLoader with a collate_fn."
            )
        if not all(isinstance(target, Tensor) for _, target in first):
            return source, "its targets are not plain numbers or tensors"
        size = sum(leaf.numel() * leaf.element_size() for leaf in tensors(first[0])) * len(source)
        if not fits(size, device):
            return source, too_large(size, device)
        whole = [samples[i, 0] for i in range(len(source))]
    inputs = tree_stack([input for input, _ in whole])
    targets = torch.stack([target for _, target in whole])
    return Arrays(source.name, inputs, targets, source.crops), ""


def _check_sample(sample: Any, name: str) -> None:
    if not isinstance(sample, tuple) or len(sample) != 2:
        raise TypeError(f"{name}: a sample must be a pair (input, target), got {type(sample).__name__}.")
    if isinstance(sample[0], Tensor) and sample[0].dtype == torch.uint8 and not is_picture(sample[0]):
        raise ValueError(
            f"{name}: uint8 samples must be pictures, got shape {list(sample[0].shape)}. Give other inputs as "
            "floating-point tensors."
        )


def _is_random(samples: SeededSamples, first: list[Any], probed: range) -> bool:
    """Whether the samples change with the seed, or whether reading one of them draws random numbers.

    first   the samples `probed`, read with seed 0
    probed  the indices of the samples to test
    """
    again = [samples[i, 1] for i in probed]
    if not all(_same(a, b) for a, b in zip(tree_leaves(first), tree_leaves(again), strict=True)):
        return True
    seed_generators(0)
    untouched = generators_state()
    return any(samples[i, 0] is None or generators_state() != untouched for i in probed)


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
    return bool(a == b)
