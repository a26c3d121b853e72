"""Optimizers that draw random numbers, keep state in unusual places, or change what isn't theirs."""

from __future__ import annotations

import importlib
import linecache
import sys

import networks
import pytest
import torch
from equality import same
from stops import ALWAYS, Interrupted, before_steps, stop_at
from torch.optim import SGD

from benchmarks.durability import same_bits
from swamp_fast import Recipe, fast_swamp, naive_swamp
from swamp_fast.common.fingerprint import callable_fingerprint

SETTINGS = {
    "particles": 2, "cycles": 1, "epochs": 2, "ticket_epochs": 1, "batch_size": 32, "precision": "float64",
    "average": "none", "device": "cpu", "progress": False,
}  # fmt: skip


def recipe_of(kind: type[SGD]) -> Recipe:
    return Recipe(optimizer=lambda named: kind([p for _, p in named], lr=0.05, momentum=0.9))


class Noisy(SGD):
    """SGD on gradients with noise, as in Langevin dynamics."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(torch.randn_like(p), alpha=0.1)
        return super().step()


@pytest.mark.parametrize("engine", ["eager:lanes", "fused"])
def test_draws_are_those_of_the_particle_and_the_step(engine, digits):
    found = []
    for seed, particles in ((1, 2), (2, 2), (3, 3)):
        torch.manual_seed(seed)
        settings = SETTINGS | {"engine": engine, "particles": particles, "cycles": 0, "keep_particles": True}
        found.append(fast_swamp(networks.build("residual"), *digits, recipe=recipe_of(Noisy), **settings).particles)
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name][:2]) for other in found[1:]), name
    assert not torch.equal(found[0]["head.weight"][0], found[0]["head.weight"][1])
    arguments = {"recipe": recipe_of(Noisy), **SETTINGS}
    naive = naive_swamp(networks.build("residual"), *digits, **arguments)
    same(fast_swamp(networks.build("residual"), *digits, engine=engine, **arguments), naive, 1e-7)


class Attribute(SGD):
    """SGD with a momentum of its own in a list that is an attribute."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.moments = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        for moment, p in zip(self.moments, self.param_groups[0]["params"], strict=True):
            p.grad = moment.mul_(0.9).add_(p.grad).clone()
        return super().step()


class InGroup(SGD):
    """SGD with a tensor in its group that each step changes."""

    def step(self, closure=None):
        total = self.param_groups[0].setdefault("total", torch.zeros(()))
        total.add_(1)
        self.param_groups[0]["params"][0].grad.mul_(1 / total)
        return super().step()


@pytest.mark.parametrize("kind", [Attribute, InGroup])
def test_state_that_a_checkpoint_lacks_is_named_and_the_run_resumes_by_cycles(kind, digits, tmp_path, capsys):
    settings = SETTINGS | {"checkpoint_minutes": ALWAYS, "engine": "eager:lanes", "progress": True}
    arguments = {"recipe": recipe_of(kind), **settings}
    fast_swamp(networks.build("tied"), *digits, **arguments, run_dir=tmp_path / "whole")
    assert "no checkpoints inside a cycle, because the recipe's optimizer (" in capsys.readouterr().err
    with before_steps(stop_at(17)), pytest.raises(Interrupted):
        fast_swamp(networks.build("tied"), *digits, **arguments, run_dir=tmp_path / "cut")
    assert not (tmp_path / "cut" / "training.safetensors").exists()
    fast_swamp(networks.build("tied"), *digits, **arguments, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


class Late(SGD):
    """SGD whose state gets a list after some steps."""

    def step(self, closure=None):
        self.taken = getattr(self, "taken", 0) + 1
        if self.taken > 4:
            self.state[self.param_groups[0]["params"][0]].setdefault("log", []).append(1)
        return super().step()


def test_state_that_can_no_longer_be_saved_does_not_end_the_run(digits, tmp_path):
    settings = SETTINGS | {"checkpoint_minutes": ALWAYS, "engine": "eager:lanes"}
    with pytest.warns(UserWarning, match="no checkpoint inside a cycle is written: .*log is a list"):
        found = fast_swamp(networks.build("tied"), *digits, recipe=recipe_of(Late), **settings, run_dir=tmp_path)
    assert len(found.history) == 2


class Decaying(SGD):
    """SGD that lowers its own rate."""

    def step(self, closure=None):
        result = super().step()
        self.param_groups[0]["lr"] *= 0.5
        return result


def hooked(named):
    for _, p in named:
        p.register_hook(lambda grad: 2 * grad)
    return SGD([p for _, p in named], lr=0.1)


def frozen(named):
    named[0][1].requires_grad_(False)
    return SGD([p for _, p in named], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (lambda named: Decaying([p for _, p in named], lr=0.1), "changes its learning rate in step"),
        (hooked, "registers a hook on first.weight"),
        (frozen, "freezes first.weight"),
        (lambda named: 1 / 0, "`recipe`: optimizer raises ZeroDivisionError: division by zero"),
        (lambda named: ([SGD([p for _, p in named], lr=0.1)], ["scheduler"]), "got a tuple with list. A schedule goes"),
        (lambda named: SGD([{"params": [p for _, p in named], "lr": "a"}], lr=0.1), "learning rate 'a'"),
    ],
)
def test_what_cannot_work_is_said(optimizer, text, digits):
    with pytest.raises((ValueError, TypeError), match=text):
        fast_swamp(networks.build("tied"), *digits, recipe=Recipe(optimizer=optimizer), **SETTINGS)


