"""Opens the data that a user passes as one of two sources: arrays in memory, or a Dataset read sample by sample."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torch.utils.data.dataloader import default_collate

from swamp_fast.common.format import dtype_name
from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.data.workers import WorkerStart
from swamp_fast.particles.random import split_order

NAMED = ("digits", "cifar10", "cifar100", "fashion_mnist", "svhn")
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion_mnist": "FashionMNIST", "svhn": "SVHN"}


@dataclass(frozen=True)
class Arrays:
    """A split in memory.

    inputs   uint8 pictures [n, H, W, C], or a tree of other tensors [n, ...]
    targets  [n, ...]
    """

    name: str
    inputs: Any
    targets: Tensor
    crops: bool = False  # whether augment="auto" crops and flips the pictures

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Samples:
    """A split that is read sample by sample from the user's Dataset."""

    name: str
    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    workers: int = 0
    crops: bool = False
    worker_start: Callable[[int], object] | None = None  # called with its number in each process that reads samples
    repeats: bool = True  # whether a sample is the same each time it is read after seeding the global generators

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


Source = Arrays | Samples


@dataclass(frozen=True)
class Opened:
    """An opened data argument.

    source                 the split that was passed
    test                   the test split that comes with it, or None
    batch_size, drop_last  the settings of a DataLoader
    """

    source: Source
    test: Source | None = None
    batch_size: int | None = None
    drop_last: bool = False


