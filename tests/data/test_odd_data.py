"""Odd forms of data are read rightly, or refused in words that begin with the argument's name."""

from __future__ import annotations

import datetime
import pathlib
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.data.sources import open_source
from swamp_fast.data.store import build
from swamp_fast.problem.prepare import prepare

INPUTS, LABELS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
SETTINGS = {"batch_size": 8, "cycles": 1, "epochs": 2, "progress": False}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


class Of(Dataset):
    """A Dataset whose samples a function makes."""

    def __init__(self, sample) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, index: int):
        return self.sample(index)


def own(depth: int = 0) -> list:
    """Return a list that contains itself, and `depth` numbers."""
    values: list = list(range(depth))
    values.append(values)
    return values


def batches(collate, given=None) -> DataLoader:
    return DataLoader(given or TensorDataset(INPUTS, LABELS), 8, collate_fn=collate)


def read_only(values: torch.Tensor) -> np.ndarray:
    array = values.numpy().copy()
    array.flags.writeable = False
    return array


class Endless(IterableDataset):
    def __iter__(self):
        return iter(zip(INPUTS, LABELS, strict=True))


def test_odd_arrays_are_read_rightly(tmp_path):
    np.save(tmp_path / "x.npy", INPUTS.numpy())
    negative = torch.complex(INPUTS, -INPUTS).conj().imag
    assert negative.is_neg()
    forms = {
        "negative bit": (negative, LABELS),
        "big-endian": (INPUTS.numpy().astype(">f4"), LABELS.numpy().astype(">i2")),
        "strides below 0": (INPUTS.flip(0).numpy()[::-1], LABELS.flip(0).numpy()[::-1]),
        "memory-mapped": (np.load(tmp_path / "x.npy", mmap_mode="r"), read_only(LABELS)),
        "a Dataset of big-endian": Of(lambda i: (INPUTS[i].numpy().astype(">f4"), np.int16(LABELS[i]))),
        "a Dataset of read-only": Of(lambda i: (read_only(INPUTS[i]), int(LABELS[i]))),
    }
    for name, given in forms.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            built = build(open_source(given, "train", None).source, torch.device("cpu"), torch.float32)
        assert torch.equal(built.data.inputs, INPUTS), name
        assert torch.equal(built.data.targets, LABELS), name
        plain = build(open_source((INPUTS, LABELS), "train", None).source, torch.device("cpu"), torch.float32)
        assert built.data.fingerprint() == plain.data.fingerprint(), name


