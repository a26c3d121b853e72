"""Which shapes of outputs, targets and losses are taken, and what is said about the others."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

SETTINGS = {"batch_size": 8, "cycles": 1, "epochs": 2, "ticket_epochs": 0, "particles": 2, "progress": False}
INPUTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1))


def network(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, outputs))


class Tokens(nn.Module):
    """Logits [B, T, V] of tokens [B, T]."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(tokens, 8), nn.Linear(8, 8), nn.Linear(8, tokens)

    def forward(self, x):
        return self.head(F.relu(self.layer(self.embedding(x))))


def squared(outputs, targets):
    return (outputs - targets) ** 2


@pytest.mark.parametrize("driver", [fast_swamp, naive_swamp])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_refuses_a_loss_that_broadcasts(driver, batch_size):
    data = (INPUTS, LABELS.float())
    with pytest.raises(ValueError, match=r"from outputs \[.*, 1\] and targets \[.\]\. Each output was compared"):
        driver(network(1), data, loss=squared, **SETTINGS | {"batch_size": batch_size})


def of_pairs(outputs, targets):
    """A loss that compares the samples of a batch on purpose."""
    return torch.cdist(outputs.squeeze(-1)[:, None], outputs.squeeze(-1)[:, None]).mean(1)


def normalised(outputs, targets):
    return squared(outputs.squeeze(1), targets) / targets.abs().sum()


MIXED = {
    "outputs [B, 1], targets [B]": lambda o, t: squared(o, t).mean(1),
    "the other axis": lambda o, t: squared(o, t).mean(0),
    "a module": type(
        "Mean", (nn.Module,), {"forward": lambda self, o, t: F.l1_loss(o, t[None], reduction="none").mean(1)}
    )(),
    "of pairs": of_pairs,
    "normalised over the batch": normalised,
    "with noise": lambda o, t: squared(o, t).mean(1) + torch.rand(len(t)),
}
NOT_MIXED = {
    "the same shape": lambda o, t: squared(o, t[:, None]).mean(1),
    "with noise": lambda o, t: squared(o.squeeze(1), t) * torch.rand(len(t)),
    "with dropout": lambda o, t: squared(F.dropout(o), t[:, None]).mean(1),
    "one per target": lambda o, t: squared(o.squeeze(1), t),
    "small": lambda o, t: 1e-12 * squared(o.squeeze(1), t),
}


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("loss", MIXED.values(), ids=MIXED)
def test_warns_of_a_loss_that_mixes_samples(loss, batch_size):
    settings = SETTINGS | {"batch_size": batch_size}
    with pytest.warns(UserWarning, match=r"^`loss`: the loss of a sample changes .*outputs \[., 1\], targets \[.\]"):
        prepare(network(1), (INPUTS, LABELS.float() + INPUTS[:, 0]), None, Arguments(loss=loss), settings=settings)


def test_sees_broadcasting_where_the_first_targets_are_the_same():
    data, loss = (INPUTS, (torch.arange(64) > 31).float()), MIXED["outputs [B, 1], targets [B]"]
    with pytest.warns(UserWarning, match=r"^`loss`: the loss of a sample changes"):
        prepare(network(1), data, None, Arguments(loss=loss), settings=SETTINGS)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("loss", NOT_MIXED.values(), ids=NOT_MIXED)
def test_does_not_warn_of_other_losses(loss, precision, recwarn):
    data, settings = (INPUTS, LABELS.float()), SETTINGS | {"precision": precision}
    prepare(network(1), data, None, Arguments(loss=loss), settings=settings)
    assert not [warning for warning in recwarn if "of its batch" in str(warning.message)]


def test_a_loss_that_counts_its_calls_is_not_called_more_often():
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return squared(outputs.squeeze(1), targets) * len(calls)

    prepare(network(1), (INPUTS, LABELS.float()), None, Arguments(loss=loss), settings=SETTINGS)
    assert len(calls) == 4  # of which two find out whether its losses repeat


