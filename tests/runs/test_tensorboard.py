"""A run's TensorBoard events, read from its files: each occurs once, whether or not the run was interrupted."""

from __future__ import annotations

import sys
from collections import defaultdict

import networks
import pytest
from stops import Interrupted, before_steps, stop_at

from swamp_fast import fast_swamp, naive_swamp

SETTINGS = {"engine": "eager", "batch_size": 32, "cycles": 2, "epochs": 3, "ticket_epochs": 2, "particles": 2}
SETTINGS |= {"progress": False, "tensorboard": True}


@pytest.fixture
def events():
    """Return a function that reads all scalars in a run's folder as {tag: [(step, value), …]}."""
    from tensorboard.backend.event_processing import event_accumulator as reader

    def read(folder) -> dict[str, list[tuple[int, float]]]:
        accumulator = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={reader.SCALARS: 0})
        accumulator.Reload()
        tags = accumulator.Tags()["scalars"]
        return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}

    return read


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
def test_particles_and_average_over_the_epochs(function, digits, tmp_path, events):
    result = function(networks.build("tied"), *digits, val=0.2, run_dir=tmp_path, **SETTINGS)
    found = events(tmp_path)
    ends = [5, 8, 11]  # the last epoch of each cycle: the ticket has two epochs, each cycle three
    rows = result.history
    expected = {f"train_loss/particle {particle}": list(range(3, 12)) for particle in range(2)}
    expected |= {"train_loss/ticket": [1, 2], "density": ends, "seconds/cycle": ends, "seconds/training": ends}
    for what in ("accuracy", "loss"):
        expected |= {f"{what}/{each}": ends for each in ("average", "particle 0", "particle 1")}
    expected |= {f"accuracy/{each}": ends for each in ("particles' mean", "best particle", "ensemble")}
    expected |= {f"val_accuracy/{each}": ends for each in ("average", "particles' mean")}
    assert {tag: [step for step, _ in each] for tag, each in found.items()} == expected
    for tag, values in {
        "accuracy/average": [row["accuracy"] for row in rows],
        "loss/average": [row["loss"] for row in rows],
        "loss/particle 1": [row["particle_loss"][1] for row in rows],
        "accuracy/particle 1": [row["particle_accuracy"][1] for row in rows],
        "density": [row["density"] for row in rows],
    }.items():
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-6), tag
    last = [value for step, value in found["train_loss/particle 1"] if step in ends]
    assert last == pytest.approx([row["train_loss"][1] for row in rows], rel=1e-6)


@pytest.mark.parametrize("when", ["in the ticket", "in a cycle", "between two cycles", "before a cycle's file"])
def test_a_resumed_run_shows_nothing_twice(when, digits, tmp_path, events, monkeypatch):
    import swamp_fast.runs.record as run_module

    keep_epoch, write_cycle = run_module.Run.keep_epoch, run_module.RunDirectory.write_cycle
    seen = defaultdict(int)

    def stop_in(self, cycle, epoch, losses, **named):
        keep_epoch(self, cycle, epoch, losses, **named)
        if (cycle, epoch) == ((None, 0) if when == "in the ticket" else (1, 1)):
            raise Interrupted

    def stop_before(self, cycle, snapshot, rows):
        if cycle == 1:
            raise Interrupted
        write_cycle(self, cycle, snapshot, rows)

    def stop_after(row):
        seen[row["cycle"]] += 1
        if when == "between two cycles" and row["cycle"] == 0:
            raise Interrupted

    with monkeypatch.context() as patch:
        if when in ("in the ticket", "in a cycle"):
            patch.setattr(run_module.Run, "keep_epoch", stop_in)
        if when == "before a cycle's file":
            patch.setattr(run_module.RunDirectory, "write_cycle", stop_before)
        with pytest.raises(Interrupted):
            fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path, on_cycle=stop_after, **SETTINGS)
    before = events(tmp_path)
    assert before  # without earlier events, nothing could be shown twice
    rows = fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path, on_cycle=stop_after, **SETTINGS).history
    assert seen == {0: 1, 1: 1, 2: 1}
    found = events(tmp_path)
    assert [step for step, _ in found["train_loss/ticket"]] == [1, 2]
    for particle in range(2):
        assert [step for step, _ in found[f"train_loss/particle {particle}"]] == list(range(3, 12))
    assert [step for step, _ in found["accuracy/average"]] == [5, 8, 11]
    assert [each for _, each in found["accuracy/average"]] == pytest.approx([r["accuracy"] for r in rows], rel=1e-6)


def test_turned_on_after_a_finished_run_it_writes_the_rows(digits, tmp_path, events):
    model = networks.build("tied")
    fast_swamp(model, *digits, run_dir=tmp_path, **SETTINGS | {"tensorboard": False})
    assert not (tmp_path / "tensorboard").exists()
    fast_swamp(model, *digits, run_dir=tmp_path, **SETTINGS)
    found = events(tmp_path)
    assert [step for step, _ in found["density"]] == [5, 8, 11]
    files = sorted((tmp_path / "tensorboard").iterdir())
    fast_swamp(model, *digits, run_dir=tmp_path, **SETTINGS)
    assert sorted((tmp_path / "tensorboard").iterdir()) == files
    assert events(tmp_path) == found


def test_without_the_package_nothing_is_trained(digits, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r'`pip install "swamp-fast\[tensorboard\]"`, or set tensorboard=False'):
        fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_it_needs_a_folder(digits):
    with pytest.raises(ValueError, match="`tensorboard` writes into run_dir, got run_dir = None; name a folder"):
        fast_swamp(networks.build("tied"), *digits, **SETTINGS)


# With 5 steps per epoch, these moments are in the ticket's training, between two epochs, and inside an epoch.
@pytest.mark.parametrize("moment", [7, 20, 22])
def test_a_run_resumed_inside_a_training_shows_nothing_twice(moment, digits, tmp_path, events):
    settings = SETTINGS | {"checkpoint_minutes": 1e-9}
    fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path / "whole", **settings)
    with before_steps(stop_at(moment)), pytest.raises(Interrupted):
        fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path / "cut", **settings)
    fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path / "cut", **settings)
    whole, cut = events(tmp_path / "whole"), events(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for tag, values in whole.items():
        assert cut[tag] == values or tag.startswith("seconds/"), tag


def test_particles_keep_their_numbers_when_another_is_dropped(digits, tmp_path, events):
    def spoil(trainer, step):
        if step == 14:
            trainer.bank.weights[0, 3] = float("nan")

    with before_steps(spoil), pytest.warns(UserWarning, match="particle 0 diverged"):
        fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path, **SETTINGS, on_divergence="drop")
    found = events(tmp_path)
    assert [step for step, _ in found["accuracy/particle 0"]] == [8, 11]
    assert [step for step, _ in found["accuracy/particle 1"]] == [5, 8, 11]
