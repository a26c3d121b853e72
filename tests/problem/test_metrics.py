"""Metrics of the user's: their values, how `select_by` uses them, where they are shown, and what is refused."""

from __future__ import annotations

import csv
import math

import networks
import pytest
import torch
import torch.nn.functional as F
from equality import same
from torch import nn

from swamp_fast import SwampResult, compare, fast_swamp, naive_swamp, sweep
from swamp_fast.data import samples
from swamp_fast.data.labels import Labels
from swamp_fast.problem.metrics import Meter, checked_metrics, ensemble_outputs, goodness, keys_of, names_in
from swamp_fast.report.write import write_report

SETTINGS = {"batch_size": 32, "epochs": 4, "ticket_epochs": 1, "particles": 3, "cycles": 1, "progress": False}
DOUBLE = SETTINGS | {"precision": "float64"}
DRIVERS = {
    "naive": (naive_swamp, {}),
    "eager": (fast_swamp, {"engine": "eager"}),
    "fused": (fast_swamp, {"engine": "fused"}),
}
ALL = pytest.mark.parametrize("driver", DRIVERS)


def right(outputs, targets):
    return outputs.argmax(1) == targets


def nll(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


nll.higher_is_better = False


def wrong_way(outputs, targets):
    return right(outputs, targets)


wrong_way.higher_is_better = False


class Right:
    """The accuracy as an object that collects batches, as those of torchmetrics do."""

    higher_is_better = True

    def __init__(self):
        self.reset()

    def update(self, outputs, targets):
        self.right += int(right(outputs, targets).sum())
        self.seen += len(targets)

    def compute(self):
        return torch.tensor(self.right / self.seen)

    def reset(self):
        self.right = self.seen = 0


class Network(nn.Module):
    """A small network that all engines can train."""

    def __init__(self, outputs: int = 10):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 16), nn.Linear(16, outputs)

    def forward(self, x):
        return self.head(F.relu(self.hidden(x.flatten(1))))


def run(driver, digits, model=None, **settings):
    function, own = DRIVERS[driver]
    return function(model or networks.build("residual"), *digits, **{**DOUBLE, "val": 0.25, **own, **settings})


@ALL
def test_the_accuracy_and_the_loss_as_metrics(driver, digits):
    metrics = {"right": right, "collected": Right(), "nll": nll}
    for row in run(driver, digits, metrics=metrics).history:
        for name in ("right", "collected"):
            assert row[name] == pytest.approx(row["accuracy"], abs=1e-7)
            assert row[f"particle_{name}"] == pytest.approx(row["particle_accuracy"], abs=1e-7)
            assert row[f"ensemble_{name}"] == pytest.approx(row["ensemble_accuracy"], abs=1e-7)
            assert row[f"val_{name}"] == pytest.approx(row["val_accuracy"], abs=1e-7)
            assert sum(row[f"val_particle_{name}"]) / 3 == pytest.approx(row["val_mean_accuracy"], abs=1e-7)
        assert row["nll"] == pytest.approx(row["loss"], abs=1e-12)
        assert row["particle_nll"] == pytest.approx(row["particle_loss"], abs=1e-12)
        assert row["ensemble_nll"] <= sum(row["particle_nll"]) / 3  # by Jensen's inequality
        assert names_in(row) == [*metrics]
    assert metrics["collected"].seen == 0  # copies of it were used


@ALL
def test_the_error_of_a_regression_by_hand(driver):
    inputs = torch.randn(96, 64)
    targets = inputs[:, :2] * 2 + 1
    data = (inputs[:64], targets[:64]), (inputs[64:], targets[64:])

    def mae(outputs, targets):
        return (outputs - targets).abs().mean(1)

    def mse(outputs, targets):
        return (outputs - targets).square().mean(1)

    result = run(driver, data, Network(2), loss=mse, metrics={"mae": mae}, keep_particles=True, lr=0.01)
    row, last = result.history[-1], result.model.double()
    x, y = inputs[64:].double(), targets[64:].double()
    with torch.no_grad():
        outputs = [
            torch.func.functional_call(last, {name: each[number] for name, each in result.particles.items()}, x)
            for number in range(3)
        ]
        average = last(x)
    assert row["mae"] == pytest.approx(float((average - y).abs().mean()), abs=1e-7)
    assert row["particle_mae"] == pytest.approx([float((each - y).abs().mean()) for each in outputs], abs=1e-7)
    assert row["ensemble_mae"] == pytest.approx(float((sum(outputs) / 3 - y).abs().mean()), abs=1e-7)
    assert row["accuracy"] is None


