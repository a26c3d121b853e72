"""The splits of a call: how the console describes them."""

from __future__ import annotations

import networks
import numpy as np
import pytest
import torch

from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

SETTINGS = {"epochs": 1, "cycles": 0, "batch_size": 32, "device": "cpu"}


def splits_of(*data, **arguments):
    lines = prepare(networks.build("tied"), *data, arguments=Arguments(**arguments), settings=SETTINGS).lines
    return [line.partition(" samples")[0] for line in lines if line.split()[0] in ("train", "val", "test")]


def test_lines_say_which_split_they_describe(digits, tmp_path):
    images, labels = digits[0]
    assert splits_of(digits[0]) == ["train    160"]
    assert splits_of(*digits, val=0.25) == ["train    120", "val      held out of train: 40", "test     64"]
    assert splits_of(torch.utils.data.TensorDataset(images, labels), val=digits[1]) == [
        "train    TensorDataset: 160",
        "val      64",
    ]
    pictures = images.permute(0, 2, 3, 1).numpy()
    arrays = {"train_images": pictures, "train_labels": labels.numpy(), "test_images": pictures, "test_labels": labels}
    np.savez(tmp_path / "x.npz", **arrays)
    assert splits_of(tmp_path / "x.npz", val=0.25) == [
        "train    x.npz train: 120",
        "val      held out of x.npz train: 40",
        "test     x.npz test: 160",
    ]


@pytest.mark.parametrize("path", ["", "a\0b", "a\udc80"])
@pytest.mark.parametrize("name", ["run_dir", "data_dir"])
def test_paths_that_name_no_folder(name, path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        prepare(networks.build("tied"), "digits", settings={name: path})