def test_finds_broadcasting_where_the_targets_are_as_long_as_the_batch():
    """[8, 8] is the targets' shape, but only by chance: with six samples it is [6, 6], and the targets are [6, 8]."""
    data = (INPUTS, torch.randn(64, 8))
    with pytest.raises(ValueError, match=r"got \[6, 6\] from outputs \[6, 8\] and targets \[6, 8\]"):
        prepare(network(8), data, None, Arguments(loss=lambda o, t: squared(o[:, :1], t[:, 0])), settings=SETTINGS)
    with pytest.raises(ValueError, match=r"\[B\] = \[6\], or one per target, .*got \[8\]"):
        prepare(network(8), data, None, Arguments(loss=lambda o, t: squared(o, t).mean(0)), settings=SETTINGS)
    prepare(network(8), data, None, Arguments(loss=squared), settings=SETTINGS)
    prepare(network(8), (INPUTS, LABELS), settings=SETTINGS)


def test_refuses_other_losses():
    for loss, text in (
        (F.mse_loss, r'got \[\] .*Use reduction="none"'),
        (lambda o, t: squared(o, t).mean(0), r"got \[3\] from outputs \[8, 3\]"),
        (lambda o, t: o[:, :2], r"got \[8, 2\] .*average over other axes, as with .flatten\(1\).mean\(1\)"),
        (lambda o, t: 3.0, "got float"),
    ):
        with pytest.raises(ValueError, match=text):
            prepare(network(3), (INPUTS, torch.randn(64, 3)), None, Arguments(loss=loss), settings=SETTINGS)


def test_logits_with_the_classes_last():
    many, few = (torch.randint(0, tokens, (64, 6)) for tokens in (50, 6))
    with pytest.raises(
        ValueError, match=r"outputs \[8, 6, 50\] .*forward=lambda model, inputs: model\(inputs\).movedim"
    ):
        prepare(Tokens(50), (many, many), settings=SETTINGS)
    with pytest.raises(ValueError, match=r"\[8, 6, 6\] can be \[B, classes, ...\] or \[B, ..., classes\]"):
        prepare(Tokens(6), (few, few), settings=SETTINGS)
    last = Arguments(forward=lambda model, inputs: model(inputs).movedim(-1, 1))
    assert prepare(Tokens(50), (many, many), None, last, settings=SETTINGS).train.labels.classes == 50


def test_the_accuracy_of_equally_long_axes_follows_the_loss():
    """It is never counted over the axis of the positions."""
    few = torch.randint(0, 6, (64, 6))

    def last(outputs, targets):
        return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")

    def labels(loss):
        return prepare(Tokens(6), (few, few), None, Arguments(loss=loss), settings=SETTINGS).train.labels

    assert "aren't known to be [B, classes, ...]; return that from `forward`" in labels(last)
    assert "one loss per label from `loss`" in labels(lambda o, t: last(o, t).mean(1))
    assert labels(lambda o, t: F.cross_entropy(o, t, reduction="none")).classes == 6
    for loss in (nn.CrossEntropyLoss(reduction="none"), functools.partial(F.cross_entropy, reduction="none")):
        with pytest.raises(ValueError, match="because the axes are equally long"):
            labels(loss)


def test_the_advice_for_equally_long_axes_is_right():
    """Plain PyTorch is the judge: the loss over the tokens of the trained model."""
    few = torch.randint(0, 6, (64, 6), generator=torch.Generator().manual_seed(0))
    result = fast_swamp(
        *(Tokens(6), (few, few), (few, few)),
        forward=lambda model, inputs: model(inputs).movedim(-1, 1),
        loss=lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"),
        **SETTINGS | {"lr": 0.2, "swa_lr": 0.1, "epochs": 10},
    )
    with torch.no_grad():
        logits = result.model(few)
    assert result.history[-1]["accuracy"] == float((logits.argmax(-1) == few).double().mean())
    assert result.history[-1]["loss"] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), few.flatten())))


