"""Sweeps: a packed run equals the run alone, nothing is computed twice, and a failed run stops no other."""

from __future__ import annotations

import csv
import math
import signal

import networks
import numpy as np
import pytest
import torch
from equality import same
from stops import ALWAYS, Interrupted
from torch.utils.data import DataLoader, TensorDataset

from swamp_fast import SwampResult, fast_swamp, sweep
from swamp_fast.common.statistics import half_width
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.selection import named
from swamp_fast.problem.prepare import prepare
from swamp_fast.runs import lock
from swamp_fast.runs.record import Run
from swamp_fast.studies import packing
from swamp_fast.studies.running import PackRunner

SETTINGS = {"particles": 2, "cycles": 2, "epochs": 2, "ticket_epochs": 1, "batch_size": 32, "progress": False}


@pytest.fixture
def data(digits):
    (inputs, targets), (test_inputs, test_targets) = digits
    return (inputs[:160], targets[:160]), (test_inputs[:60], test_targets[:60])


def made(name="residual"):
    return networks.build(name)


def alone(point, data, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(point.get("seed", 0))
        model = made()
    return fast_swamp(model, *data, **{**SETTINGS, **settings, **point})


GRID = {"seed": [0, 1], "lr": [0.1, 0.05]}


def bits(a, b) -> None:
    for name, each in a.state_dict.items():
        assert torch.equal(each, b.state_dict[name]), name
    for name, each in a.masks.items():
        assert torch.equal(each, b.masks[name]), name


@pytest.mark.parametrize("way", ["lanes", "fold"])
def test_packed_equals_alone_in_float64(way, data, monkeypatch):
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (3, "forced"))
    how = {"engine": f"eager:{way}", "precision": "float64", "keep_particles": True}
    points = [{"seed": 0}, {"seed": 3, "lr": 0.07, "swa_lr": 0.03}, {"weight_decay": 1e-3, "momentum": 0.8}]
    points[2]["prune"] = 0.3
    found = sweep(made, *data, points, **SETTINGS, **how)
    for run in found.runs:
        assert run.error is None
        same(run.result, alone(run.point, data, **how))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_packed_equals_alone_bit_for_bit(optimizer, data, monkeypatch):
    """The fused engine and the eager engine's lane-by-lane mode give each packed run the bits of the run alone."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (4, "forced"))
    rates = {"optimizer": optimizer} | ({} if optimizer == "sgd" else {"lr": 1e-3, "swa_lr": 5e-4})
    grid = {"seed": [0, 1], "weight_decay": [0.0, 1e-3]}
    for engine in ("fused", "eager"):
        for run in sweep(made, *data, grid, **{**SETTINGS, **rates}, engine=engine, clip_norm=1.0).runs:
            bits(run.result, alone(run.point, data, engine=engine, clip_norm=1.0, **rates))


def test_nothing_is_computed_twice(data, tmp_path, monkeypatch):
    first = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, engine="eager", **SETTINGS)
    packs, original = [], PackRunner.run_pack

    def counted(self, pack):
        packs.append(len(pack.numbers))
        original(self, pack)

    monkeypatch.setattr(PackRunner, "run_pack", counted)
    again = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, engine="eager", **SETTINGS)
    assert packs == []
    for a, b in zip(first.runs, again.runs, strict=True):
        assert a.id == b.id
        bits(a.result, b.result)
    extended = sweep(made, *data, {"seed": [1, 2]}, out=tmp_path, engine="eager", **SETTINGS)
    assert packs == [1]
    assert extended.runs[0].id == first.runs[1].id
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["cycle"]) for row in rows] == [(s, c) for s in "12" for c in "012"]
    assert float(rows[-1]["accuracy"]) == extended.runs[1].result.history[-1]["accuracy"]
    with open(tmp_path / "summary.csv") as file:
        summary = list(csv.DictReader(file))
    assert [row["seeds"] for row in summary] == ["2"] * 3
    each = [run.result.history[2]["accuracy"] for run in extended.runs]
    assert float(summary[2]["accuracy"]) == pytest.approx(sum(each) / 2)
    assert float(summary[2]["accuracy_std"]) == pytest.approx(abs(each[0] - each[1]) / 2**0.5)


def test_a_run_that_diverges_stops_no_other(data, monkeypatch):
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (3, "forced"))
    found = sweep(made, *data, {"lr": [0.1, 1e30, 0.05]}, swa_lr=0.05, engine="eager", **SETTINGS)
    good, bad, other = found.runs
    assert isinstance(bad.error, FloatingPointError)
    assert bad.result is None
    bits(good.result, alone(good.point, data, engine="eager", swa_lr=0.05))
    assert other.result is not None
    assert [row["error"] != "" for row in found.rows()] == [False] * 3 + [True] + [False] * 3


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_stopped_it_goes_on(engine, data, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (2, "forced"))
    whole = sweep(made, *data, {"seed": [0, 1]}, engine=engine, **SETTINGS)
    original, steps = Run.step, []

    def step(self, *arguments):
        steps.append(self)
        if len(steps) == 33:
            self.signals.received = signal.SIGINT
        return original(self, *arguments)

    monkeypatch.setattr(Run, "step", step)
    with pytest.raises(KeyboardInterrupt):
        sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, engine=engine, **SETTINGS)
    assert len(list(tmp_path.glob("runs/*/training*.safetensors"))) == (2 if engine == "eager" else 1)
    again = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, engine=engine, **SETTINGS)
    for a, b in zip(whole.runs, again.runs, strict=True):
        bits(a.result, b.result)
    assert len(steps) == 2 * (1 + 3 * 2) * 5  # no step is taken twice


@pytest.fixture
def three_at_once(monkeypatch):
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (3, "forced"))


SEEDS = {"seed": [0, 1, 2]}
EAGER = {**SETTINGS, "engine": "eager", "cycles": 1}
FASTEST = {**EAGER, "engine": "fastest"}
STEPS = 3 * (5 + 2 * 2 * 5)  # 3 runs: the ticket's epoch and two trainings of two epochs, with 5 steps per epoch


@pytest.mark.parametrize("writes", [1, 23, 49, 71])
def test_killed_between_the_checkpoints_of_two_runs(writes, three_at_once, data, tmp_path, monkeypatch):
    """Only the last step is repeated, by the runs whose checkpoints were already written."""
    whole = sweep(made, *data, SEEDS, **EAGER)
    count, original, step = [], Run.keep_training, Run.step

    def killed(self, state):
        original(self, state)
        count.append(self)
        if len(count) == writes:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Run, "keep_training", killed)
        with pytest.raises(Interrupted):
            sweep(made, *data, SEEDS, out=tmp_path, checkpoint_minutes=ALWAYS, **EAGER)
    steps = []
    monkeypatch.setattr(Run, "step", lambda self, *rest: (steps.append(self), step(self, *rest))[1])
    again = sweep(made, *data, SEEDS, out=tmp_path, **EAGER)
    for a, b in zip(whole.runs, again.runs, strict=True):
        bits(a.result, b.result)
    assert STEPS - writes <= len(steps) <= STEPS - writes // 3 * 3


def test_stopped_while_one_is_evaluated(three_at_once, data, tmp_path, monkeypatch):
    """A signal that comes while one run is evaluated loses the finished training of no run."""
    asked = []

    def reestimate(*_):
        if not asked:
            signal.raise_signal(signal.SIGTERM)
        asked.append(1)

    monkeypatch.setattr("swamp_fast.cycle.averaging.reestimate", reestimate)
    with pytest.raises(SystemExit):
        sweep(made, *data, SEEDS, out=tmp_path, **EAGER)
    assert len(list(tmp_path.glob("runs/*/cycle_00.safetensors"))) == 3


def test_runs_that_have_all_diverged_are_over(three_at_once, data, monkeypatch):
    steps, step = [], Run.step
    monkeypatch.setattr(Run, "step", lambda self, *rest: (steps.append(self), step(self, *rest))[1])
    settings = {**EAGER, "lr": 1e30, "epochs": 4, "ticket_epochs": 0}
    assert all(isinstance(run.error, FloatingPointError) for run in sweep(made, *data, SEEDS, **settings).runs)
    assert len(steps) <= 3 * 5


def frozen():
    model = made()
    model.conv.weight.requires_grad_(False)
    return model


class Drawn(torch.nn.Module):
    """A model whose function depends on random values that are drawn when it is created."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.order = made(), torch.randperm(8)
        self.register_buffer("other", torch.randn(1, 1, 8, 8))

    def forward(self, x):
        return self.body(x[..., self.order] + self.other)


