"""Runs with AdamW and with gradient clipping equal the naive loop, and a lane has the same bits alone."""

from __future__ import annotations

import networks
import pytest
import torch
from equality import same
from pretended import gpu
from skips import HAS_A_GPU, HAS_GPU
from stops import before_steps

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import eager_trainer
from swamp_fast.problem.prepare import prepare

ADAMW = {"optimizer": "adamw", "lr": 3e-3, "swa_lr": 1e-3, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.99}
CLIP = {"clip_norm": 0.3}
OPTIMIZERS = {"sgd": {}, "adamw": ADAMW, "sgd, clipped": CLIP, "adamw, clipped": ADAMW | CLIP}
NEW = ["adamw", "sgd, clipped", "adamw, clipped"]
SETTINGS = {
    "particles": 3,
    "cycles": 2,
    "epochs": 4,
    "ticket_epochs": 2,
    "batch_size": 32,
    "precision": "float64",
    "keep_particles": True,
    "progress": False,
}


@pytest.fixture(scope="module")
def naive(digits):
    """The naive loop's result, computed once for each network and optimizer."""
    results = {}

    def get(name: str, optimizer: str):
        if (name, optimizer) not in results:
            settings = SETTINGS | OPTIMIZERS[optimizer]
            results[name, optimizer] = naive_swamp(networks.build(name), *digits, **settings)
        return results[name, optimizer]

    return get


@pytest.mark.parametrize("optimizer", NEW)
@pytest.mark.parametrize("engine", ["eager:lanes", "eager:fold", "fused"])
def test_equal_to_the_naive_loop(engine, optimizer, digits, naive):
    fast = fast_swamp(networks.build("residual"), *digits, engine=engine, **SETTINGS, **OPTIMIZERS[optimizer])
    assert fast.engine["name"] == engine
    same(fast, naive("residual", optimizer))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd, clipped"])
def test_tied_and_unused_parameters_equal_the_naive_loop(optimizer, digits, naive):
    """A tied parameter counts once in the norm. A parameter without a gradient still moves, by momentum and decay."""
    for name in ("tied", "branching"):
        fast = fast_swamp(networks.build(name), *digits, engine="eager", **SETTINGS, **OPTIMIZERS[optimizer])
        same(fast, naive(name, optimizer))


@pytest.mark.parametrize(("changed", "plain"), [("adamw", "sgd"), ("sgd, clipped", "sgd"), ("adamw, clipped", "adamw")])
def test_the_settings_have_an_effect_and_the_networks_learn(changed, plain, naive):
    """The tests above would also pass if the bound never clipped or if the networks learned nothing."""
    found, other = naive("residual", changed), naive("residual", plain)
    assert max(float((found.ticket[key] - value).abs().max()) for key, value in other.ticket.items()) > 1e-3
    assert max(found.history[0]["train_loss"]) < 2.2  # the loss of guessing is 2.3


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_a_lane_has_the_same_bits_alone_and_among_eight(engine, digits):
    settings = SETTINGS | ADAMW | CLIP | {"cycles": 0, "precision": "float32", "epochs": 2, "engine": engine}
    eight, one = (
        fast_swamp(networks.build("residual"), *digits, **settings | {"particles": number}) for number in (8, 1)
    )
    for name, value in one.particles.items():
        assert torch.equal(value, eight.particles[name][:1]), name


def test_only_adamw_has_a_second_moment(digits):
    sizes = {}
    for optimizer in ("sgd", "adamw"):
        settings = {"optimizer": optimizer, "progress": False}
        problem = prepare(networks.build("residual"), *digits, settings=settings)
        sizes[optimizer] = len(eager_trainer(problem, Choice("lanes", False, "forced", {}), 2).bank.moving())
    assert sizes == {"sgd": 3, "adamw": 4}


@pytest.mark.skipif(HAS_GPU, reason=HAS_A_GPU)
@pytest.mark.parametrize("optimizer", NEW)
def test_a_replayed_graph_equals_the_naive_loop(optimizer, digits):
    """The graph must read the step's number and the second moment, and its capture must leave them unchanged."""
    settings = SETTINGS | {"batch_size": 48} | OPTIMIZERS[optimizer]
    with gpu():
        fast = fast_swamp(networks.build("residual"), *digits, engine="eager", **settings, device="cuda")
    assert fast.engine["cuda_graph"]
    same(fast, naive_swamp(networks.build("residual"), *digits, **settings))


@pytest.mark.parametrize("optimizer", NEW[1:])
def test_a_gradient_that_is_not_finite_is_not_clipped_away(optimizer, digits):
    """If the norm overflows float64, the scale is NaN instead of 0, so the run stops and names the particle."""
    step = calls = 0

    def begin(trainer, number):
        nonlocal step, calls
        step, calls = number, 0

    def loss(outputs, targets):
        nonlocal calls
        calls += 1
        bad = step > 1 and calls == 2  # only in the second lane, after the first steps
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none") * (1e200 if bad else 1.0)

    settings = SETTINGS | {"cycles": 0, "ticket_epochs": 0} | OPTIMIZERS[optimizer]
    with before_steps(begin), pytest.raises(FloatingPointError, match="particle 1 diverged"):
        fast_swamp(networks.build("tied"), *digits, loss=loss, engine="eager", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", NEW)
@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_on_a_gpu_equal_to_the_naive_loop(engine, optimizer, digits):
    settings = SETTINGS | OPTIMIZERS[optimizer] | {"device": "cuda"}
    fast = fast_swamp(networks.build("residual"), *digits, engine=engine, **settings)
    assert fast.engine["cuda_graph"]
    same(fast, naive_swamp(networks.build("residual"), *digits, **settings))