def test_the_ensemble_has_the_mean_softmax():
    outputs = [torch.randn(5, 4, 3, dtype=torch.float64) for _ in range(3)]
    together = ensemble_outputs(Labels(4), outputs, torch.float64)
    torch.testing.assert_close(together.softmax(1), sum(each.softmax(1) for each in outputs) / 3)
    torch.testing.assert_close(together.exp(), together.softmax(1))
    certain = torch.tensor([[0.0, -1e5]])
    assert ensemble_outputs(Labels(2), [certain], torch.float32).isfinite().all()
    tree = [{"a": torch.full((2,), float(number)), "b": torch.tensor([number]), "c": "text"} for number in (1, 3)]
    mean = ensemble_outputs("no labels", tree, torch.float32)
    assert mean["a"].tolist() == [2.0, 2.0]
    assert mean["b"].tolist() == [1]
    assert mean["c"] == "text"


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("settings", [{}, {"combine": "best", "select_by": "nll"}], ids=["mean", "best"])
def test_engines_and_the_naive_loop_agree(engine, settings, digits):
    settings = {"metrics": {"nll": nll, "right": Right()}, "cycles": 2, "keep_particles": True, **settings}
    results = [run(driver, digits, **settings) for driver in (engine, "naive")]
    same(*results)


@ALL
@pytest.mark.parametrize(("select_by", "wins"), [("right", max), ("wrong_way", min), ("nll", min), ("loss", min)])
def test_select_by_decides_which_particle_is_best(driver, select_by, wins, digits):
    metrics = {"right": right, "wrong_way": wrong_way, "nll": nll}
    settings = {"metrics": metrics, "select_by": select_by, "combine": "best", "lr": 0.02}
    name = "nll" if select_by == "loss" else select_by
    for row in run(driver, digits, Network(), **settings).history:
        values = row[f"val_particle_{name}"]
        best = values.index(wins(values))
        assert row[f"val_{name}"] == wins(values)
        assert row["accuracy"] == row["particle_accuracy"][best] == row["best_accuracy"]
        assert row["loss"] == row["particle_loss"][best]
        assert row["nll"] == row["particle_nll"][best]


def test_nan_is_never_the_best():
    assert goodness([math.nan, 1.0, 2.0], True) == [-math.inf, 1.0, 2.0]
    assert goodness([math.nan, 1.0, 2.0], False) == [-math.inf, -1.0, -2.0]


def test_a_split_that_is_missing_has_none(digits):
    row = fast_swamp(Network(), *digits, **SETTINGS, metrics={"nll": nll}).history[-1]
    assert [row[key] is None for key in keys_of("nll")] == [False, False, False, True, True, True]
    row = fast_swamp(Network(), digits[0], val=0.2, **SETTINGS, metrics={"nll": nll}).history[-1]
    assert [row[key] is None for key in keys_of("nll")] == [True, True, True, False, False, False]
    assert set(row) - set(keys_of("nll")) == set(fast_swamp(Network(), digits[0], **SETTINGS).history[-1])


def test_metrics_get_copies(digits):
    def spoils(outputs, targets):
        targets.zero_()
        return outputs.zero_()[:, 0] + torch.rand(())

    class Keeps(Right):
        """Collects outputs, which an engine may overwrite in its next batch."""

        def reset(self):
            self.kept = []

        def update(self, outputs, targets):
            self.kept.append((outputs, targets))

        def compute(self):
            return float(torch.cat([right(*batch) for batch in self.kept]).double().mean())

    with_metrics = {"spoils": spoils, "keeps": Keeps(), "right": right}
    torch.manual_seed(0)
    observed = fast_swamp(Network(), *digits, **SETTINGS, metrics=with_metrics, seed=1, engine="fused")
    for row in observed.history:
        assert row["keeps"] == pytest.approx(row["accuracy"])
        assert row["right"] == pytest.approx(row["accuracy"])
    torch.manual_seed(0)
    plain = fast_swamp(Network(), *digits, **SETTINGS, seed=1, engine="fused")
    assert plain == observed


def test_a_copy_of_an_object_never_waits_for_other_processes():
    class Gathers(Right):
        def __init__(self):
            super().__init__()
            self.distributed_available_fn = lambda: True

    mine = Gathers()
    assert Meter("m", mine, torch.device("cpu")).metric.distributed_available_fn is None
    assert mine.distributed_available_fn()


