"""The self-check before folding: it accepts models that fold correctly, and gives the reason why others don't."""

from __future__ import annotations

import re

import networks
import pytest
import torch
from torch import Tensor, nn

from swamp_fast import fast_swamp
from swamp_fast.engines.eager.check import why_not_fold
from swamp_fast.engines.eager.fastest import fastest_choice
from swamp_fast.problem.prepare import prepare

SETTINGS = {"engine": "eager", "batch_size": 32, "progress": False}
REASONS = {
    "vit": r"the model \(VisionTransformer\) has parameters of its own: token, positions",
    "vit_dropout": r"the model \(VisionTransformer\) has parameters of its own",
    "sequence_first": r"encoder.layers.0.self_attn \(MultiheadAttention\) has parameters of its own: in_proj_weight",
    "branching": "its forward looks at values \\(_local_scalar_dense\\), so lanes would share one decision",
}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", list(networks.NETWORKS))
def test_networks(name, grouped, digits):
    reason = why_not_fold(prepare(networks.build(name), *digits, settings=SETTINGS), grouped)
    if name in networks.FOLDS:
        assert reason is None
    else:
        assert re.search(REASONS[name], reason)


class Mixed(nn.Module):
    """A model that applies `mix` to its hidden features; it can be folded if `mix` can."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.mix = mix
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self, self.norm(self.first(x.flatten(1)))))


def counted(module: Mixed, x: Tensor) -> Tensor:
    module.steps += 1
    return x


MIXES = {
    "plain": (lambda m, x: x.relu(), None),
    "centred": (
        lambda m, x: x - x.mean(0),
        "of the same lanes alone, as if it mixed samples of a batch",
    ),
    "by the batch's size": (lambda m, x: x / len(x), "differ from those of the same lanes alone"),
    "a little": (lambda m, x: x + 1e-6 * x.sum(), "differ from those of the same lanes alone"),
    "rolled": (lambda m, x: x.roll(1, 0), "differ from those of the same lanes alone"),
    "a NaN that is hidden": (lambda m, x: x + 0 * x.sum(), "NaN in one lane reaches the"),
    "a value that is read": (lambda m, x: x * (2 if x.sum().item() > 0 else 1), "looks at values"),
    "noise": (lambda m, x: x + torch.randn_like(x), "it draws random numbers besides dropout"),
    "a buffer": (counted, "its forward changes buffers or weights: steps"),
    "a fixed batch": (
        lambda m, x: x.view(min(8, len(x)), 16) if m.training else x,
        "when folded, it raises RuntimeError",
    ),
}


@pytest.mark.parametrize("what", list(MIXES))
def test_mixing_is_seen(what, digits):
    mix, expected = MIXES[what]
    reason = why_not_fold(prepare(Mixed(mix), *digits, settings=SETTINGS | {"batch_size": 16}), False)
    assert reason is None if expected is None else expected in reason


def test_hooks_and_strange_norms_are_not_folded(digits):
    hooked = networks.build("tied")
    hooked.middle.register_forward_hook(lambda *_: None)
    assert "middle has hooks" in why_not_fold(prepare(hooked, *digits, settings=SETTINGS), False)
    lazy = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.Linear(144, 10)
    )
    assert "1 (InstanceNorm2d) has no stacked form" in why_not_fold(
        prepare(lazy, *digits, settings=SETTINGS | {"cycles": 2}), False
    )


@pytest.mark.parametrize("grouped", [False, True])
def test_norms_with_statistics_fold(grouped, digits):
    """A pretrained model starts from statistics other than 0 and 1."""
    model = networks.build("residual")
    model(torch.rand(8, 1, 8, 8))
    assert why_not_fold(prepare(model, *digits, settings=SETTINGS), grouped) is None


def test_frozen_parameters_fold(digits):
    model = networks.build("residual")
    model.stem.weight.requires_grad_(False)
    assert why_not_fold(prepare(model, *digits, settings=SETTINGS), False) is None


def test_the_choice_is_measured_and_says_why(digits):
    problem = prepare(networks.build("residual"), *digits, settings=SETTINGS)
    choice = fastest_choice(problem, 4)
    assert choice.why == "the fastest measured"
    assert {name.split(",")[0] for name in choice.milliseconds} == {"lanes", "fold", "fold_grouped"}
    assert all(value > 0 for value in choice.milliseconds.values())
    choice = fastest_choice(prepare(networks.build("branching"), *digits, settings=SETTINGS), 4)
    assert choice.mode == "lanes"
    assert choice.why.startswith("it can't be folded, its forward looks at values")
    assert fastest_choice(problem, 1).why == "there is one particle"


def test_a_model_that_mixes_runs_lane_by_lane_and_says_so(digits):
    settings = SETTINGS | {"cycles": 1, "epochs": 1, "ticket_epochs": 0, "particles": 2}
    model = Mixed(lambda m, x: x - x.mean(0))
    result = fast_swamp(model, *digits, **settings | {"engine": "fastest"})
    assert result.engine["way"] == "lanes"
    assert "mixed samples" in result.engine["why"]
    with pytest.raises(ValueError, match=r'engine="eager:fold" can\'t run the model: .*mixed samples'):
        fast_swamp(model, *digits, **settings | {"engine": "eager:fold"})
