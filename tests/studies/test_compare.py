"""compare(): every number of a comparison equals that of the same run done alone."""

from __future__ import annotations

import csv
import json
import statistics

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swamp_fast import SwampConfig, compare, fast_swamp
from swamp_fast.cli import main
from swamp_fast.methods import METHODS, seeds_of
from swamp_fast.report import write_report
from swamp_fast.studies import packing, running
from swamp_fast.studies.comparison import summary_of

SETTINGS = {"particles": 2, "cycles": 2, "epochs": 1, "ticket_epochs": 1, "batch_size": 32, "progress": False}
SETTINGS |= {"engine": "eager", "precision": "float64"}
BASE = SwampConfig(**SETTINGS)
SEEDS = [0, 3]


def made() -> nn.Module:
    return networks.NETWORKS["residual"]()


def lane_by_lane(monkeypatch) -> None:
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (len(problems), "forced"))


@pytest.fixture(scope="module")
def compared(digits, tmp_path_factory):
    """A comparison of all methods, and its folder."""
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        lane_by_lane(monkeypatch)
        return compare(made, *digits, list(METHODS), SEEDS, val=0.2, out=out, **SETTINGS), out


def alone(method: str, seed: int, data, number: int = 0, **changes):
    own = seeds_of(METHODS[method], BASE, seed)[number]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own)
        model = made()
    config = BASE.replace(**METHODS[method].settings(BASE)).replace(seed=own, **changes)
    return fast_swamp(model, *data, val=0.2, config=config)


def rows_of(found, method: str, seed: int = 3) -> list[dict]:
    return [row for row in found.rows if row["method"] == method and row["seed"] == seed]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ensemble"])
def test_a_method_gives_what_it_gives_alone(method, compared, digits):
    layer_kept = compared[0].runs[method, 3][0].result.config.layer_kept
    found, every = alone(method, 3, digits, layer_kept=layer_kept), METHODS[method].every(BASE)
    rows = rows_of(compared[0], method)
    assert [row["cycle"] for row in rows] == [0, 1, 2]
    for row, there in zip(rows, found.history[::every], strict=True):
        for name in ("density", "accuracy", "loss"):
            assert row[name] == pytest.approx(there[name], abs=1e-10), name


def test_an_ensemble_is_the_mean_of_the_softmax(compared, digits):
    members = [alone("ensemble", 3, digits, number) for number in (0, 1)]
    assert not torch.equal(members[0].ticket["head.weight"], members[1].ticket["head.weight"])
    images, targets = digits[1]
    mean, std = (torch.tensor(members[0].standardise[name], dtype=torch.float64) for name in ("mean", "std"))
    inputs = (images.double() / 255 - mean) / std
    for row in rows_of(compared[0], "ensemble"):
        with torch.no_grad():
            together = sum(each.at(row["cycle"])[0](inputs).softmax(1) for each in members) / 2
        assert row["accuracy"] == float((together.argmax(1) == targets).double().mean())
        assert row["loss"] == pytest.approx(float(F.nll_loss(together.log(), targets)), abs=1e-10)


def test_costs(compared):
    """Particle-epochs are as computed by hand, for N = 2, two prunings, and trainings and a ticket of one epoch."""
    expected = {name: [3, 5, 7] for name in ("swamp", "swamp-sgd", "best-particle", "sms", "imp-long")}
    expected |= {name: [2, 3, 4] for name in ("imp", "imp+swa", "imp-swa-schedule", "random")}
    expected |= {"swamp+": [2, 4, 6], "imp-fine": [2, 4, 6], "ensemble": [4, 6, 8], "one-shot": [2, 3, 3]}
    for method, epochs in expected.items():
        rows, runs = rows_of(compared[0], method), compared[0].runs[method, 3]
        assert [row["particle_epochs"] for row in rows] == epochs, method
        cycles = runs[0].result.history
        taken = [cycles[0], cycles[-1]] if method == "one-shot" else cycles
        took = sum(row["seconds"] for row in taken) * (1 if method != "ensemble" else 0)
        took += sum(row["seconds"] for each in runs for row in each.result.history) * (method == "ensemble")
        assert rows[-1]["seconds"] == pytest.approx(took)
        assert rows[0]["seconds"] <= rows[-1]["seconds"]


