"""fast_swamp gives the naive loop's masks and weights in float64, for every network and execution mode."""

from __future__ import annotations

import networks
import pytest
import torch
from networks import CASES

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines.eager.choice import Choice


def settings(name: str) -> dict[str, object]:
    """Settings of a run with 3 particles, 3 cycles and at most 60 steps per cycle."""
    big = name == "resnet18"
    return {
        "engine": "eager",
        "particles": 3,
        "cycles": 3,
        "epochs": 2 if big else 6,
        "ticket_epochs": 1 if big else 2,
        "batch_size": 16 if big else 32,
        "lr": 0.01 if big else 0.1,
        "swa_lr": 0.005 if big else 0.05,
        "precision": "float64",
        "val": 0.1,
        "progress": False,
    }


def data_for(name: str, digits):
    (inputs, targets), test = digits
    few = 32 if name == "resnet18" else 160
    return (inputs[:few], targets[:few]), test


@pytest.fixture(scope="module")
def naive_results(digits):
    """The naive loop's result, computed once for each network."""
    results = {}

    def get(name: str):
        if name not in results:
            results[name] = naive_swamp(networks.build(name), *data_for(name, digits), **settings(name))
        return results[name]

    return get


@pytest.mark.parametrize(("name", "mode", "channels_last"), CASES)
def test_equal_to_the_naive_loop(name, mode, channels_last, digits, naive_results):
    model = networks.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    choice = Choice(mode, channels_last, "", {})
    fast = fast_swamp(model, *data_for(name, digits), **settings(name) | {"engine": choice.name})
    naive = naive_results(name)
    assert fast.engine["way"] == mode
    assert naive.engine["engine"] == "naive"
    for cycle in range(4):
        (model_fast, masks_fast), (model_naive, masks_naive) = fast.at(cycle), naive.at(cycle)
        assert masks_fast.keys() == masks_naive.keys()
        assert all(torch.equal(masks_fast[key], masks_naive[key]) for key in masks_fast)
        states = model_fast.state_dict(), model_naive.state_dict()
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert value.dtype == states[1][key].dtype
            assert (value - states[1][key]).abs().max() <= 1e-8, key
        for key, value in naive.history[cycle].items():
            if key not in ("train_seconds", "seconds", "peak_memory"):
                assert fast.history[cycle][key] == pytest.approx(value, abs=1e-8), key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pairs = [(fast.at(c)[0].state_dict(), naive.at(c)[0].state_dict()) for c in range(4)]
    worst = max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a)
    print(f"{name}, {mode}: masks equal, weights within {worst:.1e}")


def test_the_networks_learn(naive_results):
    """The networks compared above do learn: their loss falls well below that of guessing."""
    losses = {name: max(naive_results(name).history[0]["train_loss"]) for name in networks.NETWORKS}
    assert max(losses.values()) < 2.2, losses


def test_variants_agree_too(digits):
    """Other settings: rewind to the average (as in SMS), no SWA, Nesterov, particles per cycle, masks, prune."""
    common = settings("tied") | {"epochs": 3}
    half = {"middle.weight": torch.rand(32, 32, generator=torch.Generator().manual_seed(3)) < 0.5}
    for change in (
        {"rewind": "average"},
        {"average": "none", "nesterov": True},
        {"particles": (1, 2, 3, 1)},
        {"initial_masks": half, "prune": 0.5},
        {"ticket_epochs": 0, "momentum": 0.0},
        {"keep_particles": True, "epochs": 1},
    ):
        model = networks.build("tied")
        fast = fast_swamp(model, *digits, **common | change)
        naive = naive_swamp(model, *digits, **common | change)
        assert all(torch.equal(fast.masks[key], naive.masks[key]) for key in naive.masks)
        for key, value in naive.state_dict.items():
            assert (fast.state_dict[key] - value).abs().max() <= 1e-8, (change, key)
        for key, value in (naive.particles or {}).items():
            assert (fast.particles[key] - value).abs().max() <= 1e-8
        assert (fast.particles is not None) == ("keep_particles" in change)
