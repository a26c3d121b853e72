"""Opens the splits of a call (train, val and test), puts them on the device, and checks that they fit together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swamp_fast.common.format import dtype_name
from swamp_fast.common.tree import tree_map
from swamp_fast.config import SwampConfig
from swamp_fast.data.sources import Opened, Source, held_out, hold_out, open_source
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.store import Built, Data, build

SPLITS = ("train", "val", "test")
# The name of the argument at the start of a source's description, but not if it is all that a held-out part came from.
ARGUMENT = re.compile(r"^(train|val|test): |(?<=held out of )(train|val|test): (?=.*: [\d,]+ samples)")


class Sources(NamedTuple):
    """The source of each split; None for a split that the call doesn't have."""

    train: Source
    val: Source | None
    test: Source | None


@dataclass(frozen=True)
class Splits:
    """The splits, ready for use on the device; None for a split that the call doesn't have."""

    train: Built
    val: Built | None
    test: Built | None

    @property
    def built(self) -> list[Built]:
        """The splits that the call has, in the order train, val, test."""
        return [split for split in (self.train, self.val, self.test) if split is not None]

    @property
    def lines(self) -> list[str]:
        """The console's line on each split that the call has, without the name of the argument that it came by."""
        splits = zip(SPLITS, (self.train, self.val, self.test), strict=True)
        described = [(name, split.line) for name, split in splits if split is not None]
        return [f"{name:<9}{ARGUMENT.sub('', line)}" for name, line in described]

    @property
    def val_data(self) -> Data | None:
        """The validation data, or None."""
        return None if self.val is None else self.val.data

    @property
    def test_data(self) -> Data | None:
        """The test data, or None."""
        return None if self.test is None else self.test.data

    @property
    def named(self) -> dict[str, Data]:
        """The data of the splits that the call has, by name."""
        splits = zip(SPLITS, (self.train.data, self.val_data, self.test_data), strict=True)
        return {name: data for name, data in splits if data is not None}

    def fingerprints(self) -> dict[str, str | None]:
        """Return a hash of each split's data by the split's name; None for a missing split."""
        named = self.named
        return {name: named[name].fingerprint() if name in named else None for name in SPLITS}


def open_splits(opened: Opened, test: object, val: object, data_dir: str | None) -> Sources:
    """Open `test` and `val`, or hold out a fraction of `train` if `val` is a number.

    opened  the opened `train`

    Raises ValueError for a split without samples.
    """
    train, val_source = opened.source, None
    if is_fraction(val):
        if len(train) == 0:
            raise ValueError("`train` is empty; at least one sample is needed.")
        train, val_source = hold_out(train, float(val))  # type: ignore[arg-type]
    elif val is not None:
        val_source = open_source(val, "val", data_dir).source
    test_source = opened.test
    if test is not None:
        opened_test = open_source(test, "test", data_dir)
        test_source = opened_test.test or opened_test.source  # a named data set given as `test` means its test split
    sources = Sources(train, val_source, test_source)
    for name, source in zip(SPLITS, sources, strict=True):
        if source is not None and len(source) == 0:
            raise ValueError(f"`{name}` is empty; at least one sample is needed.")
    return sources


def is_fraction(val: object) -> bool:
    """Whether `val` is the fraction of `train` to hold out."""
    return isinstance(val, float | int) and not isinstance(val, bool)


def trained_weights(given: object, opened: Opened, val: object) -> Tensor | None:
    """Return the weights [n] float64 by which training samples are drawn, from the user's for all of `train`.

    If `val` is a fraction, those of the samples that are held out are left out.

    Raises TypeError or ValueError for weights that can't be used.
    """
    if given is None:
        return None
    try:
        weights = torch.as_tensor(given).detach().cpu()
        if weights.is_complex() or weights.layout != torch.strided:
            raise TypeError(f"got a {weights.layout} tensor of {weights.dtype}")
        weights = weights.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`recipe`: sample_weights must be numbers, one per training sample: {error}") from error
    samples = len(opened.source)
    if weights.shape != (samples,):
        raise ValueError(
            f"`recipe`: sample_weights must have one number per sample of `train`, [{samples}], got "
            f"{list(weights.shape)}. With a fraction as `val`, pass those of the held-out samples, too."
        )
    if is_fraction(val):
        weights = weights[held_out(samples, float(val))[0]]  # type: ignore[arg-type]
    if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or not 0 < float(weights.sum()) < math.inf:
        raise ValueError(
            f"`recipe`: sample_weights must be finite, at least 0 and not all 0; got {float(weights.min())} … "
            f"{float(weights.max())} with the sum {float(weights.sum())}."
        )
    return weights


def build_splits(
    sources: Sources, config: SwampConfig, device: torch.device, dtype: torch.dtype, like: Standardise | None
) -> Splits:
    """Put the splits on the device.

    like  the statistics that standardise the pictures of all splits; None measures the training split
    """
    train = build(sources.train, device, dtype, augment=config.augment, like=like)

    def without_augmentation(source: Source | None) -> Built | None:
        return None if source is None else build(source, device, dtype, like=train.standardise)

    return Splits(train, without_augmentation(sources.val), without_augmentation(sources.test))


def check_splits(splits: Splits) -> None:
    """Raise ValueError if val or test samples differ in form from those of train."""
    for name, data in (("val", splits.val_data), ("test", splits.test_data)):
        if data is not None:
            _check_like(name, data, splits.train.data)


def _check_like(name: str, data: Data, train: Data) -> None:
    if not (data.stacked and train.stacked):
        return  # the user's collate function determines the form of the samples
    (inputs, targets), (expected_inputs, expected_targets) = _sample(data), _sample(train)
    kind, expected = _kind_of(data, inputs, targets), _kind_of(train, expected_inputs, expected_targets)
    same_inputs = kind[0] == expected[0]
    if kind != expected and not (same_inputs and _labels_and_probabilities(targets, expected_targets)):
        raise ValueError(
            f"`{name}` must hold samples like those of `train`, (input, target) of {expected}; got {kind}. Pass "
            "both in the same shape and type (uint8 pictures are standardised here, float ones are taken as they are)."
        )


def _sample(data: Data) -> tuple[Any, Any]:
    """Return a batch of one sample, its inputs and targets."""
    first, no_keys = (torch.zeros(1, size, dtype=torch.int64, device=data.device) for size in (1, 3))
    return data.fetch(next(iter(data.batches(first, no_keys, [(0, 1)]))), None).lane(0)


def _labels_and_probabilities(targets: Any, others: Any) -> bool:
    """Whether one of two splits has labels [B, ...] and the other has probabilities of classes [B, C, ...]."""
    if not isinstance(targets, Tensor) or not isinstance(others, Tensor):
        return False
    labels, soft = (others, targets) if targets.is_floating_point() else (targets, others)
    fits = soft.dim() >= 2 and labels.shape == soft.shape[:1] + soft.shape[2:]
    return fits and labels.dtype == torch.int64 and soft.is_floating_point()


def _kind_of(data: Data, inputs: Any, targets: Any) -> tuple[str, str]:
    """Return the shape and type of a sample's input and target as text; the input's says whether it is standardised."""
    return ("uint8 pictures " if data.table is not None else "") + str(_kinds(inputs)), str(_kinds(targets))


def _kinds(tree: Any) -> Any:
    def kind(leaf: Any) -> str:
        return f"{list(leaf.shape[1:])} {dtype_name(leaf.dtype)}" if isinstance(leaf, Tensor) else "?"

    return tree_map(kind, tree)