def test_the_summary_and_what_matches(compared):
    found = compared[0]
    assert list(dict.fromkeys(row["method"] for row in found.summary)) == list(METHODS)
    for name, method in (("sgd", "imp"), ("swa", "imp+swa")):
        cycle_0 = [rows_of(found, method, seed)[0]["accuracy"] for seed in SEEDS]
        assert found.dense[name]["accuracy"] == statistics.fmean(cycle_0)
        assert found.dense[name]["seeds"] == 2
    for row in found.summary:
        each = [rows_of(found, row["method"], seed)[row["cycle"]] for seed in SEEDS]
        values = [one["accuracy"] for one in each]
        assert row["seeds"] == 2
        assert row["accuracy"] == statistics.fmean(values)
        assert row["accuracy_std"] == statistics.stdev(values)
        assert row["matching_sgd"] == (row["accuracy"] >= found.dense["sgd"]["accuracy"])
        assert row["matching_swa"] == (row["accuracy"] >= found.dense["swa"]["accuracy"])
        assert row["particle_epochs"] == each[0]["particle_epochs"]
    assert next(row["matching_sgd"] for row in found.summary if row["method"] == "imp")  # equal also matches
    assert {row["matching_sgd"] for row in found.summary} == {True, False}


def test_differences_are_paired_by_seed(compared):
    from scipy import stats

    found = compared[0]
    assert len(found.paired) == 3 * (len(METHODS) - 1)
    for row in found.paired:
        ours, theirs = (
            [rows_of(found, method, seed)[row["cycle"]]["accuracy"] for seed in SEEDS]
            for method in (row["method"], "imp")
        )
        test = stats.ttest_rel(ours, theirs)
        assert row["difference"] == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs))
        if statistics.stdev([a - b for a, b in zip(ours, theirs, strict=True)]) > 0:
            assert [row["low"], row["high"]] == pytest.approx(list(test.confidence_interval(0.95)))
        else:
            assert row["low"] == row["difference"] == row["high"]
        assert row["density"] == rows_of(found, "imp")[row["cycle"]]["density"]


def test_what_can_share_a_step_does_and_nothing_is_done_twice(digits, monkeypatch, tmp_path):
    lane_by_lane(monkeypatch)
    sizes = []
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (sizes.append(len(problems)) or 9, "forced"))
    methods = ["imp", "imp+swa", "imp-swa-schedule", "imp-fine", "ensemble", "one-shot", "random", "swamp", "sms"]
    settings = SETTINGS | {"cycles": 1}
    first = compare(made, *digits, methods, [0], out=tmp_path, **settings)
    assert sizes == [6, 2, 1]  # the first run of the ensemble is that of imp; random starts after imp has finished
    assert first.runs["ensemble", 0][0] is first.runs["imp", 0][0]
    imp, random = (first.runs[method, 0][0].result for method in ("imp", "random"))
    for name, mask in imp.masks.items():
        assert mask.sum() == random.masks[name].sum()
    sizes.clear()
    again = compare(made, *digits, methods, [0], out=tmp_path, **settings)
    assert sizes == []
    assert again.to_dict() == first.to_dict()
    assert all(row["low"] is None for row in again.paired)  # one seed


def test_dense_references_of_their_own(digits, monkeypatch):
    """If imp and imp+swa aren't compared, only their dense cycles are run, as references."""
    lane_by_lane(monkeypatch)
    found = compare(made, *digits, ["swamp"], [0], baseline="swamp", target_density=0.7, **without("cycles"))
    both = compare(made, *digits, ["swamp", "imp", "imp+swa"], [0], target_density=0.7, **without("cycles"))
    assert found.dense == both.dense
    assert {row["method"] for row in found.rows} == {"swamp"}
    assert len(found.rows) == 3
    assert found.paired == []


def without(name: str) -> dict:
    return {key: value for key, value in SETTINGS.items() if key != name}


def test_files_table_and_figure(compared):
    found, out = compared
    there = json.loads((out / "comparison.json").read_text())
    assert there == json.loads(json.dumps(found.to_dict()))
    assert set(there) == {"baseline", "rows", "summary", "paired", "dense", "errors"}
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.rows) == len(METHODS) * 2 * 3
    assert float(rows[5]["accuracy"]) == found.rows[5]["accuracy"]
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (out / "comparison.svg").read_text()
    lines = found.table().splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert "minus imp" in lines[0]
    row = next(row for row in found.summary if row["method"] == "swamp" and row["cycle"] == 2)
    assert f"{row['accuracy'] * 100:.2f} ± {row['accuracy_std'] * 100:.2f} %" in lines[2]


def test_a_run_that_fails_is_reported_and_the_others_stay(digits, monkeypatch):
    lane_by_lane(monkeypatch)

    original = running.swamp

    def swamp(problem, engine, run):
        if problem.config.mask_score == "random":
            raise FloatingPointError("no luck")
        return (yield from original(problem, engine, run))

    monkeypatch.setattr(running, "swamp", swamp)
    found = compare(made, *digits, ["imp", "random"], [0], **SETTINGS)
    assert found.errors == [{"method": "random", "seed": 0, "error": "FloatingPointError: no luck"}]
    assert {row["method"] for row in found.rows} == {"imp"}


def test_without_test_data(digits, monkeypatch):
    lane_by_lane(monkeypatch)
    found = compare(made, digits[0], None, ["imp", "ensemble"], [0], **SETTINGS)
    assert all(row["accuracy"] is None and row["loss"] is None for row in found.rows)
    assert all(row["matching_sgd"] is None for row in found.summary)
    assert found.paired == []
    assert "–" in found.table()