class Fails(Right):
    def compute(self):
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("metrics", "error", "text"),
    [
        ([right], TypeError, r"`metrics` must be a dict from names to metrics, got list\."),
        ({"": right}, TypeError, r"`metrics`: each name must be a printable text that is not empty, got ''\."),
        ({3: right}, TypeError, r"each name must be a printable text that is not empty, got 3\."),
        ({"a\nb": right}, TypeError, r"each name must be a printable text"),
        ({"loss": right}, ValueError, r'the name "loss" would collide with other keys of the history'),
        ({"val_right": right}, ValueError, r'the name "val_right" would collide'),
        ({"right_std": right}, ValueError, r'the name "right_std" would collide'),
        ({"lr": right}, ValueError, r'the name "lr" would collide'),
        ({"right": 3}, TypeError, r'"right" must be a function .* or an object with update, .*; got int\.'),
        ({"right": Right}, TypeError, r'"right" must be an instance, got the class Right; call it first\.'),
        ({"mean": lambda o, t: right(o, t).double().mean()}, ValueError, r'"mean" must return one number per sample'),
        ({"r": lambda o, t: 3.0}, ValueError, r'"r" must return one number per sample, \[8\], got float'),
        ({"r": lambda o, t: o}, ValueError, r"must return one number per sample, \[8\], got \[8, 10\]"),
        ({"r": lambda o, t: torch.zeros(8)}, ValueError, r"one number per sample, \[6\], got \[8\]"),
        ({"r": lambda o, t: o[:, 0] * math.nan}, ValueError, r'"r" is NaN for the first samples of `test`'),
        ({"r": lambda o, t: o.no_such_thing}, ValueError, r'"r" can\'t take outputs \[8, 10\].* of `test`'),
        ({"r": Fails()}, ValueError, r'"r"\.compute\(\) must return one number, got \[3\]'),
    ],
)
@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
def test_what_is_refused_before_training(function, metrics, error, text, digits):
    steps = []
    settings = {**SETTINGS, "epochs": 1, "ticket_epochs": 0, "cycles": 0, "on_epoch": steps.append}
    with pytest.raises(error, match=text):
        function(Network(), *digits, metrics=metrics, **settings)
    assert not steps


def test_select_by_is_checked_before_training(digits):
    def refused(text, data=digits, **settings):
        with pytest.raises(ValueError, match=text):
            fast_swamp(Network(), *data, **{**SETTINGS, "val": 0.2, "metrics": {"nll": nll}, **settings})

    refused(r'`select_by` must be one of "auto", "accuracy", "loss", "nll"; got "f1"\.', select_by="f1")
    refused(r'`select_by` = "nll" chooses a particle on validation data, but `val` is None', select_by="nll", val=None)
    (inputs, labels), _ = digits
    soft = F.one_hot(labels, 10).float()
    refused(r'`select_by` = "accuracy", but val has no accuracies', [(inputs, soft), None], select_by="accuracy")

    class Undecided(Right):
        higher_is_better = None

    refused("doesn't say whether higher", metrics={"r": Undecided()}, select_by="r")


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
def test_the_accuracy_of_no_label_selects_nothing(function, digits, monkeypatch):
    """Streamed labels aren't known beforehand, so it shows only in evaluation that none counts."""
    monkeypatch.setattr(samples, "fits", lambda *_: False)
    (inputs, labels), _ = digits
    train, val = (inputs.float(), labels), (torch.zeros(20, 1, 8, 8), torch.full((20,), -100))
    settings = SETTINGS | {"ticket_epochs": 0, "cycles": 0, "combine": "best", "select_by": "accuracy"}
    with pytest.raises(ValueError, match=r'`select_by` = "accuracy", but no label of the validation data counts'):
        function(Network(), train, val=val, loss=nn.CrossEntropyLoss(reduction="none"), **settings)


def test_names_can_not_collide(digits):
    row = fast_swamp(Network(), *digits, val=0.2, **SETTINGS).history[-1]
    for key in (*row, *SETTINGS, "auto", "id", "error"):
        with pytest.raises(ValueError, match="would collide"):
            checked_metrics({key: right})


def test_only_the_metric_of_select_by_is_part_of_a_run(digits, tmp_path):
    def started(**settings):
        settings = {**SETTINGS, "ticket_epochs": 0, "epochs": 1, "val": 0.2, "run_dir": tmp_path, **settings}
        torch.manual_seed(0)
        return fast_swamp(Network(), *digits, **settings)

    first = started(metrics={"nll": nll, "right": right}, select_by="nll")
    assert started(metrics={"nll": nll}, select_by="nll", on_epoch=print, on_cycle=print) == first
    with pytest.raises(ValueError, match=r"holds another run: the metric of select_by differs\."):
        started(metrics={"nll": wrong_way}, select_by="nll")
    with pytest.raises(ValueError, match="select_by was 'nll', is 'loss'"):
        started(select_by="loss")
    longer = started(metrics={"nll": nll}, select_by="nll", cycles=2)
    assert [names_in(row) for row in longer.history] == [["nll", "right"]] * 2 + [["nll"]]


