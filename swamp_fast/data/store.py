"""Makes batches of a split that is either on the device (Stored) or read sample by sample (Streamed).

A training iterates over the handles of an epoch's batches, and fetches the batch of each handle. For the same order and
keys, both classes give the same batches.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import default_collate

from swamp_fast import ops
from swamp_fast.common.fingerprint import callable_fingerprint, callable_parts, changed_parts
from swamp_fast.common.tree import tensors, tree_leaves, tree_map, tree_stack, tree_to
from swamp_fast.data import samples as reading
from swamp_fast.data.labels import Labels, check_labels
from swamp_fast.data.samples import ArraySamples, SeededSamples
from swamp_fast.data.sources import Arrays, Samples, Source, described
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.workers import in_worker, signals_held
from swamp_fast.particles.random import SAMPLE_SEED, seeds_for

CROP_PAD = 4  # pixels of padding on each side
MEASURED_PICTURES = 10_000  # about this many pictures of a streamed split give its mean and standard deviation


@dataclass(frozen=True)
class Batch:
    """The batches of L lanes for one step.

    Inputs and targets are trees of tensors [L, B, ...] if `stacked`, else lists of L trees of tensors [B, ...].
    """

    inputs: Any
    targets: Any
    stacked: bool = True

    def lane(self, lane: int) -> tuple[Any, Any]:
        """Return the inputs [B, ...] and targets [B, ...] of one lane."""
        if not self.stacked:
            return self.inputs[lane], self.targets[lane]
        return tree_map(lambda leaf: leaf[lane], self.inputs), tree_map(lambda leaf: leaf[lane], self.targets)


class Stored:
    """A split on the device. A handle is the index [L, B] of a batch's samples; `fetch` uses only tensor operations.

    order   [length]  int64: the order in which evaluation reads the samples
    labels  what counts in accuracies, or why there are none; known once the model has been run
    """

    streamed = False
    stacked = True
    labels: Labels | str = "the model has not been run"

    def __init__(
        self,
        source: Arrays,
        device: torch.device,
        dtype: torch.dtype,
        standardise: Standardise | None,
        crop_flip: bool,
    ) -> None:
        self.name, self.length, self.crop_flip, self.device = source.name, len(source), crop_flip, device
        self.described = described(source)
        self.order = torch.arange(self.length, device=device)
        self.table = standardise.table(dtype, device) if standardise is not None else None
        self.inputs = tree_map(lambda leaf: _on_device(leaf, device, dtype), source.inputs)
        if crop_flip and self.table is None:
            self.inputs = self.inputs.movedim(1, -1).contiguous()  # gather_augment reads channels last
        self.targets = _whole_numbers(_on_device(source.targets, device, dtype))
        check_finite(self.described, "inputs", self.inputs)
        check_finite(self.described, "targets", self.targets)

    def check_labels(self, classes: int) -> None:
        """Raise TypeError or ValueError for targets that cross-entropy can't take; see labels.check_labels."""
        check_labels(self.described, self.targets, classes)

    def batches(
        self, order: Tensor, keys: Tensor, bounds: list[tuple[int, int]], repeats: bool = False
    ) -> Iterator[Tensor]:
        """Yield the handles of an epoch's batches.

        order    [L, n]  the order of the samples in each lane
        bounds   the slices of the order that the batches take
        repeats  whether the order may hold a sample several times, which is then read with other random draws
        """
        return (order[:, begin:end] for begin, end in bounds)

    def fetch(self, handle: Tensor, keys: Tensor | None, channels_last: bool = False, by_place: bool = False) -> Batch:
        """Return the batch of a handle.

        keys      [L, 3]  the epoch's keys, by which the batch is randomly augmented; None doesn't augment
        by_place  whether a sample's augmentation depends on its place in the batch instead of its number; the keys must
                  then be those of the batch
        """
        index = handle.contiguous()
        targets = self.targets[index]
        if self.table is None and not self.crop_flip:
            return Batch(tree_map(lambda leaf: leaf[index], self.inputs), targets)
        augmented = keys is not None and self.crop_flip
        inputs = ops.gather_augment(
            *(self.inputs, self.table, index),
            keys if keys is not None else index.new_zeros((len(index), 3)),
            samples=places_of(index) if by_place else None,
            pad=CROP_PAD if augmented else 0,
            flip=augmented,
            channels_last=channels_last,
        )
        return Batch(inputs, targets)

    def fingerprint(self) -> str:
        """Return a hash of all inputs and targets."""
        digest = hashlib.blake2b(digest_size=16)
        for leaf in [*tensors(self.inputs), self.targets]:
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Streamed:
    """A split that is read from the user's Dataset batch by batch. A handle holds collated batches in host memory.

    order, labels  the same as Stored's
    classes        the number of classes by which the labels of each batch are checked; None doesn't check them
    """

    streamed = True
    labels: Labels | str = "the model has not been run"

    def __init__(
        self,
        source: Samples,
        device: torch.device,
        dtype: torch.dtype,
        standardise: Standardise | None,
        crop_flip: bool,
    ) -> None:
        self.name, self.length, self.crop_flip, self.device = source.name, len(source), crop_flip, device
        self.described = described(source)
        self.source, self.dtype = source, dtype
        self.stacked = source.collate is default_collate
        self.collate_parts: dict[str, str] | None = None  # after its first call, to see what later calls change
        self.order = torch.arange(self.length, device=device)
        self.table = standardise.table(dtype, device) if standardise is not None else None
        self.classes: int | None = None

    def check_labels(self, classes: int) -> None:
        """Check the labels of every batch that is read from now on, as Stored.check_labels does."""
        self.classes = classes

    def batches(
        self, order: Tensor, keys: Tensor, bounds: list[tuple[int, int]], repeats: bool = False
    ) -> Iterator[Any]:
        """Yield the handles of an epoch's batches; see Stored.batches.

        A handle is a list of (inputs, targets, sample numbers [B]), one per lane. The global generators, from which the
        Dataset may draw, are seeded for every sample from the epoch's keys [L, 3]. Lanes with the same order and the
        same key have the same batches, which are read once.
        """
        order, read_by = order.cpu(), _first_with_the_same(torch.cat([keys, order], 1))
        readers = sorted(set(read_by))
        seeds = seeds_for(keys, SAMPLE_SEED, len(self.source))
        if not repeats:
            seeds = seeds.gather(1, order)
        parts = [(lane, slice(begin, end)) for begin, end in bounds for lane in readers]
        requests = [
            list(zip(order[lane, part].tolist(), seeds[lane, part].tolist(), strict=True)) for lane, part in parts
        ]
        loader: DataLoader[Any] = DataLoader(
            SeededSamples(self.source.dataset),
            batch_sampler=requests,
            num_workers=self.source.workers,
            collate_fn=reading.stacked if self.stacked else self.source.collate,
            worker_init_fn=partial(in_worker, start=self.source.worker_start),
            pin_memory=self.device.type == "cuda",
        )
        of_lane: dict[int, Any] = {}
        with signals_held():
            batches = iter(loader)
        for (lane, part), batch in zip(parts, batches, strict=True):
            if self.collate_parts is None:
                self.collate_parts = callable_parts(self.source.collate)
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise TypeError(
                    f"{self.described}: a batch must be a pair (inputs, targets), got {reading.form_of(batch)}. "
                    "Return one from your collate_fn."
                )
            if batch[0] is None:
                raise TypeError(
                    f"{self.described}: a batch's inputs are None. Return (inputs, targets) from collate_fn."
                )
            inputs, targets = batch[0], tree_map(_whole_numbers, batch[1])
            check_finite(self.described, "inputs", inputs)
            check_finite(self.described, "targets", targets)
            if self.classes is not None:
                check_labels(self.described, targets, self.classes)
            of_lane[lane] = inputs, targets, order[lane, part]
            if len(of_lane) == len(readers):
                # A lane may change its batch, so each has its own.
                yield [of_lane[by] if by == lane else copy.deepcopy(of_lane[by]) for lane, by in enumerate(read_by)]
                of_lane = {}

    def fetch(self, handle: Any, keys: Tensor | None, channels_last: bool = False, by_place: bool = False) -> Batch:
        """Return the batch of a handle; see Stored.fetch."""
        inputs, targets, samples = ([tree_to(lane[i], self.device) for lane in handle] for i in range(3))
        if not self.stacked:
            return Batch(self._typed(inputs), self._typed(targets), stacked=False)
        stacked, picked = tree_stack(inputs), torch.stack(samples)
        if self.table is None and not self.crop_flip:
            return Batch(self._typed(stacked), self._typed(tree_stack(targets)))
        if self.table is None:
            stacked = self._typed(stacked.movedim(2, -1))
        augmented = keys is not None and self.crop_flip
        pictures = ops.gather_augment(
            *(stacked.flatten(0, 1).contiguous(), self.table),
            torch.arange(picked.numel(), device=self.device).view_as(picked),
            keys if keys is not None else picked.new_zeros((len(picked), 3)),
            samples=places_of(picked) if by_place else picked,
            pad=CROP_PAD if augmented else 0,
            flip=augmented,
            channels_last=channels_last,
        )
        return Batch(pictures, self._typed(tree_stack(targets)))

    def fingerprint(self) -> str:
        """Return a hash of the length, the collate function and a few samples; reading all may take too long.

        If samples don't repeat, only their types and shapes count. What calls change in the collate function doesn't.
        """
        digest = hashlib.blake2b(f"{self.length}{type(self.source.dataset).__qualname__}".encode(), digest_size=16)
        changed = changed_parts(self.collate_parts, callable_parts(self.source.collate)) if self.collate_parts else ()
        digest.update(str(callable_fingerprint(self.source.collate, changed)).encode())
        samples = SeededSamples(self.source.dataset)
        for index in range(0, self.length, max(1, self.length // 16)):
            for leaf in tree_leaves(samples[index, 0]):
                array = leaf.numpy() if isinstance(leaf, Tensor) else np.asarray(_text(leaf))
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes() if self.source.repeats else b"")
        return digest.hexdigest()

    def _typed(self, tree: Any) -> Any:
        return tree_map(
            lambda leaf: leaf.to(self.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
            tree,
        )


Data = Stored | Streamed


@dataclass(frozen=True)
class Built:
    """A split that is ready for use.

    standardise  the statistics that standardise its uint8 pictures; None for other data
    line         its description for the console
    """

    data: Data
    standardise: Standardise | None
    line: str

    @property
    def repeats(self) -> bool:
        """Whether its samples are the same each time they are read with the same random draws."""
        return isinstance(self.data, Stored) or self.data.source.repeats


def build(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    *,
    augment: str = "none",
    like: Standardise | None = None,
) -> Built:
    """Put a split on the device if it fits, otherwise stream it.

    augment  "none", "crop_flip", or "auto", which crops and flips CIFAR
    like     the statistics that standardise uint8 pictures; None measures them on this split

    Raises ValueError or TypeError for samples that can't be used.
    """
    why = ""
    if isinstance(source, Samples):
        source, why = reading.collected(source, device)
    elif not reading.fits(reading.size_of(source), device):
        why = reading.too_large(reading.size_of(source), device)
        source = Samples(source.name, ArraySamples(source), crops=source.crops, argument=source.argument)

    if isinstance(source, Arrays):
        sample, how = tree_map(lambda leaf: leaf[:1].squeeze(0), source.inputs), f"on {device}"
    else:
        sample, how = reading.one_input(source), f"streamed ({why})"
    standardise = None
    if reading.is_picture(sample):
        if like is not None:
            like.check_channels(source.name, sample.shape[-1])
        standardise = like or Standardise.measured(
            source.inputs if isinstance(source, Arrays) else reading.some_pictures(source, MEASURED_PICTURES)
        )
    crop_flip = augment == "crop_flip" or (augment == "auto" and source.crops)
    croppable = isinstance(sample, Tensor) and sample.dim() == 3 and (standardise or sample.is_floating_point())
    if crop_flip and not croppable:
        raise ValueError(
            f'augment="crop_flip" needs pictures, uint8 or floating-point [n, C, H, W], but {described(source)} holds '
            'something else. Pass augment="none" and your own `transform`.'
        )
    form = "uint8, standardised per channel" if standardise else "used unchanged"
    line = f"{source.name}: {len(source):,} samples {how}, {form}"
    line += f", crop (pad {CROP_PAD}) and flip" if crop_flip else ""
    if isinstance(source, Arrays):
        return Built(Stored(source, device, dtype, standardise, crop_flip), standardise, line)
    return Built(Streamed(source, device, dtype, standardise, crop_flip), standardise, line)


def batch_bounds(samples: int, batch_size: int, drop_last: bool = False) -> list[tuple[int, int]]:
    """Return, for each batch of an epoch, the slice [begin, end) of the sample order that the batch takes."""
    end = samples // batch_size * batch_size if drop_last else samples
    return [(begin, min(begin + batch_size, end)) for begin in range(0, end, batch_size)]


def pass_in_stored_order(data: Data, batch_size: int, channels_last: bool = False) -> Iterator[tuple[Any, Any, int]]:
    """Yield inputs [B, ...], targets [B, ...] and B of all batches, in the order `data.order` and without augmentation.

    If the last batch would be a single sample, it joins the batch before, because BatchNorm needs at least two samples.
    """
    bounds = batch_bounds(data.length, batch_size)
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        bounds[-2:] = [(bounds[-2][0], bounds[-1][1])]
    keys = torch.zeros(1, 3, dtype=torch.int64, device=data.device)
    for handle, (begin, end) in zip(data.batches(data.order[None], keys, bounds), bounds, strict=True):
        yield *data.fetch(handle, None, channels_last).lane(0), end - begin


def places_of(index: Tensor) -> Tensor:
    """Return the places [L, B] of samples [L, B] in their batch."""
    return torch.arange(index.shape[1], device=index.device).expand_as(index).contiguous()


def _first_with_the_same(rows: Tensor) -> list[int]:
    """Return for each of some rows [L, n] the first row that is equal."""
    return [int((rows == row).all(1).nonzero()[0]) for row in rows.cpu()]


def check_finite(name: str, kind: str, tree: Any) -> None:
    """Raise ValueError if a number is NaN or infinite among the inputs or the targets, as `kind` says."""
    for leaf in tensors(tree):
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            bad = int((~torch.isfinite(leaf)).sum())
            raise ValueError(
                f"{name}: {kind} must be finite, got {bad} NaN or infinite numbers of {leaf.numel()}; remove or "
                "repair those samples."
            )


def _text(value: Any) -> str:
    plain = isinstance(value, bool | int | float | str | bytes | None)
    return repr(value) if plain else str(callable_fingerprint(value))  # the text of an object may hold its address


def _whole_numbers(targets: Any) -> Any:
    """Return integer targets as int64, the type that torch's losses take, and other targets unchanged."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return targets
    return targets.long()


def _on_device(leaf: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"inputs must be tensors, got a {type(leaf).__name__} among them.")
    return leaf.detach().to(device, dtype if leaf.is_floating_point() else leaf.dtype)
