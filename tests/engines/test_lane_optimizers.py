"""A recipe's own optimizers, schedules and scores: every particle is trained as in a plain loop."""

from __future__ import annotations

import math
import shutil

import networks
import pytest
import torch
from equality import same
from stops import ALWAYS, Interrupted, before_steps, stop_at
from torch import nn

from benchmarks.durability import same_bits
from swamp_fast import Recipe, fast_swamp, naive_swamp
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

SETTINGS = {
    "particles": 2, "cycles": 2, "epochs": 3, "ticket_epochs": 1, "batch_size": 32, "precision": "float64",
    "swa_start": 0.4, "device": "cpu", "progress": False, "clip_norm": 1.0, "keep_particles": True,
}  # fmt: skip


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (2010.01412) around SGD: a step up along the gradient, then one from there."""

    def __init__(self, params, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = torch.optim.SGD(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "SAM needs a closure"
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / (norm + 1e-12))
        torch.enable_grad()(closure)()
        for p in parameters:
            p.copy_(self.state[p]["old"])
        self.base.step()


def muon_and_adamw(named):
    named = list(named)
    matrices = [p for name, p in named if p.ndim == 2]
    others = [p for name, p in named if p.ndim != 2]
    adamw = torch.optim.AdamW(others, lr=1e-3)
    return [torch.optim.Muon(matrices, lr=2e-3), adamw] if matrices else adamw


OPTIMIZERS = {
    "rmsprop": lambda named: torch.optim.RMSprop([p for _, p in named], lr=1e-3, momentum=0.5),
    "nadam": lambda named: torch.optim.NAdam([p for _, p in named], lr=1e-3),
    "adafactor": lambda named: torch.optim.Adafactor([p for _, p in named], lr=1e-2),
    "muon": muon_and_adamw,
    "groups": lambda named: torch.optim.SGD(
        [{"params": [p], "lr": 0.05 if p.ndim > 1 else 0.1} for _, p in named], momentum=0.9
    ),
    "sam": lambda named: SAM([p for _, p in named], lr=0.05, momentum=0.9),
}
OTHER = nn.Linear(2, 2)
ENGINES = ["eager:lanes", "eager:fold", "fused"]


def runs_on(optimizer, engine):
    return optimizer != "sam" or engine == "eager:lanes"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_particles_are_trained_as_in_a_plain_loop(optimizer, engine, digits):
    recipe, model = Recipe(optimizer=OPTIMIZERS[optimizer]), networks.build("residual")
    if not runs_on(optimizer, engine):
        with pytest.raises(ValueError, match="computes gradients several times per step"):
            fast_swamp(model, *digits, recipe=recipe, engine=engine, **SETTINGS)
        engine = "auto"
    found = fast_swamp(model, *digits, recipe=recipe, engine=engine, **SETTINGS)
    same(found, naive_swamp(model, *digits, recipe=recipe, **SETTINGS), 1e-7)
    last = found.state_dict
    assert all(not last[name][~mask].any() for name, mask in found.masks.items())


@pytest.mark.parametrize(
    ("optimizer", "engine"),
    [(name, engine) for name in OPTIMIZERS for engine in ("eager:lanes", "fused") if runs_on(name, engine)],
)
def test_it_resumes_with_equal_bits(optimizer, engine, digits, tmp_path):
    settings = SETTINGS | {"engine": engine, "precision": "float32", "checkpoint_minutes": ALWAYS}
    recipe = Recipe(optimizer=OPTIMIZERS[optimizer])
    fast_swamp(networks.build("dropout"), *digits, recipe=recipe, **settings, run_dir=tmp_path / "whole")
    for moment in (2, 12, 31):
        with before_steps(stop_at(moment)), pytest.raises(Interrupted):
            fast_swamp(networks.build("dropout"), *digits, recipe=recipe, **settings, run_dir=tmp_path / "cut")
        with before_steps() as count:
            fast_swamp(networks.build("dropout"), *digits, recipe=recipe, **settings, run_dir=tmp_path / "cut")
        assert count[0] == 50 - moment
        assert same_bits(tmp_path / "whole", tmp_path / "cut"), moment
        shutil.rmtree(tmp_path / "cut")


def test_one_step_of_sam_by_hand():
    """One particle, one step on one batch of a linear model: the gradient is taken where SAM looks."""
    inputs, targets = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    recipe = Recipe(optimizer=lambda named: SAM([p for _, p in named], lr=0.1, rho=0.5))
    settings = SETTINGS | {"particles": 1, "cycles": 0, "epochs": 1, "ticket_epochs": 0, "batch_size": 8}
    loss = nn.MSELoss(reduction="none")
    found = fast_swamp(
        model, (inputs, targets), loss=loss, recipe=recipe, **settings | {"average": "none", "clip_norm": None}
    )
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def gradients(at):
        return torch.autograd.grad(loss(inputs @ at[0].T @ at[1].T, targets).mean(), at)

    first = gradients(weights)
    norm = torch.stack([g.norm() for g in first]).norm()
    away = [(w + 0.5 * g / norm).detach().requires_grad_() for w, g in zip(weights, first, strict=True)]
    for name, w, g in zip(("0.weight", "1.weight"), weights, gradients(away), strict=True):
        torch.testing.assert_close(found.state_dict[name], (w - 0.1 * g).detach(), rtol=0, atol=1e-12)


def test_a_schedule_and_a_score_of_ones_own(digits):
    recipe = Recipe(
        schedule=lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps)),
        score=lambda weights: weights.abs().amax(0),
    )
    model = networks.build("residual")
    for engine in ENGINES:
        found = fast_swamp(model, *digits, recipe=recipe, engine=engine, **SETTINGS)
        same(found, naive_swamp(model, *digits, recipe=recipe, **SETTINGS), 1e-7)
    plain = fast_swamp(model, *digits, average="none", **SETTINGS)
    own = fast_swamp(model, *digits, recipe=Recipe(schedule=recipe.schedule), average="none", **SETTINGS)
    cycle_0 = [result.at(0)[0].state_dict() for result in (plain, own)]
    assert found.ticket.keys() == plain.ticket.keys()
    assert not all(torch.equal(a, b) for a, b in zip(*(each.values() for each in cycle_0), strict=True))


def test_the_score_ranks_the_weights(digits):
    """A score by index keeps the last weights of the vector of prunable weights."""
    recipe = Recipe(score=lambda weights: torch.arange(weights.shape[1], dtype=weights.dtype))
    found = fast_swamp(networks.build("tied"), *digits, recipe=recipe, **SETTINGS | {"cycles": 1})
    mask = torch.cat([each.flatten() for each in found.masks.values()])
    assert torch.equal(mask, torch.arange(len(mask)) >= len(mask) - int(mask.sum()))


@pytest.mark.parametrize(
    ("recipe", "settings", "error", "text"),
    [
        ({"optimizer": lambda named: None}, {}, TypeError, "must return a torch.optim.Optimizer .* got NoneType"),
        ({"optimizer": lambda named: []}, {}, TypeError, "got an empty list"),
        ({"optimizer": lambda named: torch.optim.SGD(OTHER.parameters(), lr=0.1)}, {}, ValueError, "other parameters"),
        ({"optimizer": lambda named: [torch.optim.SGD([p for _, p in list(named)[:2]], lr=0.1)] * 2}, {}, ValueError,
         "two of the optimizers have the same"),
        ({"optimizer": OPTIMIZERS["nadam"]}, {"lr": 0.1}, ValueError, "`lr` = 0.1 has no effect beside a recipe"),
        ({"schedule": lambda step, steps: 1.0}, {"schedule": "cosine"}, ValueError, "`schedule` = 'cosine' has no"),
        ({"schedule": lambda step, steps: math.nan}, {}, ValueError, r"schedule\(0, 15\) must be a finite"),
        ({"schedule": lambda step, steps: 3.0 - step}, {}, ValueError, r"schedule\(4, 15\) must be a finite"),
        ({"schedule": lambda step, steps: None}, {}, ValueError, "got None"),
        ({"score": lambda weights: weights}, {}, TypeError, r"score must return real numbers \[Q\]"),
        ({"score": lambda weights: weights.mean(0)}, {}, ValueError, "at least 0"),
        ({"score": lambda weights: weights.abs()}, {"combine": "best", "val": 0.2}, ValueError, "keeps one of them"),
        ({"score": 3}, {}, TypeError, "score must be callable"),
        ({"optimizer": torch.optim.SGD(OTHER.parameters(), lr=0.1)}, {}, TypeError, "must be a function|callable"),
    ],
)  # fmt: skip
def test_what_is_refused_before_training(recipe, settings, error, text, digits):
    with before_steps() as count, pytest.raises(error, match=text):
        fast_swamp(networks.build("tied"), *digits, recipe=Recipe(**recipe), **SETTINGS | settings)
    assert count[0] == 0


def test_what_optimizers_leave_out_is_named(digits):
    recipe = Recipe(optimizer=lambda named: torch.optim.SGD([p for n, p in named if "bias" not in n], lr=0.1))
    problem = prepare(networks.build("tied"), *digits, arguments=Arguments(recipe=recipe), settings=SETTINGS)
    assert any("optimizers don't train" in line and "bias" in line for line in problem.lines)
    assert problem.own_optimizer.untrained == ("first.bias", "middle.bias", "again.bias", "head.bias")


def test_state_that_checkpoints_cannot_hold(digits, tmp_path):
    recipe = Recipe(optimizer=lambda named: torch.optim.LBFGS([p for _, p in named], lr=0.1, max_iter=2))
    settings = SETTINGS | {"cycles": 0, "epochs": 1, "ticket_epochs": 0, "checkpoint_minutes": ALWAYS}
    found = fast_swamp(networks.build("tied"), *digits, recipe=recipe, run_dir=tmp_path / "run", **settings)
    problem = prepare(networks.build("tied"), *digits, arguments=Arguments(recipe=recipe), settings=settings)
    assert not problem.saves_steps
    same(found, naive_swamp(networks.build("tied"), *digits, recipe=recipe, **settings), 1e-7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "settings",
    [
        {"average": "ema", "ema_decay": 0.8, "average_every": 2, "schedule": "linear", "warmup_epochs": 0.6},
        {"average_every": 3, "schedule": "step", "step_epochs": 1, "step_factor": 0.5, "lr": 0.05},
        {"average": "ema", "swa_start": 0.0, "schedule": "constant", "optimizer": "adamw"},
        {"warmup_epochs": 0.5, "optimizer": "adamw"},
    ],
    ids=["ema", "step", "adamw", "warm-up"],
)
def test_schedules_and_averages(settings, engine, digits):
    settings, model = SETTINGS | settings, networks.build("residual")
    same(fast_swamp(model, *digits, engine=engine, **settings), naive_swamp(model, *digits, **settings), 1e-7)
