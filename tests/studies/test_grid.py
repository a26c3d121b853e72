"""What a sweep's grid may hold besides settings, recipes and arguments of the model factory, and its callbacks."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from swamp_fast import Recipe, StopRun, compare, fast_swamp, sweep, write_report
from swamp_fast.problem.prepare import prepare
from swamp_fast.studies import packing
from swamp_fast.studies.grid import Point, points_of
from swamp_fast.studies.result import SweptRun

SETTINGS = {"particles": 2, "cycles": 1, "epochs": 2, "ticket_epochs": 0, "batch_size": 32, "swa_start": 0.5}
SETTINGS |= {"engine": "eager", "precision": "float64", "progress": False}


@pytest.fixture
def data(digits):
    (inputs, targets), (test_inputs, test_targets) = digits
    return (inputs[:96], targets[:96]), (test_inputs[:40], test_targets[:40])


def net(width: int = 16, depth: int = 1) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.LazyLinear(width), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.LazyLinear(10))
    model(torch.zeros(1, 1, 8, 8))
    return model


def seeded(seed: int = 0, **arguments: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return net(**arguments)


def falling(step: int, steps: int) -> float:
    return 1 - step / steps


def equal(a, b) -> None:
    for name, each in a.state_dict.items():
        assert torch.equal(each, b.state_dict[name]), name


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_recipe_is_a_grid_value_by_name(data, tmp_path):
    recipes = {"falling": Recipe(schedule=falling), "plain": None}
    found = sweep(net, *data, {"recipe": recipes, "seed": [0, 1]}, out=tmp_path, **SETTINGS)
    assert [run.point for run in found.runs] == [
        {"recipe": name, "seed": seed} for name in ("falling", "plain") for seed in (0, 1)
    ]
    assert found.runs[0].name == "recipe = falling, seed = 0"
    assert len({run.id for run in found.runs}) == 4
    for run in found.runs:
        seed = run.point["seed"]
        alone = fast_swamp(seeded(seed), *data, recipe=recipes[run.point["recipe"]], seed=seed, **SETTINGS)
        equal(run.result, alone)
    assert [row["recipe"] for row in rows_of(tmp_path / "summary.csv")] == ["falling"] * 2 + ["plain"] * 2
    assert "recipe = falling" in write_report(tmp_path).read_text()
    again = sweep(net, *data, [{"recipe": {"renamed": recipes["falling"]}, "seed": 1}], out=tmp_path, **SETTINGS)
    assert again.runs[0].id == found.runs[1].id  # the name is no part of what a run computes


def test_the_grids_recipe_takes_precedence(data):
    shared = Recipe(schedule=falling)
    plain, own = sweep(net, *data, [{"recipe": {"plain": None}}, {}], recipe=shared, **SETTINGS).runs
    equal(plain.result, fast_swamp(seeded(), *data, **SETTINGS))
    equal(own.result, fast_swamp(seeded(), *data, recipe=shared, **SETTINGS))


def test_arguments_of_the_model_factory(data, tmp_path):
    grid = {"model.width": [8, 16], "model.depth": [2], "seed": [0, 1]}
    found = sweep(net, *data, grid, out=tmp_path, **SETTINGS)
    assert found.runs[2].name == "model.width = 16, model.depth = 2, seed = 0"
    for run in found.runs:
        width, seed = run.point["model.width"], run.point["seed"]
        equal(run.result, fast_swamp(seeded(seed, width=width, depth=2), *data, seed=seed, **SETTINGS))
        assert run.folder == tmp_path / "runs" / run.id
    assert [row["model.width"] for row in rows_of(tmp_path / "results.csv")] == ["8"] * 4 + ["16"] * 4
    assert [row["seeds"] for row in rows_of(tmp_path / "summary.csv")] == ["2"] * 4
    assert "model.width = 8, model.depth = 2" in write_report(tmp_path).read_text()
    default = sweep(net, *data, [{"model.depth": 2}], out=tmp_path, **SETTINGS)
    assert default.runs[0].id == found.runs[2].id  # the default's run is not repeated
    by_lambda = sweep(lambda width=3: net(width, 2), *data, [{"model.width": 8}], out=tmp_path, **SETTINGS)
    assert by_lambda.runs[0].id == found.runs[0].id


def test_what_a_grid_refuses(data):
    recipe, plain = Recipe(schedule=falling), seeded()
    for model, grid, error, text in (
        (net, {"model.widht": [8]}, TypeError, r"`model.widht`: .* unexpected .*'widht'; it takes width, depth\."),
        (net, [{}, {"model.out": 1}], TypeError, "`model.out`: the model factory got an unexpected"),
        (lambda: net(), {"model.width": [8]}, TypeError, "it takes no arguments"),
        (lambda width: net(width), {"model.depth": [8]}, TypeError, "it takes width"),
        (lambda width: net(width), {"seed": [1]}, TypeError, "`model`: .* missing a required argument: 'width'"),
        (plain, {"model.width": [8]}, TypeError, "`model` is a module, so it takes no arguments. Pass a factory that"),
        (net, {"recipe": [recipe]}, TypeError, "recipes must have names.* no TOML file can hold it"),
        (net, {"recipe": ["sam"]}, TypeError, "recipes must have names"),
        (net, [{"recipe": None}], TypeError, "recipes must have names"),
        (net, {"recipe": {}}, TypeError, "list of values for `recipe`"),
        (net, {"recipe": {"sam": 3}}, TypeError, 'the recipe "sam" must be a swamp_fast.Recipe or None, got 3'),
        (net, {"recipe": {"a": recipe, "b": recipe}}, ValueError, "the same run twice: {'recipe': 'a'} and"),
        (net, [{"recipe": {"a": recipe}}, {"recipe": {"a": None}}], ValueError, 'two recipes with the name "a"'),
        (net, {"recipe": {"a": recipe}, "schedule": ["cosine"]}, ValueError, "`schedule` = 'cosine' has no effect"),
    ):
        with pytest.raises(error, match=text):
            sweep(model, *data, grid, **SETTINGS)


def test_a_point_keeps_the_order_of_its_keys():
    recipe = Recipe(schedule=falling)
    grid = {"lr": [0.1], "recipe": {"r": recipe}, "model.width": [4], "seed": [0]}
    (point,) = points_of(grid)
    assert point == Point({"lr": 0.1, "recipe": {"r": recipe}, "model.width": 4, "seed": 0})
    assert list(point.shown.items()) == [("lr", 0.1), ("recipe", "r"), ("model.width", 4), ("seed", 0)]
    assert (point.settings, point.model_arguments) == ({"lr": 0.1, "seed": 0}, {"width": 4})


def test_the_rows_of_callbacks_name_the_run(data, capsys):
    rows = []
    found = sweep(net, *data, {"seed": [0, 1]}, on_cycle=rows.append, **SETTINGS | {"progress": True})
    assert [(row["run"], row["cycle"]) for row in rows if row["point"] == {"seed": 1}] == [
        (found.runs[1].id, 0),
        (found.runs[1].id, 1),
    ]
    assert len(rows) == 4
    assert "run" not in found.runs[0].result.history[0]
    assert capsys.readouterr().err.count(": cycle ") == 4


def stop_seed_1(row):
    if row["point"]["seed"] == 1 and row["cycle"] == 1:
        raise StopRun


def test_a_callback_stops_one_run_of_a_sweep(data, tmp_path):
    found = sweep(net, *data, {"seed": [0, 1]}, out=tmp_path, on_cycle=stop_seed_1, **SETTINGS | {"cycles": 2})
    assert [len(run.result.history) for run in found.runs] == [3, 2]
    assert [row["cycle"] for row in found.rows()] == [0, 1, 2, 0, 1]
    assert [row["seeds"] for row in found.summary()] == [2, 2, 1]
    problem = prepare(seeded(1), *data, settings=SETTINGS | {"cycles": 2, "seed": 1})
    stopped = SweptRun({}, found.runs[1].id, found.runs[1].folder)
    assert not stopped.load(problem)
    assert stopped.load(problem, stopped=True)  # as other ranks load it
    again = sweep(net, *data, {"seed": [0, 1]}, out=tmp_path, **SETTINGS | {"cycles": 2})
    assert [len(run.result.history) for run in again.runs] == [3, 3]  # without the callback, it continues


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_callback_stops_a_training(at_once, data, tmp_path, monkeypatch):
    """The run keeps its finished cycles, and the runs in its bank train on. Without a finished cycle, it has failed."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (at_once, "forced"))
    called = []

    def on_epoch(row):
        called.append((row["point"]["seed"], row["cycle"], row["epoch"]))
        if called[-1] in ((0, 0, 0), (1, 1, 0)):
            raise StopRun

    found = sweep(net, *data, {"seed": [0, 1, 2]}, out=tmp_path, on_epoch=on_epoch, **SETTINGS)
    assert len(called) == len({*called}) == 1 + 3 + 4
    none, first, whole = found.runs
    assert "StopRun before any cycle was finished" in none.error_text
    assert len(first.result.history) == 1
    equal(whole.result, fast_swamp(seeded(2), *data, seed=2, **SETTINGS))
    again = sweep(net, *data, {"seed": [0, 1, 2]}, out=tmp_path, **SETTINGS)
    for run in again.runs:
        equal(run.result, fast_swamp(seeded(run.point["seed"]), *data, **run.point, **SETTINGS))


def test_a_snapshot_for_a_callback_that_needs_one(data):
    kept = {}

    def on_cycle(row, snapshot):
        kept[row["run"], row["cycle"]] = snapshot.masks

    found = sweep(net, *data, {"seed": [0]}, on_cycle=on_cycle, **SETTINGS)
    for name, mask in found.runs[0].result.masks.items():
        assert torch.equal(kept[found.runs[0].id, 1][name], mask)


def test_a_callback_stops_runs_of_a_comparison(data):
    """Methods that copy the layers of a stopped run are as short as it is."""
    methods = ["imp", "random"]
    found = compare(net, *data, methods, [0, 1], on_cycle=stop_seed_1, **SETTINGS | {"cycles": 2})
    assert found.errors == []
    for method in methods:
        cycles = {seed: [row["cycle"] for row in found.rows if (row["method"], row["seed"]) == (method, seed)]
                  for seed in (0, 1)}  # fmt: skip
        assert cycles == {0: [0, 1, 2], 1: [0, 1]}