JAGGED = torch.nested.nested_tensor([torch.randn(6) for _ in range(40)], layout=torch.jagged)
MUST_BE = r"must be the name of a data set .*, a pair \(inputs, targets\) of tensors, .*got "
SAMPLE = r" \(Of\): a sample's "
REFUSED = {
    "nested": ((JAGGED, LABELS), "`: inputs must be dense tensors of real numbers, got a nested one"),
    "complex": ((INPUTS.to(torch.complex64), LABELS), "`: inputs must be dense .* got a complex one"),
    "conjugate": ((INPUTS.to(torch.complex64).conj(), LABELS), "`: inputs must be dense .* got a complex one"),
    "sparse targets": ((INPUTS, LABELS.to_sparse()), "`: targets must be dense .* got a torch.sparse_coo one"),
    "structured": ((np.zeros(40, [("a", "f4")]), LABELS), r"`: inputs must be numbers of a type that torch has, got"),
    "dates": ((np.zeros(40, "datetime64[s]"), LABELS), r"`: inputs must be numbers .* array of datetime64\[s\]"),
    "long double": ((np.zeros((40, 6), np.longdouble), LABELS), r"`: inputs must be .*\.astype\(numpy.float64\)"),
    "no axis in inputs": ((torch.tensor(1.0), LABELS), r"`: inputs and .* got inputs \[\] and targets \[40\]"),
    "no axis in targets": ((INPUTS, torch.tensor(1)), r"`: inputs and .* got inputs \[40, 6\] and targets \[\]"),
    "no axis": ((torch.tensor(1.0), torch.tensor(1)), r"`: inputs and .* got inputs \[\] and targets \[\]"),
    "NumPy's no axis": ((np.array(1.0), np.array(1)), r"`: inputs and .* got inputs \[\] and targets \[\]"),
    "itself": (own(), r"` \(list\): a sample is nested too deeply; does a list"),
    "itself among samples": (own(3), r"` \(list\): a sample is nested too deeply"),
    "itself as inputs": ((own(), LABELS), "` is nested too deeply"),
    "itself as targets": ((INPUTS, own(1)), "`: targets must be a list of numbers or of equally long lists"),
    "ragged targets": ((INPUTS, [[1], [1, 2]] * 20), "`: targets must be a list of numbers or of equally long lists"),
    "long text": ("a" * 5000, r"` must be .* a path; got a text of 5,000 characters, 'a{20}' …, which can't be"),
    "long path": (pathlib.Path("a" * 5000), "` must be .* got a text of 5,000 characters"),
    "bytes": (b"digits", f"` {MUST_BE}bytes"),
    "range": (range(10), f"` {MUST_BE}range"),
    "model": (network(), rf"` {MUST_BE}a model \(Sequential\)"),
    "class": (TensorDataset, f"` {MUST_BE}the class TensorDataset; call it first"),
    "None in a list": ([None], r"` \(list\): a sample must be a pair .* got a NoneType"),
    "None and None": ((None, None), r"`: a pair must be .* got \(NoneType, NoneType\)"),
    "None among inputs": (([INPUTS, None], LABELS), "`: inputs must be tensors or arrays, got NoneType among them"),
    "samples in a list": (([*INPUTS], LABELS), r"`: inputs must be one tensor of all samples, got a list of 40,"),
    "iterable's loader": (DataLoader(Endless(), 8), "`: Endless is read in its own order and can't be shuffled"),
    "sampler": (
        DataLoader(TensorDataset(INPUTS, LABELS), 8, sampler=WeightedRandomSampler([1.0] * 40, 40)),
        "`: the DataLoader has a custom sampler, WeightedRandomSampler, but ",
    ),
    "no label": (Of(lambda i: (INPUTS[i], None)), f"`{SAMPLE}targets must be .* got NoneType"),
    "no input": (Of(lambda i: (None, 1)), f"`{SAMPLE}inputs must be .* got NoneType"),
    "date as label": (Of(lambda i: (INPUTS[i], datetime.date.today())), f"`{SAMPLE}targets must be .* got date"),
    "one label missing": (Of(lambda i: (INPUTS[i], None if i == 33 else 1)), f"`{SAMPLE}targets must be"),
    "text as label": (Of(lambda i: (INPUTS[i], "a")), r"` \(Of\): targets must be numbers, got the text 'a'"),
    "no batch": (batches(lambda samples: (None, None)), r"` \(TensorDataset\): a batch's inputs are None"),
    "nothing in a batch": (batches(lambda samples: None), r"` \(TensorDataset\): a batch must be a pair"),
}


@pytest.mark.parametrize("argument", ["train", "val", "test"])
@pytest.mark.parametrize(("given", "text"), REFUSED.values(), ids=REFUSED)
def test_odd_data_are_refused_in_words(given, text, argument):
    splits = {"train": (INPUTS, LABELS), argument: given}
    with pytest.raises((TypeError, ValueError), match=rf"^`{argument}{text}"):
        naive_swamp(network(), splits.pop("train"), **splits, **SETTINGS)


def test_samplers_are_refused_for_true_reasons():
    loader = REFUSED["sampler"][0]
    with pytest.raises(ValueError, match=r"^`train`: .* each particle draws its own order of samples"):
        prepare(network(), loader, settings=SETTINGS)
    with pytest.raises(ValueError, match=r"^`test`: .* every sample is read once"):
        prepare(network(), (INPUTS, LABELS), loader, settings=SETTINGS)


def test_memory_mapped_data_train_as_others_do(tmp_path):
    np.save(tmp_path / "x.npy", INPUTS.numpy())
    torch.manual_seed(0)
    model = network()
    mapped = (np.load(tmp_path / "x.npy", mmap_mode="r"), LABELS)
    states = [fast_swamp(model, data, **SETTINGS).model.state_dict() for data in (mapped, (INPUTS, LABELS))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