class Noisy(nn.Module):
    """A model that draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(F.relu(self.hidden(x.flatten(1) + 0.1 * torch.randn(len(x), 64))))


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=torch.arange(1.0, 11.0), reduction="none")


def test_an_ensemble_with_a_loss_of_ones_own_and_a_model_that_draws(digits):
    """The ensemble has no loss, its draws are reproducible, and torch's global generator is left unchanged."""
    settings = SETTINGS | {"cycles": 0, "precision": "float32"}
    before = torch.get_rng_state()
    found = [
        compare(Noisy, *digits, ["imp", "ensemble"], np.arange(2), loss=weighted, **settings).rows for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    for ours, theirs in zip(*found, strict=True):
        assert ours["accuracy"] == theirs["accuracy"] is not None
        assert (ours["loss"] is None) == (ours["method"] == "ensemble")


def test_matching_is_over_the_seeds_that_both_have():
    """A seed that only the dense reference has changes its mean, but must not affect whether a method matches."""
    row = {"cycle": 0, "density": 1.0, "loss": None, "particle_epochs": 1, "seconds": 1.0}
    dense = {seed: {"accuracy": accuracy} for seed, accuracy in enumerate((0.9, 0.9, 0.6))}
    rows = [{"method": "swamp", "seed": seed, "accuracy": 0.85, **row} for seed in (0, 1)]
    alone = [{"method": "sms", "seed": 7, "accuracy": 0.85, **row}]
    found = summary_of(rows + alone, {"sgd": dense, "swa": {}})
    assert [(each["matching_sgd"], each["matching_swa"]) for each in found] == [(False, None), (None, None)]


def test_regression_has_losses(tmp_path):
    inputs = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    data = inputs, inputs.sum(1, keepdim=True)

    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))

    def squares(outputs, targets):
        return (outputs - targets).square().mean(1)

    settings = SETTINGS | {"cycles": 1, "lr": 0.01, "swa_lr": 0.005}
    found = compare(made, data, data, ["imp", "swamp"], SEEDS, loss=squares, out=tmp_path, **settings)
    losses = [row["loss"] for row in found.rows if row["method"] == "swamp" and row["cycle"] == 1]
    shown = f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    assert shown in found.table()
    assert "loss" in found.table().splitlines()[0]
    assert shown in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("arguments", "changes", "text"),
    [
        ((["imp", "snip"], [0]), {}, '"snip" is not a known method; known are swamp, swamp\\+, imp'),
        ((["imp", "imp"], [0]), {}, "`methods` must be a list with at least one entry and no duplicates"),
        ((["imp"], []), {}, "`seeds` must be a list with at least one entry and no duplicates"),
        ((["swamp"], [0]), {}, '`baseline` must be one of the methods, swamp; got "imp"'),
        ((["imp"], [0]), {"particles": (1, 2, 2)}, "`particles` must be one number for a comparison"),
        (
            (["imp"], [0]),
            {"average": "none"},
            "`average` is set by each method, so it can't be 'none' for all; leave it at its default 'swa'",
        ),
        ((["imp", "best-particle"], [0]), {}, '`combine` = "best" chooses a particle on validation data'),
    ],
)
def test_what_is_refused(arguments, changes, text, digits):
    with pytest.raises(ValueError, match=text):
        compare(made, *digits, *arguments, **SETTINGS | changes)


@pytest.mark.parametrize("seed", [True, 2.0, float("nan"), "0"])
def test_seeds_are_ints(seed, digits):
    with pytest.raises(TypeError, match="`seeds` must be int, got"):
        compare(made, *digits, ["imp"], [seed], **SETTINGS)


def test_the_command_line(tmp_path, capsys):
    file = tmp_path / "compare.toml"
    text = 'model = "mlp"\ndata = "digits"\nval = 0.1\nmethods = ["imp", "swamp"]\nseeds = [0, 1]\n'
    settings = (
        "[settings]\nparticles = 2\ncycles = 1\nepochs = 1\nticket_epochs = 0\nprogress = false\nbatch_size = 512\n"
    )
    settings += 'engine = "fused"\n'
    file.write_text(text + f'out = "{tmp_path / "out"}"\n' + settings)
    assert main(["compare", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:3] == ["method", "density", "seeds"]
    assert "80.00 %" in printed
    assert (tmp_path / "out" / "comparison.json").exists()
    file.write_text('model = "mlp"\ndata = "digits"\n' + settings)
    assert main(["compare", str(file)]) == 2
    assert "lacks methods, seeds; known: model, data, test" in capsys.readouterr().err
    file.write_text(text + "grid = 3\n" + settings)
    assert main(["compare", str(file)]) == 2
    assert "unknown `grid`" in capsys.readouterr().err
