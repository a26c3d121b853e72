"""Mistakes that training would hide are refused, or named, before anything is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from swamp_fast import fast_swamp, naive_swamp

INPUTS, LABELS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4
SETTINGS = {"cycles": 1, "epochs": 2, "ticket_epochs": 0, "particles": 2, "batch_size": 16, "progress": False}
BOTH = pytest.mark.parametrize("function", [fast_swamp, naive_swamp])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 4))


def each(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


def run(model=None, function=fast_swamp, inputs=INPUTS, targets=LABELS, **settings):
    return function(model or network(), (inputs, targets), **SETTINGS | settings)


@BOTH
def test_a_penalty_on_the_users_own_model_is_reported(function):
    model = network()

    def loss(outputs, labels):
        return each(outputs, labels) + sum(parameter.abs().sum() for parameter in model.parameters())

    with pytest.warns(UserWarning, match=r"gradients for 0.weight, .* of your own model, which no training changes"):
        run(model, function, loss=loss)


@BOTH
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(register, function):
    model = network()
    getattr(model[0].weight, register)(lambda value: None)
    with pytest.raises(ValueError, match=r"0.weight has a hook on its gradient, which the particles' copies would"):
        run(model, function)


def test_layers_in_evaluation_mode_that_train_would_change_are_named():
    model = network()
    model[1].eval()
    with pytest.warns(UserWarning, match=r"^1 of the model are in evaluation mode, but model.train\(\)"):
        run(model)


def test_a_model_in_evaluation_mode_is_not_named(recwarn):
    run(network().eval())
    assert not [warning for warning in recwarn if "evaluation mode" in str(warning.message)]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"transform": lambda inputs: inputs * torch.nan}, "`transform` returns NaN or infinite values"),
        (
            {"loss": lambda outputs, labels: each(outputs, labels) * torch.inf},
            "the loss returns NaN or infinite",
        ),
        ({"forward": lambda model, inputs: model(inputs) / 0}, "the model's outputs are NaN or infinite values"),
    ],
)
def test_what_is_not_finite_before_training_is_named(change, text):
    with pytest.raises(ValueError, match=text):
        run(**change)


def test_weights_and_targets_that_are_not_finite_are_named():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0.weight has NaN or infinite values"):
        run(model)
    targets = INPUTS[:, :4].clone()
    targets[50, 1] = torch.nan
    with pytest.raises(ValueError, match="targets must be finite, got 1 NaN"):
        run(targets=targets, loss=lambda outputs, targets: (outputs - targets).square().mean(1))


@BOTH
@pytest.mark.parametrize("limit", [0.5, 5.0, 100.0])
def test_a_clamped_loss_ignores_no_label(limit, function):
    result = run(None, function, loss=lambda outputs, labels: each(outputs, labels).clamp(max=limit), val=0.25)
    assert result.history[0]["val_accuracy"] is not None


def test_callbacks_of_the_wrong_kind_are_refused_at_once():
    with pytest.raises(TypeError, match="`on_cycle` must take one argument"):
        run(on_cycle=lambda: 0)
    with pytest.raises(TypeError, match="`loss` must be an instance, got the class CrossEntropyLoss"):
        run(loss=nn.CrossEntropyLoss)