@pytest.mark.parametrize("factory", [frozen, Drawn])
def test_models_that_differ_in_more_than_their_weights(factory, three_at_once, data):
    settings = {**EAGER, "precision": "float64", "keep_particles": True}
    for run in sweep(factory, *data, {"seed": [0, 1]}, **settings).runs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.point["seed"])
            model = factory()
        same(run.result, fast_swamp(model, *data, **settings, **run.point))


def test_a_damaged_file_is_mended(data, tmp_path):
    first = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, **EAGER)
    path = first.runs[1].folder / "cycle_01.safetensors"
    path.write_bytes(path.read_bytes()[:-99])
    with pytest.warns(UserWarning, match="It was renamed"):
        again = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, **EAGER)
    bits(first.runs[1].result, again.runs[1].result)
    assert path.exists()


def test_a_finished_run_that_lacks_files_says_so_and_computes_them_again(data, tmp_path):
    settings = {**EAGER, "keep_particles": True, "cycles": 2}
    first = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, **settings)
    folder = first.runs[1].folder
    for names in (
        *(["ticket.safetensors"], ["cycle_00.safetensors"], ["cycle_01.safetensors"], ["cycle_02.safetensors"]),
        *(["model.safetensors"], ["masks.safetensors"], ["particles.safetensors"], ["history.jsonl"]),
        ["ticket.safetensors", "cycle_02.safetensors", "particles.safetensors", "model.safetensors"],
    ):
        for name in names:
            (folder / name).unlink()
        with pytest.warns(UserWarning, match=f"seed = 1: .* lacks {', '.join(names)}, though the run was finished"):
            again = sweep(made, *data, {"seed": [0, 1]}, out=tmp_path, **settings)
        assert again.runs[1].result == first.runs[1].result
        for name, tensor in first.runs[1].result.particles.items():
            assert torch.equal(tensor, again.runs[1].result.particles[name])
        assert all((folder / name).exists() for name in names)
        assert SwampResult.load(folder, made()) == first.runs[1].result


