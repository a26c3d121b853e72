"""`on_epoch` and `on_cycle`: when they are called and with what, how they end a run, and what a failing one costs."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from equality import same
from torch import nn

from benchmarks.durability import SMALL, Small
from benchmarks.ranks import launch
from swamp_fast import StopRun, SwampResult, fast_swamp, naive_swamp

SETTINGS = {"batch_size": 32, "epochs": 2, "ticket_epochs": 1, "particles": 2, "cycles": 2, "progress": False}
DRIVERS = {
    "naive": (naive_swamp, {}),
    "eager": (fast_swamp, {"engine": "eager"}),
    "fused": (fast_swamp, {"engine": "fused"}),
    "by density": (fast_swamp, {"engine": "fused@0.9,eager:lanes"}),
}
ALL = pytest.mark.parametrize("driver", DRIVERS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def run(driver, digits, **settings):
    function, own = DRIVERS[driver]
    return function(network(), *digits, **{**SETTINGS, "precision": "float64", **own, **settings})


def at(cycle, epoch, error):
    """Return an `on_epoch` that raises an error after an epoch of a cycle."""

    def callback(row):
        if (row["cycle"], row["epoch"]) == (cycle, epoch):
            raise error

    return callback


@ALL
def test_they_are_called_in_order(driver, digits):
    seen, losses = [], {}

    def on_epoch(row):
        seen.append((row["cycle"], row["epoch"]))
        assert row["epochs"] == (1 if row["cycle"] is None else 2)
        assert set(row) == {"cycle", "epoch", "epochs", "train_loss"} | ({"particle"} if driver == "naive" else set())
        losses.setdefault(row["cycle"], []).append(row)

    def on_cycle(row):
        seen.append(row["cycle"])
        last = [loss for each in losses[row["cycle"]] if each["epoch"] == 1 for loss in each["train_loss"]]
        assert last == row["train_loss"]

    run(driver, digits, on_epoch=on_epoch, on_cycle=on_cycle)
    times = 2 if driver == "naive" else 1
    cycles = [[*[(cycle, 0), (cycle, 1)] * times, cycle] for cycle in range(3)]
    assert seen == [(None, 0), *cycles[0], *cycles[1], *cycles[2]]
    if driver == "naive":
        assert [row["particle"] for row in losses[0]] == [0, 0, 1, 1]


def test_the_naive_loop_reports_the_same_losses(digits):
    def losses(driver):
        rows = []
        run(driver, digits, on_epoch=rows.append)
        each = [
            (r["cycle"], r["epoch"], r.get("particle", 0) + n, x) for r in rows for n, x in enumerate(r["train_loss"])
        ]
        return sorted(each, key=lambda entry: (-1 if entry[0] is None else entry[0], *entry[1:3]))

    expected = losses("naive")
    for driver in ("eager", "fused", "by density"):
        found = losses(driver)
        assert [entry[:3] for entry in found] == [entry[:3] for entry in expected]
        assert [entry[3] for entry in found] == pytest.approx([entry[3] for entry in expected], abs=1e-10)


@ALL
def test_a_snapshot_is_the_cycles_average_and_its_masks(driver, digits, tmp_path):
    kept = []
    for folder in (None, tmp_path):
        kept.clear()
        result = run(driver, digits, on_cycle=lambda row, snapshot: kept.append((row, snapshot)), run_dir=folder)
        assert len(kept) == 3
        for row, snapshot in kept:
            model, masks = result.at(row["cycle"])
            assert row == snapshot.row == result.history[row["cycle"]]
            assert snapshot.state.keys() == model.state_dict().keys()
            assert all(torch.equal(snapshot.state[name], value) for name, value in model.state_dict().items())
            assert snapshot.masks.keys() == masks.keys()
            assert all(torch.equal(snapshot.masks[name], mask) for name, mask in masks.items())


@ALL
def test_callbacks_change_nothing(driver, digits):
    """They get copies, and may draw random numbers and set modes."""

    def on_epoch(row):
        row["train_loss"].clear()
        torch.manual_seed(7)
        random.seed(7)
        np.random.rand()  # noqa: NPY002
        torch.set_grad_enabled(False)

    def on_cycle(row, snapshot):
        row.clear()
        snapshot.row.clear()
        for tensor in (*snapshot.state.values(), *snapshot.masks.values()):
            tensor.zero_()

    plain = run(driver, digits)
    observed = run(driver, digits, on_epoch=on_epoch, on_cycle=on_cycle)
    torch.set_grad_enabled(True)
    assert observed == plain
    same(observed, plain, 0)


def test_what_on_cycle_gets_is_told_by_its_signature(digits):
    seen = []

    def with_default(row, log=seen.append):
        log("default")

    class Both:
        def on_cycle(self, row, snapshot):
            seen.append(type(snapshot).__name__)

    settings = {"cycles": 0, "epochs": 1, "ticket_epochs": 0}
    for callback in (with_default, lambda *given: seen.append(len(given)), Both().on_cycle, seen.append):
        run("eager", digits, on_cycle=callback, **settings)
    assert seen[:3] == ["default", 1, "Snapshot"]
    assert seen[3]["cycle"] == 0
    for name, callback in (("on_cycle", lambda a, b, c: 0), ("on_cycle", lambda: 0), ("on_epoch", lambda a, b: 0)):
        with pytest.raises(TypeError, match=f"`{name}` must take one argument"):
            run("eager", digits, **{name: callback})


@ALL
def test_stop_run_in_on_epoch_ends_with_the_cycles_before(driver, digits, tmp_path, capsys):
    whole = run(driver, digits)
    settings = {"run_dir": tmp_path, "progress": True}
    stopped = run(driver, digits, on_epoch=at(1, 0, StopRun()), **settings)
    assert len(stopped.history) == 1
    assert stopped == SwampResult.load(tmp_path)
    assert "stopped  by on_epoch after epoch 1 of 2 of cycle 1" in capsys.readouterr().err
    assert (tmp_path / "training.safetensors").exists() == (driver != "naive")
    rows = []
    resumed = run(driver, digits, on_epoch=rows.append, **settings)
    assert resumed == whole
    if driver != "naive":  # the checkpoint is of the end of the epoch, which is reported again
        assert "after step 5" in capsys.readouterr().err
        assert [(row["cycle"], row["epoch"]) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]


@ALL
def test_stop_run_before_any_cycle_is_an_error(driver, digits, tmp_path):
    for cycle in (None, 0):
        with pytest.raises(RuntimeError, match="`on_epoch` raised StopRun before any cycle was finished") as caught:
            run(driver, digits, on_epoch=at(cycle, 0, StopRun()), run_dir=tmp_path)
        assert not hasattr(caught.value, "result")
    assert run(driver, digits, run_dir=tmp_path) == run(driver, digits)


@ALL
def test_stop_run_of_something_else_is_an_error(driver, digits):
    def transform(inputs):
        if seen:
            raise StopRun
        return inputs

    seen = []
    with pytest.raises(StopRun) as caught:
        run(driver, digits, transform=transform, on_cycle=seen.append)
    assert len(caught.value.result.history) == 1


@ALL
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_failing_callback_never_costs_a_cycle(driver, error, digits, tmp_path):
    whole, rows = run(driver, digits), []

    def fails(row, snapshot):
        raise error

    with pytest.raises(type(error)) as caught:
        run(driver, digits, on_cycle=fails, run_dir=tmp_path)
    assert [row["cycle"] for row in caught.value.result.history] == [0]
    assert caught.value.result == SwampResult.load(tmp_path)

    with pytest.raises(type(error)) as caught:
        run(driver, digits, on_epoch=at(2, 1, error), on_cycle=rows.append, run_dir=tmp_path)
    assert [row["cycle"] for row in caught.value.result.history] == [0, 1]
    assert run(driver, digits, on_cycle=rows.append, run_dir=tmp_path) == whole
    assert [row["cycle"] for row in rows] == [1, 2]  # a finished cycle is not reported again


@ALL
def test_stop_iteration_is_named(driver, digits):
    with pytest.raises(RuntimeError, match="`on_epoch` raised StopIteration"):
        run(driver, digits, on_epoch=at(0, 1, StopIteration()))


def test_a_particle_that_diverges_is_reported_before_the_error(digits):
    rows = []
    with pytest.raises(FloatingPointError):
        run("eager", digits, lr=1e300, swa_lr=1e300, ticket_epochs=0, on_epoch=lambda row: rows.append(copy.copy(row)))
    assert not np.isfinite(rows[-1]["train_loss"]).all()


def of_a_rank(folder: str) -> None:
    """Run with callbacks on the first rank only, stop in the last cycle, and write what the rank saw."""
    from swamp_fast import distributed

    first, seen = distributed.current().first, []

    def on_epoch(row):
        seen.append([row["cycle"], row["epoch"], len(row["train_loss"])])
        if (row["cycle"], row["epoch"]) == (2, 1):
            raise StopRun

    settings = {
        **SMALL,
        "epochs": 2,
        "cycles": 2,
        "particles": 3,
        "engine": "fused",
        "device": "cpu",
        "progress": False,
    }
    called = {"on_epoch": on_epoch, "on_cycle": lambda row, snapshot: seen.append(row["cycle"])} if first else {}
    torch.manual_seed(0)
    metrics = {"right": lambda outputs, targets: outputs.argmax(1) == targets}
    result = fast_swamp(Small(), "digits", run_dir=f"{folder}/run", metrics=metrics, **called, **settings)
    rows = [{name: row[name] for name in ("accuracy", "particle_right")} for row in result.history]
    with open(f"{folder}/{distributed.current().rank}.json", "w") as file:
        json.dump([seen, rows], file)


def test_of_several_ranks_only_the_first_calls(tmp_path):
    processes = launch(2, tmp_path / "logs", of_a_rank, str(tmp_path))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "logs" / "rank_0").read_text()
    (seen, rows), (nothing, same_rows) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert nothing == []
    assert rows == same_rows
    assert len(rows) == 2
    ticket = [entry for entry in seen if isinstance(entry, list) and entry[0] is None]
    of_cycles = [entry for entry in seen if entry not in ticket]
    assert of_cycles == [[0, 0, 3], [0, 1, 3], 0, [1, 0, 3], [1, 1, 3], 1, [2, 0, 3], [2, 1, 3]]