def test_labels_in_other_forms():
    one_hot = F.one_hot(LABELS, 4)
    for targets, text in (
        (LABELS[:, None], r"labels \[8, 1\] don't fit .* they are a column. Pass targets.squeeze\(1\)"),
        (one_hot, r"If they are one-hot, pass targets.argmax\(1\)"),
        (torch.stack([LABELS, LABELS], 1), r"labels \[8, 2\] .* which takes labels \[8\]"),
        (one_hot * 0.5, "probabilities of the classes, but .* their sums are 0.5"),
        (torch.randn(64, 4).softmax(1) - torch.tensor([1.0, -1.0, 0.0, 0.0]), "not all at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            prepare(network(), (INPUTS, targets), settings=SETTINGS)


def test_probabilities_as_targets():
    """One-hot targets train the same model as labels, and hard test labels give an accuracy."""
    settings = SETTINGS | {"precision": "float64"}
    torch.manual_seed(0)
    model = network()
    soft = (INPUTS, F.one_hot(LABELS, 4).float())
    results = [fast_swamp(model, train, (INPUTS, LABELS), **settings) for train in (soft, (INPUTS, LABELS))]
    assert results[0].history[-1]["accuracy"] == results[1].history[-1]["accuracy"] is not None
    for a, b in zip(results[0].model.state_dict().values(), results[1].model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
    for driver in (fast_swamp, naive_swamp):
        row = driver(model, soft, (INPUTS, LABELS), val=0.25, **settings).history[-1]
        assert row["val_accuracy"] is None
        assert row["best_accuracy"] is None
        assert row["accuracy"] is not None


def normed(pixels: bool) -> nn.Module:
    torch.manual_seed(0)
    if pixels:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))


@pytest.mark.parametrize(("samples", "batch_size", "better"), [(7, 3, 4), (7, 2, 4), (33, 32, 31), (33, 1, 3)])
def test_a_batch_of_one_value_per_channel(samples, batch_size, better):
    data, settings = (INPUTS[:samples], LABELS[:samples]), SETTINGS | {"batch_size": batch_size}
    text = rf"one sample \({samples} samples, batch_size = {batch_size}\), .* value per channel .* such as {better}\."
    with pytest.raises(ValueError, match=text):
        prepare(normed(False), data, settings=settings)
    prepare(normed(False), data, settings=settings | {"batch_size": better})


def test_a_batch_of_one_when_statistics_are_re_estimated():
    """drop_last leaves it out of the epochs, but not of the pass that re-estimates the norms."""
    loader = DataLoader(TensorDataset(INPUTS[:33], LABELS[:33]), batch_size=16, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match=r"re-estimates norms, would hold one sample .* such as 15\."):
        prepare(normed(False), loader, settings={"epochs": 1, "cycles": 0, "device": "cpu"})


def test_a_batch_of_one_picture():
    """It has several values per channel, so BatchNorm can be trained on it."""
    data, settings = (INPUTS[:33].view(-1, 1, 4, 4), LABELS[:33]), SETTINGS | {"batch_size": 32, "precision": "float64"}
    fast, fused, naive = (
        driver(normed(True), data, data, engine=engine, **settings)
        for driver, engine in ((fast_swamp, "eager"), (fast_swamp, "fused"), (naive_swamp, "eager"))
    )
    for result in (fast, fused):
        assert result.history[-1]["loss"] == pytest.approx(naive.history[-1]["loss"], rel=1e-9)
        assert all(torch.equal(mask, naive.masks[name]) for name, mask in result.masks.items())


def test_one_sample_and_one_class():
    with pytest.raises(ValueError, match=r"Pass more samples\."):
        prepare(normed(False), (INPUTS[:1], LABELS[:1]), settings=SETTINGS | {"batch_size": 1})
