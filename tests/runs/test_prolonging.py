"""A run that is finished or interrupted goes on to more cycles or a lower density, as the longer run would have."""

from __future__ import annotations

import networks
import pytest
import torch
from equality import same
from torch import nn

from swamp_fast import SwampResult, fast_swamp, naive_swamp

SETTINGS = {"batch_size": 32, "epochs": 2, "ticket_epochs": 1, "particles": 2, "prune": 0.5, "progress": False}


def run(digits, function=fast_swamp, **settings):
    return function(networks.build("tied"), *digits, **SETTINGS | settings)


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"cycles": 1}, {"cycles": 3}),
        ({"cycles": 0, "rewind": "average"}, {"cycles": 2, "rewind": "average"}),
        ({"cycles": 1, "mask_score": "rms"}, {"cycles": 2, "mask_score": "rms"}),
        ({"cycles": 1, "particles": (1, 2)}, {"cycles": 2, "particles": (1, 2, 1)}),
        ({"cycles": 1}, {"target_density": 0.125}),
        ({"cycles": 1, "keep_particles": True}, {"cycles": 2, "keep_particles": True}),
    ],
)
def test_a_prolonged_run_equals_the_longer_run(short, long, function, digits, tmp_path, recwarn):
    first = run(digits, function, **short, run_dir=tmp_path / "run")
    prefix = [first._snapshot(cycle) for cycle in range(len(first.history))]
    prolonged = run(digits, function, **long, run_dir=tmp_path / "run")
    same(prolonged, run(digits, function, **long), 0)
    assert prolonged.history[: len(prefix)] == [snapshot.row for snapshot in prefix]
    assert SwampResult.load(tmp_path / "run").config == prolonged.config
    assert not [warning for warning in recwarn if "computed again" in str(warning.message)]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({"target_density": 0.3}, {"cycles": 3}, 0.25),
        ({"target_density": 0.3}, {"target_density": 0.2}, 0.25),
        ({"cycles": 2}, {"target_density": 0.3}, 0.3),
    ],
)
def test_a_trimmed_last_cycle_is_computed_again(before, after, kept, digits, tmp_path):
    run(digits, **before, run_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"cycle 2 is computed again, because it keeps .* weights, not"):
        prolonged = run(digits, **after, run_dir=tmp_path)
    assert (tmp_path / "cycle_02.safetensors.unused").exists()
    assert prolonged == run(digits, **after)
    assert prolonged.history[2]["density"] == pytest.approx(kept, abs=0.003)


def test_the_target_density_is_met_exactly(digits):
    for function in (fast_swamp, naive_swamp):
        rows = run(digits, function, target_density=0.3).history
        prunable = rows[0]["kept"]
        assert [row["kept"] for row in rows] == [prunable, round(prunable / 2), int(0.3 * prunable)]


def test_a_run_does_not_become_shorter(digits, tmp_path):
    run(digits, cycles=2, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"it has completed cycle 2, but cycles = 1; SwampResult.load.*at\(cycle\)"):
        run(digits, cycles=1, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"particles was 2, is \[2, 2, 1, 2\]"):
        run(digits, cycles=3, particles=(2, 2, 1, 2), run_dir=tmp_path)


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
@pytest.mark.parametrize(("hidden", "target", "kept"), [(100, 0.5, 300), (8, 0.5, 24), (10, 0.5, 30), (15, 0.26, 23)])
def test_the_target_density_counts_weights_without_padding(hidden, target, kept, function):
    """A bank pads layers whose size is no multiple of 16. A small model may round down to the target early."""
    model = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 4))
    data = torch.randn(64, 6), torch.arange(64) % 4
    settings = {"epochs": 1, "ticket_epochs": 0, "particles": 1, "batch_size": 32, "progress": False}
    assert function(model, data, target_density=target, **settings).history[-1]["kept"] == kept