def open_source(given: object, argument: str, data_dir: str | None) -> Opened:
    """Open data passed as `argument` (train, test or val): a name, a path, tensors, a Dataset or a DataLoader.

    Raises TypeError, ValueError, FileNotFoundError or ImportError.
    """
    if isinstance(given, str) and not given:
        raise ValueError(f"`{argument}` is an empty text; pass the name of a data set, or a path.")
    if isinstance(given, dict):
        raise TypeError(f"`{argument}` must be a pair (inputs, targets), got a dict: pass (data[...], data[...]).")
    if isinstance(given, str) and given in NAMED:
        train, test = _named(given, data_dir)
        return Opened(train, test)
    if isinstance(given, str | Path):
        return _from_path(given, argument)
    if isinstance(given, tuple | list) and len(given) == 2:
        return Opened(_from_pair(given[0], given[1], argument))
    if isinstance(given, tuple) and all(isinstance(each, Tensor | np.ndarray) for each in given):
        raise TypeError(
            f"`{argument}` must be a pair (inputs, targets), got a tuple of {len(given)} arrays. Several inputs go "
            "into one tuple, ((a, b), targets), and test data into `test`."
        )
    if isinstance(given, Tensor | np.ndarray):
        raise TypeError(
            f"`{argument}` must hold inputs and targets, got one {type(given).__name__} {list(given.shape)}. Pass the "
            f"pair (inputs, targets) as `{argument}`: fast_swamp(model, (x, y), (test_x, test_y))."
        )
    if isinstance(given, DataLoader):
        return _from_loader(given, argument)
    if isinstance(given, Dataset) or (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        return Opened(_from_dataset(given, argument))  # type: ignore[arg-type]
    raise TypeError(
        f"`{argument}` must be the name of a data set ({', '.join(NAMED)}), a path to an .npz or an image folder, "
        f"a pair (inputs, targets) of tensors, a Dataset or a DataLoader; got {type(given).__name__}."
    )


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """Split a source into a training part and a random `fraction` for validation, which is the same on every call.

    Raises ValueError if one of the two would be empty.
    """
    train, held = held_out(len(source), fraction)
    return _subset(source, train, ""), _subset(source, held, "held out of ")


def held_out(samples: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the sorted numbers of the samples that are trained on, and of those that are held out.

    Raises ValueError if there would be none of either.
    """
    held = round(samples * fraction) if 0 < fraction < 1 else 0
    if not 0 < held < samples:
        raise ValueError(
            f"`val` as a number must be a fraction of train that leaves samples on both sides; got {fraction} "
            f"of {samples} samples."
        )
    order = split_order(samples)
    return order[held:].sort().values, order[:held].sort().values


def _subset(source: Source, index: Tensor, prefix: str) -> Source:
    name = f"{prefix}{source.name}"
    if isinstance(source, Samples):
        return replace(source, name=name, dataset=torch.utils.data.Subset(source.dataset, index.tolist()))
    return replace(
        source,
        name=name,
        inputs=tree_map(lambda leaf: leaf[index], source.inputs),
        targets=source.targets[index],
    )


def _named(name: str, data_dir: str | None) -> tuple[Source, Source]:
    if name == "digits":
        return _digits()
    root = Path(data_dir or os.environ.get("SWAMP_DATA") or "data").expanduser()
    if name == "fashion_mnist" and (root / "train-images-idx3-ubyte.gz").exists():
        return _idx(root, "train", name), _idx(root, "t10k", name)
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f'"{name}" needs torchvision: `pip install "swamp-fast[data]"`. ({error})') from error
    kind = getattr(datasets, TORCHVISION[name])
    splits: list[Source] = []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            data = kind(str(root), download=False, **which)
        except RuntimeError as error:
            raise FileNotFoundError(
                f'the data set "{name}" is not in {root.resolve()}; data are never downloaded automatically. Pass '
                f"data_dir or set SWAMP_DATA to its folder, or download it with\n"
                f'  python -c "from torchvision.datasets import {TORCHVISION[name]} as D; '
                + "; ".join(f"D({str(root)!r}, {_keyword(name, part)}, download=True)" for part in (True, False))
                + f'"\n({error})'
            ) from error
        images = torch.as_tensor(np.asarray(data.data))
        if name == "svhn":
            images = images.permute(0, 2, 3, 1)
        targets = torch.as_tensor(np.asarray(data.labels if name == "svhn" else data.targets))
        splits.append(Arrays(name, _pictures(images, name), targets.long(), crops=name.startswith("cifar")))
    return splits[0], splits[1]


def _keyword(name: str, train: bool) -> str:
    return f"split={'train' if train else 'test'!r}" if name == "svhn" else f"train={train}"


def _digits() -> tuple[Source, Source]:
    """Return scikit-learn's 1,797 handwritten digits, 8 x 8. It has no test split, so a random fifth is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f'"digits" needs scikit-learn: `pip install "swamp-fast[data]"`. ({error})') from error
    data = load_digits()
    images = torch.from_numpy(data.images.astype(np.uint8))[..., None]
    whole = Arrays("digits", images.contiguous(), torch.from_numpy(data.target).long())
    train, test = hold_out(whole, 0.2)
    return replace(train, name="digits"), replace(test, name="digits")


def _idx(root: Path, split: str, name: str) -> Source:
    """Read one split from files in MNIST's format, as in Debian's package dataset-fashion-mnist."""
    import gzip

    images = np.frombuffer(gzip.decompress((root / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((root / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    pictures = torch.from_numpy(images.reshape(len(labels), 28, 28, 1).copy())
    return Arrays(name, pictures, torch.from_numpy(labels.astype(np.int64)))


def _from_path(given: str | Path, argument: str) -> Opened:
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder(path, argument)
    if not path.exists():
        raise FileNotFoundError(
            f"`{argument}`: there is no file or folder {path.absolute()}, and no data set named "
            f'"{given}" (known: {", ".join(NAMED)}).'
        )
    if path.suffix != ".npz":
        raise ValueError(
            f"`{argument}`: {path} must be an .npz file or a folder of images; got a file {path.suffix!r}."
        )
    try:
        file = np.load(path, allow_pickle=False)
        arrays = {key: file[key] for key in file.files}
    except Exception as error:
        raise ValueError(f"`{argument}`: {path} can't be read as an .npz of plain arrays: {error}") from error
    splits: dict[str, Source] = {}
    for split in ("train", "test"):
        images, labels = (arrays.get(f"{split}_{part}") for part in ("images", "labels"))
        if images is not None and labels is not None:
            splits[split] = _from_pair(images, labels, f"{argument}: {path.name} {split}")
    if "train" not in splits:
        raise ValueError(
            f"`{argument}`: {path} must hold train_images uint8 [n, H, W, C] and train_labels [n] (optionally also "
            f"test_images and test_labels); it holds {', '.join(arrays) or 'nothing'}."
        )
    return Opened(splits["train"], splits.get("test"))


def _folder(path: Path, argument: str) -> Opened:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError(f'an image folder needs torchvision: `pip install "swamp-fast[data]"`. ({error})') from error
    root = path / "train" if (path / "train").is_dir() else path
    test_root = next((path / name for name in ("test", "val") if root != path and (path / name).is_dir()), None)
    try:
        train = ImageFolder(str(root))
        test = ImageFolder(str(test_root)) if test_root else None
    except FileNotFoundError as error:
        raise ValueError(
            f"`{argument}`: {root} must hold one folder of pictures per class, or train/ and test/ that do ({error})."
        ) from error
    if test is not None and test.classes != train.classes:
        raise ValueError(f"`{argument}`: {root} and {test_root} must have the same classes.")
    return Opened(Samples(path.name, train), Samples(path.name, test) if test is not None else None)


def _from_pair(inputs: object, targets: object, argument: str) -> Source:
    """Make Arrays from inputs and targets. Pictures in tensors have channels first, those in NumPy arrays last."""
    if isinstance(targets, list):
        targets = np.asarray(targets)
    targets = as_tensor(targets, f"`{argument}`: targets")
    channels_last = isinstance(inputs, np.ndarray)
    inputs = tree_map(lambda leaf: as_tensor(leaf, f"`{argument}`: inputs"), inputs)
    if not isinstance(targets, Tensor) or not tensors(inputs):
        raise TypeError(
            f"`{argument}`: a pair must be (inputs, targets) tensors, got "
            f"({type(inputs).__name__}, {type(targets).__name__}). Convert others with torch.as_tensor or to_numpy()."
        )
    for leaf in (*tensors(inputs), targets):
        if leaf.layout != torch.strided or leaf.is_meta or leaf.is_complex():
            kind = "complex" if leaf.is_complex() else "meta" if leaf.is_meta else str(leaf.layout)
            raise TypeError(f"`{argument}` must hold dense tensors of real numbers, got a {kind} one.")
    lengths = {len(leaf) if leaf.dim() else 0 for leaf in tensors(inputs)}
    if lengths != {len(targets) if targets.dim() else 0}:
        raise ValueError(
            f"`{argument}`: inputs and targets must have the same length, got {sorted(lengths)} inputs and "
            f"{list(targets.shape)} targets; pass one target per sample."
        )
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
        inputs = _pictures(inputs if channels_last or inputs.dim() == 3 else _channels_last(inputs, argument), argument)
    return Arrays(argument, inputs, targets.detach())


def as_tensor(values: Any, name: str) -> Any:
    """Return an array as a tensor, and anything else unchanged.

    Raises TypeError or ValueError, beginning with `name`, for arrays that have no tensor or hold masked values.
    """
    if not isinstance(values, np.ndarray):
        return values
    if isinstance(values, np.ma.MaskedArray):
        if values.mask.any():
            raise ValueError(
                f"{name} are a masked array in which {int(values.mask.sum()):,} values are masked, so they have no "
                "value. Leave those samples out, or fill the values in with .filled(...)."
            )
        values = values.data
    if values.dtype.kind in "USO":
        raise TypeError(
            f"{name} must be numbers, got an array of {values.dtype}. Number text labels from 0: "
            "names, labels = numpy.unique(labels, return_inverse=True)."
        )
    return torch.from_numpy(np.ascontiguousarray(values) if values.ndim else values)


def _channels_last(images: Tensor, argument: str) -> Tensor:
    if images.dim() == 4 and images.shape[1] > 4 and images.shape[3] <= 4:
        raise ValueError(
            f"`{argument}`: uint8 tensors must be pictures [n, C, H, W] (or [n, H, W]), got {list(images.shape)}, "
            "which looks like [n, H, W, C]; pass images.permute(0, 3, 1, 2)."
        )
    return images.movedim(1, -1) if images.dim() == 4 else images


def _pictures(images: Tensor, argument: str) -> Tensor:
    """Return uint8 pictures [n, H, W] or [n, H, W, C] as a contiguous tensor [n, H, W, C]."""
    if images.dim() == 3:
        images = images[..., None]
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(
            f"`{argument}`: uint8 inputs must be pictures with or without a channel axis, got {list(images.shape)} "
            f"{dtype_name(images.dtype)}. Pass other inputs as floating-point tensors."
        )
    return images.contiguous()


def _from_dataset(dataset: Dataset[Any], argument: str) -> Source:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"`{argument}`: {type(dataset).__name__} is read in its own order and can't be shuffled, because it is an "
            "IterableDataset or has no length. Pass a Dataset with __len__ and __getitem__."
        )
    as_stored = type(dataset).__getitem__ is TensorDataset.__getitem__  # not if a subclass changes the samples
    if isinstance(dataset, TensorDataset) and as_stored and len(dataset.tensors) == 2:
        return replace(_from_pair(*dataset.tensors, argument), name=type(dataset).__name__)
    return Samples(type(dataset).__name__, dataset)


def _from_loader(loader: DataLoader[Any], argument: str) -> Opened:
    plain_random = (
        type(loader.sampler) is RandomSampler
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(loader.sampler.data_source)
    )
    if loader.batch_sampler is None or loader.batch_size is None:
        raise ValueError(f"`{argument}`: the DataLoader must have a batch_size (no custom batch_sampler).")
    if not plain_random and type(loader.sampler) is not SequentialSampler:
        raise ValueError(
            f"`{argument}`: the DataLoader has a custom sampler, {type(loader.sampler).__name__}, but each particle "
            "draws its own order of samples. Pass a loader without a sampler (shuffle=True or False), or its dataset. "
            "The weights of a WeightedRandomSampler go into recipe=Recipe(sample_weights=...)."
        )
    source = _from_dataset(loader.dataset, argument)
    if loader.collate_fn is not default_collate or isinstance(source, Samples):
        source = Samples(
            *(type(loader.dataset).__name__, loader.dataset, loader.collate_fn, loader.num_workers),
            worker_start=WorkerStart(loader.dataset, loader.worker_init_fn)
            if loader.worker_init_fn and loader.num_workers
            else None,
        )
    return Opened(source, batch_size=loader.batch_size, drop_last=loader.drop_last)
