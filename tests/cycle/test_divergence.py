"""A particle that diverges doesn't change the other particles."""

from __future__ import annotations

import json

import networks
import pytest
import torch
from stops import ALWAYS, MODES, STEPS, Interrupted, before_steps, stop_at
from torch import Tensor

from benchmarks.durability import same_bits
from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.runs.files import load_tensors
from swamp_fast.runs.folder import RunDirectory


def poison(lane: int, at: int):
    """Return an action that sets a weight of particle `lane` to NaN before step `at`."""

    def put(trainer, step):
        if step == at and trainer.bank.lanes > lane:
            trainer.bank.weights[lane, 3] = float("nan")

    return put


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lane", [0, 2])
def test_a_particle_that_diverges_changes_no_other(mode, lane, on, digits):
    settings = on(mode) | {"particles": 3, "on_divergence": "drop", "keep_particles": True, "val": 0.1}
    model = networks.build("residual")
    whole = fast_swamp(model, *digits, **settings)
    assert [row["dropped"] for row in whole.history] == [[], []]
    late = STEPS + 3 * STEPS + 4  # a step in the second epoch of the last cycle
    with before_steps(poison(lane, late)), pytest.warns(UserWarning, match="epoch 2") as warned:
        rest = fast_swamp(model, *digits, **settings)
    text = f"cycle 1, epoch 2: particle {lane} diverged to NaN or infinity and is left out of the average."
    assert text in [str(warning.message) for warning in warned]
    assert text == rest.history[1]["warnings"][0]
    row, before = rest.history[1], whole.history[1]
    assert row["dropped"] == [{"lane": lane, "epoch": 2}]
    assert row["particles"] == 3
    left = [other for other in range(3) if other != lane]
    for name in ("particle_accuracy", "train_loss"):
        assert row[name] == [before[name][other] for other in left]
    for name, each in rest.particles.items():
        assert torch.equal(each, whole.particles[name][left]), name
    averaged = {name: each.double().mean(0) for name, each in rest.particles.items() if "weight" in name}
    assert all(torch.allclose(rest.state_dict[name].double(), each, atol=1e-6) for name, each in averaged.items())
    assert all(bool(torch.isfinite(each).all()) for each in rest.state_dict.values())


def test_dropping_equals_the_naive_loop(on, digits):
    """A random transform turns some batches of some particles into infinity."""

    def spoilt(inputs: Tensor) -> Tensor:
        return inputs * (float("inf") if torch.rand(()) < 0.04 else 1.0)

    settings = on("lanes") | {"particles": 4, "on_divergence": "drop", "precision": "float64", "val": 0.1}
    settings |= {"ticket_epochs": 0, "transform": spoilt, "keep_particles": True, "cycles": 2}
    results = []
    for function in (fast_swamp, naive_swamp):
        with pytest.warns(UserWarning, match="diverged"):
            results.append(function(networks.build("tied"), *digits, **settings))
    fast, naive = results
    dropped = [row["dropped"] for row in fast.history]
    assert dropped == [row["dropped"] for row in naive.history]
    assert any(dropped)
    assert all(torch.equal(mask, naive.masks[name]) for name, mask in fast.masks.items())
    for result, other in ((fast.state_dict, naive.state_dict), (fast.particles, naive.particles)):
        assert all(torch.allclose(tensor, other[name], atol=1e-9) for name, tensor in result.items())
    for row, other in zip(fast.history, naive.history, strict=True):
        for name in ("particle_accuracy", "ensemble_accuracy", "train_loss", "best_accuracy"):
            assert row[name] == pytest.approx(other[name], abs=1e-9)


def test_a_run_stopped_by_divergence_can_continue_without_the_particle(on, digits, tmp_path):
    settings = on("lanes") | {"particles": 3}
    fatal = poison(1, STEPS + 1)

    def run(**change):
        return fast_swamp(networks.build("tied"), *digits, **settings | change)

    with before_steps(fatal), pytest.raises(FloatingPointError, match="cycle 0, epoch 1: particle 1 diverged") as error:
        run(run_dir=tmp_path / "cut")
    assert "with a changed lr it would be another run" in str(error.value)
    assert 'on_divergence="drop" continues the run without' in str(error.value)
    kept = RunDirectory(tmp_path / "cut").training_paths()[0]
    assert bool(load_tensors(kept)[0]["weights/kept"].isnan().any())
    with before_steps() as count:
        with pytest.raises(FloatingPointError, match="cycle 0, epoch 1: particle 1 diverged"):
            run(run_dir=tmp_path / "cut")
        assert count[0] == 0, "the resumed run must stop at once"
    with before_steps(fatal), pytest.warns(UserWarning, match="diverged"):
        run(run_dir=tmp_path / "whole", on_divergence="drop")
    with pytest.warns(UserWarning, match="diverged"):
        run(run_dir=tmp_path / "cut", on_divergence="drop")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_a_run_ends_if_all_particles_diverge(on, digits, tmp_path):
    def spoil_all(trainer, step):
        trainer.bank.weights[:, 3] = float("inf")

    settings = on("lanes") | {"particles": 3, "on_divergence": "drop", "run_dir": tmp_path}
    with before_steps(spoil_all), pytest.raises(FloatingPointError, match="ticket, epoch 1: particle 0 diverged"):
        fast_swamp(networks.build("tied"), *digits, **settings)
    with before_steps(spoil_all), pytest.raises(FloatingPointError, match="epoch 1: particles 0, 1, 2 diverged"):
        fast_swamp(networks.build("tied"), *digits, **settings | {"ticket_epochs": 0, "run_dir": None})


def test_a_dropped_particle_stays_dropped_when_resumed(on, digits, tmp_path):
    settings = on("fused") | {"particles": 3, "on_divergence": "drop", "checkpoint_minutes": ALWAYS}
    spoil = poison(1, STEPS + 1)

    def until(number):
        def act(trainer, step):
            spoil(trainer, step)
            stop_at(number)(trainer, step)

        return act

    def run(name):
        return fast_swamp(networks.build("residual"), *digits, **settings, run_dir=tmp_path / name)

    with before_steps(spoil), pytest.warns(UserWarning, match="diverged"):
        run("whole")
    with before_steps(until(2 * STEPS + 2)), pytest.warns(UserWarning, match="diverged"), pytest.raises(Interrupted):
        run("cut")
    result = run("cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")  # the history's warnings are compared as well
    assert result.history[0]["dropped"] == [{"lane": 1, "epoch": 1}]
    assert not result.history[1]["dropped"]


class BreaksInEvaluation(networks.Tied):
    """Its outputs are finite in training and NaN in evaluation, and a buffer of it becomes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.fill_(torch.nan)
            return super().forward(x)
        return super().forward(x) * torch.nan


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
def test_nan_after_the_last_check_is_reported(function, digits, tmp_path):
    settings = {"cycles": 0, "epochs": 2, "ticket_epochs": 0, "particles": 2, "batch_size": 80, "progress": False}
    with pytest.warns(UserWarning, match="seen of the average is not finite"):
        result = function(BreaksInEvaluation(), *digits, **settings, run_dir=tmp_path)
    (row,) = result.history
    assert (row["accuracy"], row["particle_accuracy"]) == (0.0, [0.0, 0.0])  # not that of class 0
    assert any("loss and particle_loss on test data are not finite" in text for text in row["warnings"])
    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