def test_whatever_a_run_fails_by_the_others_go_on(three_at_once, data, tmp_path, monkeypatch):
    original, failed = EagerEngine.train_runs, []

    def train_runs(self, bank, trainings, *rest):
        if any(config.seed == 1 for config in bank.configs):
            failed.append(len(bank.configs))
            raise torch.OutOfMemoryError("none is left")
        return original(self, bank, trainings, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "train_runs", train_runs)
        found = sweep(made, *data, SEEDS, out=tmp_path, **EAGER)
    assert failed == [3, 1]
    assert [type(run.error) for run in found.runs] == [type(None), torch.OutOfMemoryError, type(None)]
    (found.runs[0].folder / "run.json").write_text("{")
    again = sweep(made, *data, SEEDS, out=tmp_path, **EAGER)
    assert (found.runs[0].folder / "run.json.damaged").exists()
    bits(again.runs[0].result, found.runs[0].result)
    bits(again.runs[1].result, alone({"seed": 1}, data, **EAGER))
    bits(again.runs[2].result, found.runs[2].result)


def test_what_was_chosen_is_chosen_again(data, tmp_path, monkeypatch):
    """A choice that a stopwatch made is used again, also for the new runs of an extended grid."""
    for way, why in (("lanes", "first"), ("fold", "then")):
        monkeypatch.setattr("swamp_fast.engines.start._fastest", lambda *_, w=way, y=why: named(f"eager:{w}", y))
        again = sweep(made, *data, SEEDS if way == "fold" else {"seed": [0, 1]}, out=tmp_path, **FASTEST)
    assert [run.result.engine["why"] for run in again.runs] == ["first"] * 3


def test_a_score_that_is_not_finite(data, tmp_path):
    """The mean and spread of the score are NaN, and no run fails."""

    def loss(outputs, targets):
        return -outputs.softmax(1).gather(1, targets[:, None]).squeeze(1).log()

    (images, targets), test = data
    images = images.float() / 255
    loud = test[0].float() / 255
    loud[0] *= 1e12
    found = sweep(made, (images, targets), (loud, test[1]), {"seed": [0, 1]}, loss=loss, out=tmp_path, **EAGER)
    assert [run.error for run in found.runs] == [None, None]
    row = found.summary()[0]
    assert math.isnan(row["loss"])
    assert math.isnan(row["loss_std"])
    assert row["accuracy_std"] >= 0
    assert math.isnan(half_width([math.inf, 1.0]))


