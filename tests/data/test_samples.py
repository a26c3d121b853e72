"""What a Dataset, a DataLoader or arrays may give: each form works, or the message says what to do."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.problem.prepare import prepare

SETTINGS = {"batch_size": 16, "cycles": 1, "epochs": 2, "ticket_epochs": 0, "particles": 2, "progress": False}
INPUTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


class Of(Dataset):
    """The samples that a function of the index gives."""

    def __init__(self, sample, samples: int = 64) -> None:
        self.sample, self.samples = sample, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index):
        return self.sample(index)


def masked(values: np.ndarray, masked: bool) -> np.ma.MaskedArray:
    mask = np.zeros(values.shape, bool)
    mask[0] = masked
    return np.ma.masked_array(values, mask)


def hugging_face(index):
    return {"input_ids": INPUTS[index], "labels": LABELS[index]}


REFUSED = [
    ((INPUTS,), "got a tuple of 1 arrays"),
    ((INPUTS, LABELS, INPUTS, LABELS), r"got a tuple of 4 arrays.* and test data into `test`"),
    (INPUTS, r"got one Tensor \[64, 16\]. Pass the pair \(inputs, targets\) as `train`"),
    (INPUTS.numpy(), r"got one ndarray \[64, 16\]"),
    (
        TensorDataset(INPUTS, INPUTS, LABELS),
        r"must be a pair \(input, target\), got 3 values.* as in \(\(a, b\), target\)",
    ),
    (Of(hugging_face), "got a dict with input_ids, labels. Return a pair .* collate_fn that does"),
    (DataLoader(Of(hugging_face), 16, collate_fn=lambda samples: {"labels": LABELS}), "from your collate_fn"),
    ((INPUTS, np.array(list("abcd"))[LABELS.numpy()]), r"targets must be numbers, got an array of <U1.*numpy.unique"),
    (Of(lambda i: (INPUTS[i], "cat")), "targets must be numbers, got the text 'cat'"),
    ((masked(INPUTS.numpy(), True), LABELS), r"inputs are a masked array in which 16 values are masked.*\.filled"),
    ((INPUTS, masked(LABELS.numpy(), True)), "targets are a masked array in which 1 values are masked"),
    (
        Of(lambda i: (torch.zeros(17 if i == 101 else 16), 0), 200),
        r"sample 0 has \[16\], \[\], sample 101 has \[17\], \[\]",
    ),
    (
        Of(lambda i: (torch.rand(17 if i == 101 else 16), 0), 200),
        r"differ in shape, so they can't be stacked to a batch: sample \d+ has \[1[67]\]",
    ),
    ((torch.randint(0, 9, (64, 16)), LABELS), r"inputs are int64.*\.float\(\)"),
]


@pytest.mark.parametrize(("data", "text"), REFUSED)
def test_says_what_to_do(data, text):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=text):
        fast_swamp(network(), data, **SETTINGS | {"batch_size": 16})
    if not isinstance(data, Dataset | DataLoader):
        with pytest.raises((TypeError, ValueError), match="`test`|in evaluation"):
            fast_swamp(network(), (INPUTS, LABELS), data, **SETTINGS)


def final_loss(data, driver=fast_swamp) -> float:
    return driver(network(), data, **SETTINGS).history[-1]["train_loss"][0]


def test_an_array_without_masked_values_is_taken():
    assert final_loss((masked(INPUTS.numpy(), False), LABELS)) == final_loss((INPUTS, LABELS))


def test_grey_pictures_from_a_dataset():
    pictures = torch.randint(0, 256, (64, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    assert final_loss(Of(lambda i: (pictures[i], LABELS[i]))) == final_loss((pictures, LABELS))


@pytest.mark.parametrize("form", [lambda mask: mask, lambda mask: mask.numpy()])
def test_targets_are_no_pictures(form):
    """uint8 targets keep their axes, whether they come from a Dataset or in a pair."""
    targets = torch.randint(0, 256, (64, 3, 4, 5), dtype=torch.uint8)
    for part in (targets, targets[:, 0]):
        given = Of(lambda i, part=part: (INPUTS[i], form(part[i])))

        def loss(outputs, targets, part=part):
            assert targets.shape[1:] == part.shape[1:]
            return F.cross_entropy(outputs, targets.flatten(1)[:, 0] % 4, reduction="none")

        fast_swamp(network(), given, loss=loss, **SETTINGS)


class File(Dataset):
    """A Dataset that worker_init_fn gives its file, or that opens it by itself."""

    def __init__(self, own: bool) -> None:
        self.file = INPUTS if own else None

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(16)
        return self.file[index] + noise, LABELS[index]


def open_file(number: int) -> None:
    get_worker_info().dataset.file = INPUTS + 100


def test_worker_init_fn_is_called_in_workers():
    def trained(start):
        return final_loss(DataLoader(File(True), 16, num_workers=1, worker_init_fn=start))

    assert trained(open_file) != trained(None) == final_loss(File(True))
    with pytest.raises(ValueError, match="can't be read outside of the DataLoader's workers"):
        final_loss(DataLoader(File(False), 16, num_workers=1, worker_init_fn=open_file))


class Noisy(Dataset):
    """Its noise comes from a generator of its own."""

    def __init__(self, draw) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index):
        return INPUTS[index] + self.draw(), LABELS[index]


def generators() -> dict:
    torchs, drawn, seeded = torch.Generator().manual_seed(0), np.random.default_rng(), np.random.default_rng(0)
    python = random.Random(0)
    return {
        "numpy": lambda: torch.from_numpy(drawn.standard_normal(16, np.float32)),
        "seeded": lambda: torch.from_numpy(seeded.standard_normal(16, np.float32)),
        "torch": lambda: torch.randn(16, generator=torchs),
        "random": lambda: python.gauss(0, 1),
    }


class Stop(Exception):
    pass


def stop(row):
    raise Stop


@pytest.mark.parametrize("driver", [fast_swamp, naive_swamp])
@pytest.mark.parametrize("name", generators())
def test_a_generator_of_the_datasets_own(driver, name, tmp_path):
    """The run goes on after an interruption, and says at the start that it isn't the same as without one."""
    settings = SETTINGS | {"run_dir": tmp_path / "run"}
    with (
        pytest.warns(UserWarning, match="what Noisy reads differs each time, .* draw from torch's global generator"),
        pytest.raises(Stop),
    ):
        driver(network(), Noisy(generators()[name]), on_cycle=stop, **settings)
    with pytest.warns(UserWarning, match="a run that is repeated or resumed"):
        result = driver(network(), Noisy(generators()[name]), **settings)
    assert len(result.history) == 2


