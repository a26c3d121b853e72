"""Mistakes that training would hide are refused, or named, before anything is trained."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.problem.prepare import prepare

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


WRONG_CALLABLES = {
    "transform of three": (
        {"transform": lambda inputs, targets, more: inputs},
        r"`transform` must take one argument, inputs, or two arguments, inputs and targets; got",
    ),
    "transform of none": ({"transform": lambda: 1}, r"`transform` must take one argument, .* got a lambda\(\)"),
    "transform as a class": ({"transform": nn.Identity}, "`transform` must be an instance, got the class Identity"),
    "transform that fails": (
        {"transform": lambda inputs: inputs.what},
        r"`transform\(inputs\)` raises AttributeError for inputs \[8, 6\] and targets \[8\]: 'Tens",
    ),
    "forward of one": (
        {"forward": lambda model: model},
        "`forward` must take two arguments, the module and inputs; got",
    ),
    "loss of one": ({"loss": lambda outputs: outputs}, r"`loss` must take two arguments, .* got a lambda\(outputs\)"),
    "prunable of one": ({"prunable": lambda name: True}, "`prunable` must take two arguments, a parameter's name and"),
    "prunable as a number": ({"prunable": 1}, "`prunable` must be None, the name .* got int"),
    "prunable as False": ({"prunable": False}, "`prunable` must be None, the name .* got bool"),
    "prunable as an object": ({"prunable": object()}, "`prunable` must be None, the name .* got object"),
    "prunable as bytes": ({"prunable": b"0.weight"}, "`prunable` must be None, the name .* got bytes"),
    "prunable as a dict": ({"prunable": {"0.weight": False}}, "`prunable` must be None, the name .* got dict"),
    "prunable as a parameter": ({"prunable": network()[0].weight}, "`prunable` must be None, .* got Parameter"),
    "prunable as a layer": ({"prunable": network()[0]}, "`prunable` must be None, the name .* got Linear"),
    "prunable as layers": ({"prunable": [network()[0]]}, "`prunable` must be None, the name .* got list with Linear"),
    "a tensor as an answer": ({"prunable": lambda name, p: p > 0}, r"`prunable` must return .* Tensor \[20, 6\] for 0"),
    "a text as an answer": ({"prunable": lambda name, p: "no"}, "`prunable` must return True .* got 'no' for 0.weight"),
}


@BOTH
@pytest.mark.parametrize(("given", "text"), WRONG_CALLABLES.values(), ids=WRONG_CALLABLES)
def test_callables_of_another_form_are_refused_in_words(given, text, function):
    with pytest.raises((TypeError, ValueError), match=f"^{text}"):
        run(function=function, **given)


@pytest.mark.parametrize(
    "prunable",
    [
        lambda name, parameter: parameter.dim() > 1 or None,
        lambda name, parameter: torch.tensor(parameter.dim() > 1),
        lambda name, parameter: np.bool_(parameter.dim() > 1),
        lambda name, parameter: re.search(r"[03].weight", name),
        (name for name in ("0.weight", "3.weight")),
        {"0.weight", "3.weight"},
    ],
)
def test_answers_and_names_that_are_clear_are_taken(prunable):
    assert sorted(run(prunable=prunable).masks) == ["0.weight", "3.weight"]


class Words(nn.Module):
    """Embeds tokens [B, 3]; `shift` is added to them."""

    def __init__(self, shift: int = 0, bag: bool = False) -> None:
        super().__init__()
        self.shift = shift
        self.words = (nn.EmbeddingBag if bag else nn.Embedding)(10, 8)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens):
        embedded = self.words(tokens + self.shift if self.shift else tokens)
        return self.head(torch.tanh(self.hidden(embedded.flatten(1)[:, :8])))


TOKENS = torch.randint(0, 10, (64, 3), generator=torch.Generator().manual_seed(0))


def with_token(token: int, place: int) -> torch.Tensor:
    tokens = TOKENS.clone()
    tokens[place, 1] = token
    return tokens


@BOTH
@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize(("place", "token", "got"), [(3, 10, "0 … 10"), (60, 12, "0 … 12"), (60, -1, "-1 … 9")])
def test_tokens_without_a_row_are_named_wherever_they_are(place, token, got, bag, function):
    text = rf"`{{}}`: what the model's embedding words looks up must lie in \[0, 10\), .*; got {got}\. Give"
    with pytest.raises(ValueError, match="^" + text.format("train")):
        run(Words(bag=bag), function, with_token(token, place))
    test = (with_token(token, place), LABELS)
    with pytest.raises(ValueError, match="^in evaluation on `test`, " + text.format("test")):
        function(Words(bag=bag), (TOKENS, LABELS), test, **SETTINGS)


def test_tokens_that_the_model_changes_are_looked_at_as_they_are():
    run(Words(shift=-5), inputs=TOKENS + 5)
    with pytest.raises(ValueError, match=r"^`train`: what the model's embedding words .*; got . … 1\d\. Give"):
        run(Words(shift=5), inputs=TOKENS)


def test_looking_at_tokens_is_no_read_of_the_models():
    assert prepare(Words(), (TOKENS, LABELS), settings=SETTINGS).probe.reads_values is None


def test_a_model_with_a_layer_of_no_features():
    with pytest.raises(ValueError, match="`model`: 0.weight is empty"):
        fast_swamp(nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3)), (torch.randn(8, 6), torch.zeros(8).long()))


@pytest.mark.parametrize("name", ["on_epoch", "on_cycle"])
def test_callbacks_that_would_never_run(name):
    async def waits(row):
        pass

    def yields(row):
        yield row

    for callback in (waits, yields):
        with pytest.raises(TypeError, match=f"`{name}` must be a plain function"):
            run(**{name: callback})


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({"schedule": lambda step: 1.0}, "`recipe.schedule` must take two arguments, the step and the number of steps"),
        ({"optimizer": lambda: None}, "`recipe.optimizer` must take one argument, the named parameters"),
        ({"schedule": lambda step, steps: 1 / 0}, r"`recipe`: schedule\(0, \d+\) raises ZeroDivisionError"),
        ({"schedule": lambda step, steps: 10**400}, r"`recipe`: schedule\(0, \d+\) must be a finite number"),
        ({"score": lambda weights: 1 / 0}, "`recipe`: score raises ZeroDivisionError"),
        ({"score": lambda weights: weights.mean(0) * 1j}, "`recipe`: score must return real numbers"),
        ({"sample_weights": torch.ones(8) * 1j}, "`recipe`: sample_weights must be numbers"),
    ],
)
def test_recipes_that_cannot_work(recipe, text):
    from swamp_fast import Recipe

    with pytest.raises((TypeError, ValueError), match=text):
        run(recipe=Recipe(**recipe))


def test_code_in_the_place_of_a_setting():
    with pytest.raises(TypeError, match=r"`schedule` is a name; code goes into recipe=Recipe\(schedule=...\)"):
        run(schedule=lambda step, steps: 1.0)
