"""All forms of data give the same batches, and unsuitable data are refused with advice."""

from __future__ import annotations

import gzip
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from swamp_fast.data import samples as reading
from swamp_fast.data.sources import Arrays, hold_out, open_source
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.store import Stored, Streamed, batch_bounds, build, pass_in_stored_order
from swamp_fast.particles.random import epoch_order, lane_keys, later, stream_of

CPU = torch.device("cpu")


def pictures(n: int = 20, size: int = 6, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 pictures [n, C, H, W] and labels of 4 classes."""
    generator = torch.Generator().manual_seed(1)
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(n) % 4


def ready(given: object, augment: str = "none"):
    return build(open_source(given, "train", None).source, CPU, torch.float64, augment=augment)


def an_epoch(data, lanes: int = 2, batch_size: int = 8, epoch: int = 1, channels_last: bool = False):
    """Return all batches of one epoch, for two particles by default, with the data's augmentation."""
    keys = lane_keys([5] * lanes, [stream_of(0, lane) for lane in range(lanes)], CPU) + torch.tensor([0, 0, epoch])
    order = epoch_order(keys, data.length)
    bounds = batch_bounds(data.length, batch_size)
    return [data.fetch(handle, keys, channels_last) for handle in data.batches(order, keys, bounds)]


class Pairs(Dataset):
    """A map-style Dataset over any indexable object."""

    def __init__(self, items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


def test_forms_of_pictures_are_one(tmp_path):
    """Tensors, arrays, an .npz, Datasets of PIL pictures, tensors or arrays, and a DataLoader give equal batches."""
    images, labels = pictures()
    last = images.permute(0, 2, 3, 1).contiguous().numpy()
    np.savez(tmp_path / "set.npz", train_images=last, train_labels=labels.numpy())
    forms = {
        "tensors": (images, labels),
        "arrays": (last, labels.numpy()),
        "npz": str(tmp_path / "set.npz"),
        "PIL": Pairs([(Image.fromarray(image), int(label)) for image, label in zip(last, labels, strict=True)]),
        "tensor items": Pairs([(images[i], int(labels[i])) for i in range(20)]),
        "array items": Pairs([(last[i], labels[i]) for i in range(20)]),
        "TensorDataset": TensorDataset(images, labels),
        "DataLoader": DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True),
    }
    for augment in ("none", "crop_flip"):
        expected = an_epoch(ready(forms["tensors"], augment).data)
        for name, form in forms.items():
            built = ready(form, augment)
            assert isinstance(built.data, Stored), name
            assert "uint8, standardised" in built.line
            for found, want in zip(an_epoch(built.data), expected, strict=True):
                assert torch.equal(found.inputs, want.inputs), name
                assert torch.equal(found.targets, want.targets), name


def test_streamed_batches_are_the_stored_ones(monkeypatch):
    images, labels = pictures()
    floats = torch.randn(20, 2, 5, 5, dtype=torch.float64)
    for given in ((images, labels), (floats, labels), Pairs([(floats[i], int(labels[i])) for i in range(20)])):
        for augment in ("none", "crop_flip"):
            stored = ready(given, augment)
            with monkeypatch.context() as small:
                small.setattr(reading, "free_memory", lambda device: 100)
                streamed = ready(given, augment)
            assert isinstance(streamed.data, Streamed)
            assert "streamed" in streamed.line
            assert "GB don't fit cpu" in streamed.line
            for channels_last in (False, True):
                for found, want in zip(
                    an_epoch(streamed.data, channels_last=channels_last),
                    an_epoch(stored.data, channels_last=channels_last),
                    strict=True,
                ):
                    assert torch.equal(found.inputs, want.inputs)
                    assert torch.equal(found.targets, want.targets)
            passes = [[(i, t, n) for i, t, n in pass_in_stored_order(built.data, 8)] for built in (stored, streamed)]
            for (a, b, n), (c, d, m) in zip(*passes, strict=True):
                assert torch.equal(a, c)
                assert torch.equal(b, d)
                assert n == m == len(b)


def test_floats_are_taken_as_they_are():
    inputs = torch.randn(20, 7, dtype=torch.float64)
    built = ready((inputs, torch.arange(20) % 4))
    assert built.line.endswith("used unchanged")
    batches = an_epoch(built.data, lanes=1, batch_size=20)
    keys = lane_keys([5], [stream_of(0, 0)], CPU) + torch.tensor([0, 0, 1])
    assert torch.equal(batches[0].inputs[0], inputs[epoch_order(keys, 20)[0]])


def test_nested_inputs(monkeypatch):
    tree = {"ids": torch.arange(60).view(20, 3), "mask": torch.ones(20, 3)}
    items = Pairs([({"ids": tree["ids"][i], "mask": tree["mask"][i]}, i % 4) for i in range(20)])
    for given in ((tree, torch.arange(20) % 4), items):
        batch = an_epoch(ready(given).data)[0]
        assert batch.inputs["ids"].shape == (2, 8, 3)
        assert batch.inputs["ids"].dtype == torch.int64
        assert batch.lane(1)[0]["ids"].shape == (8, 3)
        assert torch.equal(batch.inputs["ids"][..., 0] // 3 % 4, batch.targets)


class Noisy(Dataset):
    """A Dataset that draws from torch's, Python's and NumPy's generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        import random

        return torch.tensor([torch.rand(()), random.random(), np.random.rand()]) + index, index % 4  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
def test_random_samples_are_streamed_and_repeat(workers):
    """A random Dataset is read again in each epoch. Each particle, epoch and sample has its own, reproducible draws."""
    loader = DataLoader(Noisy(), batch_size=8, num_workers=workers)
    built = ready(loader)
    assert "its samples are random and are read again in each epoch" in built.line
    first, again, later = an_epoch(built.data), an_epoch(built.data), an_epoch(built.data, epoch=2)
    alone = an_epoch(built.data, lanes=1)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.inputs[0], c.inputs[0])
    drawn = torch.cat([batch.inputs.flatten(0, 1) % 1 for batch in (*first, *later)])
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def drawn(data, order: torch.Tensor):
    """Return the batches of an epoch for an order [2, 20] that may hold a sample several times."""
    keys = lane_keys([5, 5], [stream_of(0, lane) for lane in range(2)], CPU)
    handles = data.batches(order, keys, batch_bounds(20, 8), repeats=True)
    return [data.fetch(handle, later(keys, batch), by_place=True) for batch, handle in enumerate(handles)]


def test_samples_that_are_drawn_several_times(monkeypatch):
    """Stored and streamed data give the same batches, in which a sample has its own draws each time."""
    order = torch.tensor([[3] * 20, list(range(10)) * 2])
    images, labels = pictures()
    stored = ready((images, labels), "crop_flip").data
    with monkeypatch.context() as small:
        small.setattr(reading, "free_memory", lambda device: 100)
        streamed = ready((images, labels), "crop_flip").data
    for found, want in zip(drawn(streamed, order), drawn(stored, order), strict=True):
        assert torch.equal(found.inputs, want.inputs)
        assert torch.equal(found.targets, want.targets)
    crops = torch.cat([batch.inputs[0] for batch in drawn(stored, order)])
    assert len(crops.flatten(1).unique(dim=0)) > 10
    noisy = torch.cat([batch.inputs[0] for batch in drawn(ready(Noisy()).data, order)])
    assert len(noisy.unique(dim=0)) == 20


class FlipsRarely(Dataset):
    """A Dataset that flips one sample in a thousand at random. Only its use of the generator reveals this."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        flip = random.random() < 0.001
        return torch.full((4,), -1.0 if flip else 1.0), index % 3


class TargetsInDicts(FlipsRarely):
    def __getitem__(self, index):
        return torch.ones(4), {"label": index % 3}


def test_datasets_that_are_no_fixed_arrays_are_streamed():
    assert ready(FlipsRarely()).data.streamed
    assert ready(TargetsInDicts()).data.streamed


def ragged(items):
    """A custom collate function, which pads inputs of different lengths."""
    longest = max(len(inputs) for inputs, _ in items)
    padded = torch.stack([torch.cat([inputs, inputs.new_zeros(longest - len(inputs))]) for inputs, _ in items])
    return padded, torch.tensor([target for _, target in items])


def test_a_collate_function_is_used():
    items = Pairs([(torch.arange(1.0, 2 + i % 5), i % 4) for i in range(20)])
    built = ready(DataLoader(items, batch_size=8, collate_fn=ragged))
    assert "custom collate function" in built.line
    batch = an_epoch(built.data)[0]
    assert not batch.stacked
    inputs, targets = batch.lane(1)
    assert inputs.dtype == torch.float64
    assert len(inputs) == len(targets) == 8
    with pytest.raises(ValueError, match="its samples differ in shape"):
        ready(items)


def test_what_a_loader_decides():
    loader = DataLoader(TensorDataset(*pictures()), batch_size=6, shuffle=True, drop_last=True)
    opened = open_source(loader, "train", None)
    assert (opened.batch_size, opened.drop_last) == (6, True)
    assert batch_bounds(20, 6, True) == [(0, 6), (6, 12), (12, 18)]
    assert batch_bounds(20, 6) == [(0, 6), (6, 12), (12, 18), (18, 20)]
    weighted = WeightedRandomSampler([1.0] * 20, 20)
    data = TensorDataset(*pictures())
    for bad in (
        DataLoader(data, batch_size=6, sampler=weighted),
        DataLoader(data, batch_size=6, sampler=RandomSampler(data, replacement=True)),
        DataLoader(data, batch_size=6, sampler=RandomSampler(data, num_samples=7)),
    ):
        with pytest.raises(ValueError, match="the DataLoader has a custom sampler"):
            open_source(bad, "train", None)
    with pytest.raises(ValueError, match="must have a batch_size"):
        open_source(DataLoader(data, batch_sampler=[[0, 1]]), "train", None)


def test_standardising():
    images, labels = pictures(50)
    built = ready((images, labels))
    batch = torch.cat([inputs for inputs, _, _ in pass_in_stored_order(built.data, 7)])
    floats = images.double() / 255
    mean, std = floats.mean((0, 2, 3)), floats.std((0, 2, 3), unbiased=False)
    assert torch.allclose(batch, (floats - mean[:, None, None]) / std[:, None, None], atol=1e-12)
    assert torch.allclose(built.standardise.mean, mean)
    assert built.standardise.to_dict()["std"] == pytest.approx(std.tolist())
    other = build(
        open_source((images[:9], labels[:9]), "test", None).source, CPU, torch.float64, like=built.standardise
    )
    assert torch.allclose(torch.cat([i for i, _, _ in pass_in_stored_order(other.data, 7)]), batch[:9])
    constant = Standardise.measured(torch.full((5, 2, 2, 1), 9, dtype=torch.uint8)).table(torch.float64, CPU)
    assert constant[0, 9].abs() < 1e-12
    assert constant.isfinite().all()


def test_a_last_batch_of_one_joins_the_one_before():
    built = ready((torch.randn(17, 3), torch.arange(17) % 4))
    assert [count for _, _, count in pass_in_stored_order(built.data, 8)] == [8, 9]


def test_hold_out_is_fixed_and_complete():
    source = Arrays("a", torch.arange(100.0), torch.arange(100))
    rest, held = hold_out(source, 0.2)
    again, _ = hold_out(source, 0.2)
    assert torch.equal(rest.targets, again.targets)
    assert (len(rest), len(held)) == (80, 20)
    assert sorted(torch.cat([rest.targets, held.targets]).tolist()) == list(range(100))
    for bad in (0.0, 1.0, 0.001, -0.5, 3.0):
        with pytest.raises(ValueError, match="must be a fraction of train that leaves samples on both sides"):
            hold_out(source, bad)


def test_digits_by_name():
    opened = open_source("digits", "train", None)
    assert opened.source.inputs.shape == (1438, 8, 8, 1)
    assert opened.test.inputs.shape == (359, 8, 8, 1)
    assert sorted(set(opened.source.targets.tolist())) == list(range(10))
    assert not opened.source.crops


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "svhn"])
def test_a_named_set_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SWAMP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        open_source(name, "train", None)
    for part in (str(tmp_path), "never downloaded automatically", "data_dir", "SWAMP_DATA", "download=True"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        open_source(name, "train", str(tmp_path / "elsewhere"))


def test_named_sets_from_disk(tmp_path):
    """CIFAR-10 is read from torchvision's files, and Fashion-MNIST from those of Debian's package."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    flat = pictures(4, 32)[0].flatten(1).numpy()

    def put(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    lists = {
        attribute: [
            (name, put(name, {"data": flat, "labels": [0, 1, 2, 3]})) for name, _ in getattr(CIFAR10, attribute)
        ]
        for attribute in ("train_list", "test_list")
    }
    meta = CIFAR10.meta | {"md5": put(CIFAR10.meta["filename"], {"label_names": list("abcdefghij")})}
    with pytest.MonkeyPatch.context() as patch:
        for attribute, value in lists.items():
            patch.setattr(CIFAR10, attribute, value)
        patch.setattr(CIFAR10, "meta", meta)
        opened = open_source("cifar10", "train", str(tmp_path))
    assert opened.source.inputs.shape == (20, 32, 32, 3)
    assert opened.test.inputs.shape == (4, 32, 32, 3)
    assert opened.source.crops
    assert "crop (pad 4) and flip" in build(opened.source, CPU, torch.float32, augment="auto").line

    images = pictures(5, 28, 1)[0].numpy()
    for split in ("train", "t10k"):
        packed = struct.pack(">4i", 2051, 5, 28, 28) + images.tobytes()
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed))
        packed = struct.pack(">2i", 2049, 5) + bytes([0, 1, 2, 3, 4])
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(packed))
    opened = open_source("fashion_mnist", "train", str(tmp_path))
    assert torch.equal(opened.source.inputs, torch.from_numpy(images).movedim(1, -1))
    assert opened.test.targets.tolist() == [0, 1, 2, 3, 4]


def test_an_image_folder(tmp_path):
    images, labels = pictures(8)
    for split in ("train", "test"):
        for i in range(8):
            folder = tmp_path / split / f"class{labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    opened = open_source(tmp_path, "train", None)
    built = build(opened.source, CPU, torch.float64)
    assert isinstance(built.data, Stored)
    assert sorted(built.data.targets.tolist()) == sorted(labels.tolist())
    assert opened.test is not None
    assert open_source(str(tmp_path / "train"), "train", None).test is None
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="one folder of pictures per class"):
        open_source(tmp_path / "none", "train", None)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


REFUSED = [
    ("nowhere", FileNotFoundError, r"there is no file or folder .*nowhere, and no data set named \"nowhere\""),
    (3, TypeError, "`train` must be the name of a data set .* got int"),
    (
        (torch.randn(3, 2), torch.arange(4)),
        ValueError,
        r"must have the same length, got inputs \[3, 2\] and targets \[4\]",
    ),
    ((torch.randn(3, 2), "abc"), TypeError, r"a pair must be \(inputs, targets\) tensors, got \(Tensor, str\)"),
    ((torch.zeros(9, 8, 8, 3).byte(), torch.arange(9)), ValueError, r"looks like \[n, H, W, C\]; pass images.permute"),
    ((torch.zeros(9, 8).byte(), torch.arange(9)), ValueError, "uint8 inputs must be pictures"),
    (Endless(), TypeError, "Endless is read in its own order and can.t be shuffled"),
]


@pytest.mark.parametrize(("given", "kind", "text"), REFUSED)
def test_refuses(given, kind, text):
    with pytest.raises(kind, match=text):
        open_source(given, "train", None)


def test_refuses_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="can't be read as an .npz of plain arrays"):
        open_source(tmp_path / "a.npz", "train", None)
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"must hold train_images uint8 \[n, H, W, C\] .* it holds x"):
        open_source(tmp_path / "b.npz", "train", None)
    np.savez(tmp_path / "c.npz", train_images=np.zeros((3, 2, 2, 1)), train_labels=np.array([{}, {}, {}]))
    with pytest.raises(ValueError, match="can't be read as an .npz of plain arrays"):
        open_source(tmp_path / "c.npz", "train", None)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"must be an .npz file or a folder of images; got a file '.csv'"):
        open_source(tmp_path / "d.csv", "train", None)


def test_refuses_what_a_dataset_gives():
    with pytest.raises(TypeError, match=r"a sample must be a pair \(input, target\), got a Tensor"):
        ready(Pairs([torch.zeros(3)] * 4))
    with pytest.raises(ValueError, match="uint8 samples must be pictures"):
        ready(Pairs([(torch.zeros(3).byte(), 0)] * 4))
    with pytest.raises(ValueError, match="inputs must be finite, got 1 NaN or infinite numbers of 12"):
        ready((torch.tensor([[1.0, 2, torch.nan]] + [[0.0] * 3] * 3), torch.arange(4)))
    with pytest.raises(ValueError, match='augment="crop_flip" needs pictures'):
        ready((torch.randn(4, 3), torch.arange(4)), "crop_flip")


def test_a_stream_is_checked_batch_by_batch():
    class Bad(Noisy):
        def __getitem__(self, index: int):
            return torch.rand(3) / (0.0 if index == 13 else 1.0), index

    data = ready(Bad()).data
    with pytest.raises(ValueError, match="inputs must be finite"):
        an_epoch(data)
    data = ready(Noisy()).data
    data.check_labels(3)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        an_epoch(data)