def test_runs_are_dealt_by_what_they_cost(data):
    points = [{"epochs": epochs, "seed": seed} for seed in range(4) for epochs in (1, 9)]
    problems = [prepare(made(), *data, settings={**SETTINGS, **point}) for point in points]
    packs = [packing.Pack(numbers, {}, 1) for numbers in packing.packs_of(problems)]
    parts = packing.dealt(packs, problems, 2)
    costs = [sum(points[number]["epochs"] for pack in part for number in pack.numbers) for part in parts]
    assert costs == [20, 20]


def test_progress_covers_the_whole_sweep(three_at_once, data, capsys):
    sweep(made, *data, SEEDS, **{**EAGER, "progress": True})
    printed = capsys.readouterr().err.splitlines()
    cycles = [line for line in printed if ": cycle " in line]
    assert len(cycles) == 6
    assert cycles[-1].endswith("the sweep has about 0.0 s left")


def test_runs_that_cannot_share_a_step_queue(data):
    settings = {name: value for name, value in SETTINGS.items() if name != "epochs"}
    found = sweep(made, *data, {"epochs": [1, 2], "seed": [0, 1]}, **settings)
    assert [len(run.result.history) for run in found.runs] == [3] * 4
    assert [run.result.config.epochs for run in found.runs] == [1, 1, 2, 2]


def test_one_module_is_one_initialisation(data):
    model = made()
    found = sweep(model, *data, {"seed": [0, 1]}, engine="eager", **{**SETTINGS, "ticket_epochs": 0})
    a, b = (run.result.ticket for run in found.runs)
    for name, each in a.items():
        assert torch.equal(each, b[name])


def test_what_is_refused(data):
    for grid, error, text in (
        ({"lr": 0.1}, TypeError, "list of values for `lr`"),
        ([], ValueError, "`grid` is empty"),
        ({"learning": [1]}, TypeError, "unknown setting `learning`"),
        ([{"seed": 1}, {"seed": 1}], ValueError, "the same run twice"),
        ({"lr": [0.01], "swa_lr": [0.05]}, ValueError, "`swa_lr` must be at most `lr`"),
        ({"run_dir": ["a", "b"]}, TypeError, "each run of a sweep has a folder below `out`"),
        (5, TypeError, "must be a dict of lists, or a list of points"),
        ([5], TypeError, "must hold points"),
    ):
        with pytest.raises(error, match=text):
            sweep(made, *data, grid, **SETTINGS)
    assert len(sweep(made, *data, {"seed": np.array([0, 1])}, **{**SETTINGS, "cycles": 0}).runs) == 2
    with pytest.raises(TypeError, match="a sweep has `out`"):
        sweep(made, *data, {"seed": [0]}, run_dir="somewhere", **SETTINGS)


def test_two_sweeps_do_not_write_into_one_folder(data, tmp_path):
    with lock.locked(tmp_path), pytest.raises(ValueError, match=r"is in use by process"):
        sweep(made, *data, {"seed": [0]}, out=tmp_path, **SETTINGS)


def test_values_from_an_iterator_are_all_run(data):
    found = sweep(made, *data, {"lr": (lr for lr in (0.1, 0.05))}, **SETTINGS | {"cycles": 0})
    assert [run.point["lr"] for run in found.runs] == [0.1, 0.05]
    found = sweep(made, *data, iter([{"lr": 0.1}]), **SETTINGS | {"cycles": 0})
    assert len(found.runs) == 1


def test_a_setting_that_an_argument_overrides_is_refused(data):
    loader = DataLoader(TensorDataset(data[0][0].float(), data[0][1]), 16)
    for grid, settings in (({"batch_size": [8]}, {}), ({"lr": [0.1]}, {"batch_size": 8})):
        rest = {name: value for name, value in SETTINGS.items() if name != "batch_size"} | settings
        with pytest.raises(ValueError, match="`batch_size` = 8 contradicts the DataLoader's 16"):
            sweep(made, loader, None, grid, **rest)


def test_a_last_write_that_fails_keeps_the_result(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("swamp_fast.studies.result.write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        sweep(made, *data, {"seed": [0]}, out=tmp_path, **SETTINGS | {"cycles": 0})
    assert caught.value.result.runs[0].result.history
    monkeypatch.undo()
    monkeypatch.setattr("swamp_fast.studies.result.accuracy_of_points", full)
    assert sweep(made, *data, {"seed": [0]}, out=tmp_path, **SETTINGS | {"cycles": 0}).runs[0].result.history