def test_a_score_need_not_care_for_pruned_weights(digits):
    """The signal-to-noise ratio is 0 / 0 for weights that are pruned in every particle, and NaN for one particle."""
    recipe = Recipe(score=lambda weights: weights.mean(0).abs() / weights.std(0, correction=0))
    settings = SETTINGS | {"cycles": 2, "particles": [2, 2, 1]}
    for engine in ("eager:lanes", "fused"):
        found = fast_swamp(networks.build("residual"), *digits, recipe=recipe, engine=engine, **settings)
        same(found, naive_swamp(networks.build("residual"), *digits, recipe=recipe, **settings), 1e-7)
    of_one = Recipe(score=lambda weights: weights.std(0))
    with pytest.raises(ValueError, match="negative or NaN"):
        fast_swamp(networks.build("tied"), *digits, recipe=of_one, **SETTINGS | {"particles": [1, 2]})


def test_recipes_that_count_their_calls_resume_in_the_same_process(digits, tmp_path):
    calls = {"optimizer": 0, "schedule": 0}

    def optimizer(named):
        calls["optimizer"] += 1
        return SGD([p for _, p in named], lr=0.05)

    def schedule(step, steps):
        calls["schedule"] += 1
        return 1 - step / steps

    arguments = {"recipe": Recipe(optimizer=optimizer, schedule=schedule), **SETTINGS, "run_dir": tmp_path}
    with before_steps(stop_at(17)), pytest.raises(Interrupted):
        fast_swamp(networks.build("tied"), *digits, **arguments)
    assert len(fast_swamp(networks.build("tied"), *digits, **arguments).history) == 2
    other = Recipe(optimizer=optimizer, schedule=lambda step, steps: 1.0)
    with pytest.raises(ValueError, match="the recipe's optimizer and schedule differ, by source or by values"):
        fast_swamp(networks.build("tied"), *digits, **arguments | {"recipe": other})


def test_the_code_of_an_optimizers_class_counts(tmp_path, monkeypatch):
    """By its own source and that of the user's classes that it derives from; a library's class counts by its name."""
    monkeypatch.syspath_prepend(tmp_path)
    hashes = []
    for number in (1, 1, 2):
        (tmp_path / "mine.py").write_text(
            f"from torch.optim import SGD\nclass Base(SGD):\n    number = {number}\nclass Mine(Base):\n    pass\n"
            "def make(named):\n    return Mine([p for _, p in named], lr=0.1)\n"
        )
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()

        linecache.clearcache()
        hashes.append(callable_fingerprint(importlib.import_module("mine").make))
    assert hashes[0] == hashes[1] != hashes[2]


def test_functions_are_called_only_with_what_a_run_has(digits):
    """A schedule may divide by steps - 1, and a score may have a number of its own for each weight."""
    seen = []

    def schedule(step, steps):
        seen.append(steps)
        return 1 - step / (steps - 1)

    own = torch.rand(3072, dtype=torch.float64)
    recipe = Recipe(schedule=schedule, score=lambda weights: weights.abs().mean(0) * own)
    fast_swamp(networks.build("tied"), *digits, recipe=recipe, **SETTINGS)
    assert set(seen) == {10}