@ALL
def test_a_resumed_run_has_the_same_bits(driver, digits, tmp_path):
    def interrupted(row):
        if row["cycle"] == 1:
            raise ZeroDivisionError

    settings = {"metrics": {"nll": nll, "right": Right()}, "select_by": "nll", "combine": "best", "cycles": 3}
    whole = run(driver, digits, **settings)
    with pytest.raises(ZeroDivisionError):
        run(driver, digits, run_dir=tmp_path, on_cycle=interrupted, **settings)
    resumed = run(driver, digits, run_dir=tmp_path, **settings)
    assert resumed == whole
    same(resumed, whole, 0)
    same(SwampResult.load(tmp_path, networks.build("residual")), whole, 0)


def test_they_stand_wherever_scores_do(digits, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = SETTINGS | {"progress": True, "tensorboard": True, "run_dir": tmp_path, "val": 0.2}
    row = fast_swamp(Network(), *digits, metrics={"nll": nll}, **settings).history[-1]
    assert f"  test nll {row['nll']:.4g}" in capsys.readouterr().err
    assert SwampResult.load(tmp_path).history[-1] == row
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag, value in {
        "nll/average": row["nll"],
        "nll/particle 1": row["particle_nll"][1],
        "nll/ensemble": row["ensemble_nll"],
        "val_nll/average": row["val_nll"],
    }.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6)
    text = write_report(tmp_path).read_text()
    assert "metric nll" in text
    assert f"{row['nll']:.4g}" in text
    only_val = fast_swamp(Network(), digits[0], metrics={"nll": nll}, val=0.2, **SETTINGS | {"progress": True})
    assert f"  val nll {only_val.history[-1]['val_nll']:.4g}" in capsys.readouterr().err


def test_what_is_not_finite_is_a_warning(digits):
    class Bad(Right):
        def compute(self):
            return math.inf

    with pytest.warns(UserWarning, match=r"cycle 0: bad, particle_bad, ensemble_bad are not finite"):
        result = fast_swamp(Network(), *digits, metrics={"bad": Bad()}, **SETTINGS)
    assert any("bad" in text for text in result.history[0]["warnings"])


def test_tables_of_a_sweep_have_their_columns(digits, tmp_path):
    swept = sweep(Network(), *digits, {"seed": [0, 1]}, out=tmp_path, metrics={"nll": nll}, val=0.2, **SETTINGS)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    histories = [row for run in swept.runs for row in run.result.history]
    for key in ("nll", "ensemble_nll", "val_nll", "val_ensemble_nll"):
        assert [float(row[key]) for row in rows] == pytest.approx([row[key] for row in histories])
    last = swept.summary()[-1]
    values = [run.result.history[-1]["nll"] for run in swept.runs]
    assert last["nll"] == pytest.approx(sum(values) / 2)
    assert last["nll_std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert f"{last['nll']:.4f}" in write_report(tmp_path).read_text()


def test_a_comparison_has_their_columns(digits):
    methods, settings = ["imp", "ensemble"], SETTINGS | {"epochs": 1, "particles": 2}
    found = compare(Network(), *digits, methods, [0, 1], metrics={"nll": nll, "right": Right()}, **settings)
    for row in found.rows:
        assert row["nll"] == pytest.approx(row["loss"], abs=1e-5)
        assert row["right"] == pytest.approx(row["accuracy"], abs=1e-6)
    for row in found.summary:
        assert row["nll"] == pytest.approx(row["loss"], abs=1e-5)
        assert row["nll_std"] == pytest.approx(row["loss_std"], abs=1e-5)


def test_a_metric_that_fails_on_the_last_batch_is_refused_before_training(digits):
    """64 test samples in batches of 24 leave a last one of 16."""

    def fails(outputs, targets):
        return outputs[:, 0] / (len(outputs) != 16) if len(outputs) != 16 else outputs[:-1, 0]

    with pytest.raises(ValueError, match='`metrics`: "fails"'):
        fast_swamp(networks.build("tied"), *digits, metrics={"fails": fails}, **SETTINGS | {"batch_size": 24})
    with pytest.raises(ValueError, match="can't take outputs .* division by zero"):
        fast_swamp(networks.build("tied"), *digits, metrics={"fails": lambda outputs, targets: 1 / 0}, **SETTINGS)


def test_the_direction_of_the_metric_that_selects_counts(digits, tmp_path):
    def wrong(outputs, targets):
        return (outputs.argmax(1) != targets).double()

    def train():
        arguments = {"metrics": {"wrong": wrong}, "select_by": "wrong", "combine": "best", "val": 0.2}
        return fast_swamp(networks.build("tied"), *digits, run_dir=tmp_path, **arguments, **SETTINGS)

    train()
    wrong.higher_is_better = False
    with pytest.raises(ValueError, match="the metric of select_by differs"):
        train()
