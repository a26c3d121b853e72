"""Losses that hold tensors, such as class weights, run in every engine and precision."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swamp_fast import fast_swamp, naive_swamp

SETTINGS = {"batch_size": 16, "cycles": 1, "epochs": 2, "ticket_epochs": 0, "particles": 2, "progress": False}
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])
INPUTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(1))
LOSSES = {
    "module": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="none"),
    "partial": functools.partial(F.cross_entropy, weight=WEIGHTS, reduction="none"),
    "function": lambda outputs, targets: F.cross_entropy(outputs, targets, weight=WEIGHTS, reduction="none"),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_keep_the_fused_engine(name):
    data = ((INPUTS, LABELS), (INPUTS, LABELS))
    fused = fast_swamp(network(), *data, loss=LOSSES[name], engine="fused", **SETTINGS)
    naive = naive_swamp(network(), *data, loss=LOSSES[name], **SETTINGS)
    assert fused.engine["name"] == "fused"
    for row, expected in zip(fused.history, naive.history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    with torch.no_grad():
        loss = F.cross_entropy(fused.model(INPUTS), LABELS, weight=WEIGHTS, reduction="none").mean()
    assert fused.history[-1]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_module_with_weights_runs_in_float64():
    loss = nn.CrossEntropyLoss(weight=WEIGHTS, reduction="none")
    settings = SETTINGS | {"precision": "float64"}
    fused = fast_swamp(network(), (INPUTS, LABELS), (INPUTS, LABELS), loss=loss, engine="fused", **settings)
    naive = naive_swamp(network(), (INPUTS, LABELS), (INPUTS, LABELS), loss=loss, **settings)
    assert fused.history[-1]["loss"] == pytest.approx(naive.history[-1]["loss"], rel=1e-9)
    assert loss.weight.dtype == torch.float32


def test_refuses_a_loss_with_parameters():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return self.scale * F.cross_entropy(outputs, targets, reduction="none")

    loss = Scaled()
    with pytest.raises(ValueError, match=r"parameters of its own \(scale\), .* loss.requires_grad_\(False\)"):
        fast_swamp(network(), (INPUTS, LABELS), loss=loss, **SETTINGS)
    fast_swamp(network(), (INPUTS, LABELS), loss=loss.requires_grad_(False), **SETTINGS)
    assert loss.scale.grad is None
