"""Which splits have accuracies, which labels count in them, and the reasons where there are none."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.data.labels import Labels
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare
from swamp_fast.report import write_report

SETTINGS = {"batch_size": 16, "cycles": 1, "epochs": 2, "ticket_epochs": 0, "particles": 2, "progress": False}
INPUTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1))
DRIVERS = [fast_swamp, naive_swamp]


def network(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, outputs))


def ignoring(label: int):
    return lambda outputs, targets: F.cross_entropy(outputs, targets, ignore_index=label, reduction="none")


LOSSES = {
    "a module": (nn.CrossEntropyLoss(reduction="none"), -100),
    "a module that ignores a class": (nn.CrossEntropyLoss(ignore_index=0, reduction="none"), 0),
    "a partial": (functools.partial(F.cross_entropy, ignore_index=255, reduction="none"), 255),
    "a partial with the default": (functools.partial(F.cross_entropy, reduction="none"), -100),
    "a function": (ignoring(-1), -1),
    "a function that ignores a class": (ignoring(2), 2),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_labels_do_not_count(driver, first, name):
    """Whatever the first samples are. Plain PyTorch counts on the final model."""
    loss, ignored = LOSSES[name]
    targets = LABELS.clone()
    targets[first::2] = ignored
    torch.manual_seed(0)
    result = driver(
        network(), (INPUTS, targets), (INPUTS, targets), val=(INPUTS[1:], targets[1:]), loss=loss, **SETTINGS
    )
    with torch.no_grad():
        right = result.model(INPUTS).argmax(1) == targets
    row, counted = result.history[-1], targets != ignored
    assert row["accuracy"] == float(right[counted].double().mean())
    assert row["val_accuracy"] == float(right[1:][counted[1:]].double().mean())


def test_other_losses_ignore_no_label():
    """A margin loss is 0 for a label with a high logit; class weights of 0 do leave a class out."""
    losses = {
        (): [
            lambda o, t: F.multi_margin_loss(o, t, reduction="none"),
            lambda o, t: (o.softmax(1) - F.one_hot(t, 4)).square().sum(1),
            lambda o, t: F.cross_entropy(o, t, reduction="none", label_smoothing=0.1),
        ],
        (3,): [lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 1.0, 1.0, 0.0]), reduction="none")],
    }
    for ignored, functions in losses.items():
        for loss in functions:
            problem = prepare(network(), (INPUTS, LABELS), None, Arguments(loss=loss), settings=SETTINGS)
            assert problem.train.labels == Labels(4, ignored)


class Tail(nn.Module):
    """Auxiliary outputs in training, plain ones in evaluation."""

    def __init__(self, form) -> None:
        super().__init__()
        self.body, self.head, self.other, self.form = nn.Linear(16, 12), nn.Linear(12, 4), nn.Linear(12, 4), form

    def forward(self, x):
        h = F.relu(self.body(x))
        return self.form(self.head(h), self.other(h)) if self.training else self.head(h)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("form", [lambda a, b: (a, b), lambda a, b: {"out": a, "aux": b}])
def test_auxiliary_outputs_in_training(driver, form):
    def loss(outputs, targets):
        heads = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
        return sum(F.cross_entropy(head, targets, reduction="none") for head in heads)

    result = driver(Tail(form), (INPUTS, LABELS), (INPUTS, LABELS), val=0.25, loss=loss, **SETTINGS)
    with torch.no_grad():
        right = result.model.eval()(INPUTS).argmax(1) == LABELS
    assert result.history[-1]["accuracy"] == float(right.double().mean())
    assert result.history[-1]["val_accuracy"] is not None


class Streamed(Dataset):
    """Its samples are random, and an odd one after the first ten has the label `ignored`."""

    def __init__(self, ignored: int) -> None:
        self.targets = torch.where((torch.arange(64) % 2 == 1) & (torch.arange(64) > 10), ignored, LABELS % 3)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return INPUTS[index] + 1e-6 * torch.randn(16), int(self.targets[index])


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("ignored", [-100, 255, 3])
def test_streamed_labels_that_are_ignored(driver, ignored):
    data = Streamed(ignored)
    result = driver(network(), data, data, loss=ignoring(ignored), **SETTINGS)
    with torch.no_grad():
        right = (result.model(INPUTS).argmax(1) == data.targets)[data.targets != ignored]
    assert result.history[-1]["accuracy"] == float(right.double().mean())


REASONS = [
    (
        squared := lambda o, t: (o - t).square(),
        torch.randn(64, 4),
        r"the targets are \[8, 4\] float32, not integer labels",
    ),
    (lambda o, t: (o[:, 0] - t).square(), LABELS * 9, "the targets are integers from 0 to 27, not labels in [0, 4)"),
    (lambda o, t: F.cross_entropy(o, t, reduction="none"), LABELS * 0 - 100, "the loss ignores all labels"),
]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("loss", "targets", "reason"), REASONS, ids=["numbers", "counts", "ignored"])
def test_the_console_and_the_page_say_why_there_is_no_accuracy(driver, loss, targets, reason, capsys, tmp_path):
    data = (INPUTS, targets)
    result = driver(network(), data, data, loss=loss, run_dir=tmp_path / "run", **SETTINGS | {"progress": True})
    assert result.history[-1]["accuracy"] is None
    line = f"accuracy none on test: {reason}".replace("\\", "")
    text = capsys.readouterr().err
    assert line.split("none on test: ")[1] in text
    assert f"Accuracy {line.removeprefix('accuracy ')}." in write_report(tmp_path / "run").read_text()
    assert any(
        line.split("none on test: ")[1] in kept for kept in json.loads((tmp_path / "run/run.json").read_text())["lines"]
    )


def test_a_model_that_cannot_be_evaluated_is_refused_before_training():
    steps = []

    def loss(outputs, targets):
        return F.cross_entropy(outputs[0], targets, reduction="none")

    model = Tail(lambda a, b: (a, b))
    with pytest.raises(ValueError, match="in evaluation on `test`, "):
        fast_swamp(model, (INPUTS, LABELS), (INPUTS, LABELS), loss=loss, on_cycle=steps.append, **SETTINGS)
    assert not steps
    fast_swamp(model, (INPUTS, LABELS), loss=loss, **SETTINGS)