@pytest.mark.parametrize("collate", [None, lambda samples: torch.utils.data.default_collate(samples)])
def test_the_console_says_that_samples_do_not_repeat(collate, capsys):
    for draw, said in ((generators()["seeded"], True), (lambda: torch.randn(16), False)):
        fast_swamp(network(), DataLoader(Noisy(draw), 16, collate_fn=collate), **SETTINGS | {"progress": True})
        assert ("what Noisy reads differs each time" in capsys.readouterr().err) == said


def test_a_transform_with_a_generator_of_its_own(tmp_path):
    torchs = torch.Generator().manual_seed(0)
    settings = SETTINGS | {"run_dir": tmp_path / "run"}
    with pytest.warns(UserWarning, match="what `transform` returns differs each time"):
        fast_swamp(
            *(network(), (INPUTS, LABELS)), transform=lambda x: x + torch.randn(x.shape, generator=torchs), **settings
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differs each time")
        fast_swamp(network(), (INPUTS, LABELS), transform=lambda x: x.add_(torch.randn_like(x)), **SETTINGS)


def test_a_collate_function_that_counts_its_calls_has_one_fingerprint():
    def counting(scale):
        calls = []

        def collate(samples):
            calls.append(len(samples))
            inputs, labels = (torch.stack(part) for part in zip(*samples, strict=True))
            return scale * inputs, labels

        return collate

    def fingerprint(collate):
        loader = DataLoader(TensorDataset(INPUTS, LABELS), 16, collate_fn=collate)
        return prepare(network(), loader, settings=SETTINGS).fingerprints["train"]

    collate = counting(1)
    assert fingerprint(collate) == fingerprint(collate) == fingerprint(counting(1)) != fingerprint(counting(2))
