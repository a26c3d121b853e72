"""Opens the data that a user passes as one of two sources: arrays in memory, or a Dataset read sample by sample."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
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
from swamp_fast.common.tree import tensors, tree_leaves, tree_map
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
    argument: str = ""  # by which it was passed

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
    argument: str = ""

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


Source = Arrays | Samples


def described(source: Source) -> str:
    """Return how messages name a source: the argument in backticks, and the source's own name if it has another."""
    if not source.argument:
        return source.name
    return f"`{source.argument}`" if source.name == source.argument else f"`{source.argument}` ({source.name})"


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
    with nesting_checked(f"`{argument}`"):
        opened = _open(given, argument, data_dir)
    test = None if opened.test is None else replace(opened.test, argument=argument)
    return replace(opened, source=replace(opened.source, argument=argument), test=test)


@contextmanager
def nesting_checked(name: str) -> Iterator[None]:
    """A context that raises ValueError, beginning with `name`, where lists or dicts are nested too deeply to read."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply; does a list, a tuple or a dict contain itself?") from error


def _open(given: object, argument: str, data_dir: str | None) -> Opened:
    if isinstance(given, str) and given in NAMED:
        train, test = _named(given, data_dir)
        return Opened(train, test)
    if isinstance(given, str | Path):
        return _from_path(given, argument)
    if isinstance(given, tuple | list) and len(given) == 2:
        return Opened(_from_pair(given[0], given[1], argument))
    if isinstance(given, DataLoader):
        return _from_loader(given, argument)
    _refuse_parts(given, argument)
    if isinstance(given, Dataset) or _is_map(given):
        return Opened(_from_dataset(given, argument))  # type: ignore[arg-type]
    raise TypeError(
        f"`{argument}` must be the name of a data set ({', '.join(NAMED)}), a path to an .npz or an image folder, "
        f"a pair (inputs, targets) of tensors, a Dataset or a DataLoader; got {_kind(given)}."
    )


def _refuse_parts(given: object, argument: str) -> None:
    """Raise TypeError for what holds inputs and targets in another form than a pair, or only one of them."""
    if isinstance(given, dict):
        raise TypeError(f"`{argument}` must be a pair (inputs, targets), got a dict: pass (data[...], data[...]).")
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


def _is_map(given: object) -> bool:
    """Whether an object that is no Dataset can be read like one, as a list of samples can."""
    if isinstance(given, type | nn.Module | range | bytes | bytearray | memoryview):
        return False
    return hasattr(given, "__getitem__") and hasattr(given, "__len__")


def _kind(given: object) -> str:
    """Return what was passed, in words."""
    if isinstance(given, type):
        return f"the class {given.__name__}; call it first"
    return f"a model ({type(given).__name__})" if isinstance(given, nn.Module) else type(given).__name__


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
    if isinstance(given, str) and not given:
        raise ValueError(f"`{argument}` is an empty text; pass the name of a data set, or a path.")
    path = Path(given).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise ValueError(
            f"`{argument}` must be the name of a data set or a path; got a text of {len(str(given)):,} characters, "
            f"{str(given)[:20]!r} …, which can't be a path: {error.strerror}."
        ) from error
    if is_folder:
        return _folder(path, argument)
    if not exists:
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
    channels_last = isinstance(inputs, np.ndarray)
    targets = _dense(_array_of(targets, argument), f"`{argument}`: targets")
    inputs = tree_map(lambda leaf: _dense(leaf, f"`{argument}`: inputs"), inputs)
    if not isinstance(targets, Tensor) or not tensors(inputs):
        raise TypeError(
            f"`{argument}`: a pair must be (inputs, targets) tensors, got "
            f"({type(inputs).__name__}, {type(targets).__name__}). Convert others with torch.as_tensor or to_numpy()."
        )
    _check_lengths(inputs, targets, argument)
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
        inputs = _pictures(inputs if channels_last or inputs.dim() == 3 else _channels_last(inputs, argument), argument)
    return Arrays(argument, inputs, targets.detach())


def _array_of(targets: object, argument: str) -> object:
    """Return a list of targets as an array, and anything else unchanged."""
    if not isinstance(targets, list):
        return targets
    try:
        return np.asarray(targets)
    except ValueError as error:
        raise ValueError(
            f"`{argument}`: targets must be a list of numbers or of equally long lists: {error}"
        ) from error


def _check_lengths(inputs: Any, targets: Tensor, argument: str) -> None:
    """Raise TypeError or ValueError unless all inputs and the targets are tensors of as many samples."""
    others = {type(leaf).__name__ for leaf in tree_leaves(inputs) if not isinstance(leaf, Tensor)}
    if others:
        raise TypeError(f"`{argument}`: inputs must be tensors or arrays, got {', '.join(sorted(others))} among them.")
    shapes = [list(leaf.shape) for leaf in tensors(inputs)]
    if targets.dim() and all(shape[:1] == [len(targets)] for shape in shapes):
        return
    if isinstance(inputs, list | tuple) and targets.dim() and len(inputs) == len(targets):
        raise ValueError(
            f"`{argument}`: inputs must be one tensor of all samples, got a {type(inputs).__name__} of {len(inputs)}, "
            "which would be as many inputs of each sample. Pass torch.stack(inputs) or numpy.stack(inputs)."
        )
    raise ValueError(
        f"`{argument}`: inputs and targets must have the same length, got inputs {', '.join(map(str, shapes[:6]))} and "
        f"targets {list(targets.shape)}; pass one target per sample."
    )


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
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # nothing writes to the user's data
        try:
            return torch.from_numpy(np.ascontiguousarray(values) if values.ndim else values)
        except TypeError as error:
            raise TypeError(
                f"{name} must be numbers of a type that torch has, got an array of {values.dtype}. Convert it, as with "
                ".astype(numpy.float64)."
            ) from error


def _dense(values: Any, name: str) -> Any:
    """Return an array or a tensor as a dense tensor of real numbers, and anything else unchanged."""
    tensor = as_tensor(values, name)
    if not isinstance(tensor, Tensor):
        return tensor
    kinds = {
        "nested": tensor.is_nested,
        str(tensor.layout): tensor.layout != torch.strided,
        "meta": tensor.is_meta,
        "complex": tensor.is_complex(),
        "quantized": tensor.is_quantized,
    }
    for kind, holds in kinds.items():
        if holds:
            raise TypeError(f"{name} must be dense tensors of real numbers, got a {kind} one.")
    return tensor.resolve_neg()


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
    source = _from_dataset(loader.dataset, argument)
    plain_random = (
        type(loader.sampler) is RandomSampler
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(loader.sampler.data_source)
    )
    if loader.batch_sampler is None or loader.batch_size is None:
        raise ValueError(f"`{argument}`: the DataLoader must have a batch_size (no custom batch_sampler).")
    if not plain_random and type(loader.sampler) is not SequentialSampler:
        why = "each particle draws its own order of samples" if argument == "train" else "every sample is read once"
        raise ValueError(
            f"`{argument}`: the DataLoader has a custom sampler, {type(loader.sampler).__name__}, but {why}. Pass a "
            "loader without a sampler (shuffle=True or False), or its dataset. The weights of a WeightedRandomSampler "
            "go into recipe=Recipe(sample_weights=...)."
        )
    if loader.collate_fn is not default_collate or isinstance(source, Samples):
        source = Samples(
            *(type(loader.dataset).__name__, loader.dataset, loader.collate_fn, loader.num_workers),
            worker_start=WorkerStart(loader.dataset, loader.worker_init_fn)
            if loader.worker_init_fn and loader.num_workers
            else None,
        )
    return Opened(source, batch_size=loader.batch_size, drop_last=loader.drop_last)
