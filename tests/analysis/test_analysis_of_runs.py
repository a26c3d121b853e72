"""Analyses of whole runs, from Python and from the command line: tickets, consecutive cycles, `analyze`."""

from __future__ import annotations

import doctest
import json
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from networks import Product, ResidualCNN
from torch import Tensor, nn

import swamp_fast.analysis
from swamp_fast import SwampResult, fast_swamp
from swamp_fast.analysis import (
    Analysis,
    TicketStability,
    analyze,
    averages,
    consecutive,
    differing,
    loss_barrier,
    mask_overlap,
    particles,
    ticket_stability,
)
from swamp_fast.cli import main
from swamp_fast.common.format import percent
from swamp_fast.models import build_model


def test_ticket_stability(digits):
    train, _ = digits
    small = {"epochs": 2, "batch_size": 40, "progress": False, "engine": "eager", "points": 3}
    found = ticket_stability(ResidualCNN(4), train, 0.25, [1, 0], **small)
    assert found.candidates == [0, 1]
    assert [path.train_samples for path in found.paths] == [120, 120]
    assert found.barriers == [path.barrier("test_error", "mean") for path in found.paths]
    assert found.errors == [sum(path.of("test_error")[::2]) / 2 for path in found.paths]
    for epsilon, wanted in ((1.1, 0), (0.0, None)):
        assert swamp_fast.analysis.TicketStability([0, 1], found.paths, epsilon).recommended == wanted
    # The children are the particles of a run with two particles.
    run = {name: small[name] for name in ("epochs", "batch_size", "progress", "engine")}
    torch.manual_seed(0)
    model = ResidualCNN(4)
    torch.manual_seed(0)
    again = ticket_stability(ResidualCNN(4), train, 0.25, [1], **small)
    result = fast_swamp(model, train, val=0.25, particles=2, cycles=0, keep_particles=True, ticket_epochs=1, **run)
    on = Analysis(model, train, val=0.25, **run)
    assert again.paths[0].train_loss == pytest.approx(
        loss_barrier(on, *particles(result), points=3).train_loss, rel=1e-5
    )  # in float32, by whichever execution mode is faster
    with pytest.raises(ValueError, match="chosen on validation data"):
        ticket_stability(model, train, None, [0])


def test_the_ticket_from_which_on_barriers_are_low():
    """A candidate is not stable if a later one is above epsilon, and untrained children cause a warning."""

    def tickets(barriers: list[float], errors: list[float]) -> TicketStability:
        paths = [
            swamp_fast.analysis.Path(
                t=[0, 0.5, 1], train_loss=[0.0] * 3, train_error=None, test_loss=None, train_samples=1,
                test_error=[error, error + barrier, error],
            )
            for barrier, error in zip(barriers, errors, strict=True)
        ]  # fmt: skip
        return TicketStability([0, 2, 5], paths, 0.02)

    found = tickets([0.0, 0.3, 0.01], [0.9, 0.2, 0.1])
    assert (found.recommended, found.warning) == (5, None)
    assert found.table().splitlines()[2].split() == ["2", "30.00", "%", "20.00", "%"]
    assert tickets([0.0, 0.01, 0.3], [0.1] * 3).recommended is None
    assert tickets([0.01, 0.01, 0.01], [0.14, 0.1, 0.1]).warning is None
    found = tickets([0.01, 0.01, 0.01], [0.9, 0.1, 0.1])
    assert found.recommended == 2  # never what the warning warns of
    assert "T0 = 0 is stable, but its children have an error 80.0 points above" in found.warning
    assert "warning: T0 = 0 is stable" in found.table()


def test_the_ticket_needs_a_classification():
    inputs = torch.randn(12, 5)
    regression = {"loss": lambda outputs, targets: (outputs - targets).square().mean(1), "prunable": "layer.weight"}
    with (
        mock.patch("swamp_fast.analysis.ticket_stability.fast_swamp", side_effect=AssertionError("trained")),
        pytest.raises(ValueError, match="error barriers need classification"),
    ):
        ticket_stability(Product(5), (inputs, torch.zeros(12, 1)), 0.25, [0], batch_size=3, **regression)


def test_runs_of_all_methods_can_be_analysed(digits):
    """Analyses and ticket searches accept any setting by which runs make masks or choose a particle."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    small = {"epochs": 1, "ticket_epochs": 0, "batch_size": 40, "progress": False, "engine": "eager"}
    random = {"cycles": 1, "particles": 1, "mask_score": "random", "layer_kept": [[400]], "combine": "best"}
    result = fast_swamp(model, *digits, val=0.25, **small, **random)
    on = Analysis(model, *digits, config=result.config, standardise=result.standardise)
    assert on.evaluate([result.state_dict]).test_loss == pytest.approx([result.history[-1]["loss"]], rel=1e-5)
    with (
        mock.patch("swamp_fast.analysis.ticket_stability.fast_swamp", side_effect=InterruptedError("trained")),
        pytest.raises(InterruptedError, match="trained"),
    ):
        ticket_stability(model, digits[0], 0.25, [0], config=result.config)


def test_the_ticket_on_the_command_line(capsys):
    few = ["--epochs", "1", "--points", "3", "--samples", "64", "--no-progress", "--engine", "eager"]
    assert main(["ticket", "--model", "mlp", "--data", "digits", "--val", "0.1", "--candidates", "0", *few]) == 0
    head, line, recommended, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["T0", "barrier,", "error", "children", "err"]
    assert line.split()[0] == "0"
    assert recommended.startswith("recommended: ")


def test_consecutive_cycles_and_what_is_refused(digits):
    train, test = digits
    run = {"epochs": 1, "ticket_epochs": 0, "batch_size": 40, "progress": False, "particles": 1}
    model = ResidualCNN(4)
    result = fast_swamp(model, train, test, cycles=2, **run)
    on = Analysis(model, train, test, config=result.config)
    found = consecutive(on, result, points=3)
    assert len(found) == 2
    assert found[1].test_loss[0] == pytest.approx(result.history[1]["loss"], rel=1e-4)
    assert found[1].test_loss[2] == pytest.approx(result.history[2]["loss"], rel=1e-4)
    assert 1 - found[1].test_error[2] == pytest.approx(result.history[2]["accuracy"], abs=0.02)
    assert next(int(masks["conv.weight"].sum()) for _, masks in averages(result)) == 8 * 4 * 9 // 2
    with pytest.raises(ValueError, match="keep_particles=True"):
        particles(result)


def check_analysis(found: dict[str, Any]) -> None:
    """Check the content of analysis.json for a run of two cycles, analysed with few points, probes and mixtures."""
    scores = ["train_loss", "train_error", "test_loss", "test_error"]
    assert found["about"]["train_samples"] == 256
    assert found["about"]["of_training_samples"] == 1294
    (path,) = found["consecutive"]
    assert (path["from"], path["to"], path["t"]) == (0, 1, [0, 0.5, 1])
    assert [len(path[what]) for what in scores] == [3] * 4
    assert set(path["barriers"]) == set(scores)
    assert all(set(each) == {"max", "mean", "line"} for each in path["barriers"].values())
    together = found["particles"]
    assert (together["cycle"], together["over"], len(together["names"])) == (1, "max", 3)
    assert [len(together["matrix"][what]) for what in scores] == [3] * 4
    for each in found["hessian"]:
        assert {"cycle", "density", "trace", "trace_half_width", "scaled", "scaled_half_width", "probes"} <= set(each)
        assert {"trace", "norm", "kept"} <= set(each["layers"]["convs.1.weight"])
    assert [each["density"] for each in found["hessian"]] == pytest.approx([1, 0.8], rel=1e-3)
    assert len(found["hull"]["mixtures"]) == len(found["hull"]["test_error"]) == 2
    assert len(found["hull"]["corners"]["train_loss"]) == 3
    assert [len(found["plane"][name]) for name in ("x", "y", "points", "names", "train_loss")] == [2, 2, 3, 3, 2]
    assert [set(each) for each in found["masks"]] == [{"cycle", "layers", "dead_in", "dead_out"}] * 2
    assert found["cost"][1]["flops"] < found["cost"][0]["flops"] == found["cost"][0]["dense_flops"]
    assert found["cost"][1]["sparse_ms"] > 0
    assert set(found["ensemble"]["single"]) == {"accuracy", "nll", "ece"}


def test_analyze_on_the_command_line(tmp_path, capsys):
    out = str(tmp_path / "run")
    settings = ["--cycles", "1", "--epochs", "1", "--ticket-epochs", "0", "--particles", "3", "--no-progress"]
    common = ["--model", "small_cnn", "--data", "digits", "--val", "0.1"]
    assert main(["run", *common, "--out", out, "--keep-particles", *settings]) == 0
    capsys.readouterr()
    few = ["--points", "3", "--probes", "2", "--mixtures", "2", "--size", "2", "--repeats", "1", "--samples", "256"]
    assert main(["analyze", out, *common, *few]) == 0
    shown = capsys.readouterr()
    assert len([line for line in shown.out.splitlines() if line.split()[:1] in (["0"], ["1"])]) == 2
    assert "on 256 of 1,294 training samples" in shown.out
    assert not shown.err
    check_analysis(json.loads((tmp_path / "run" / "analysis.json").read_text()))
    # If the data differ from the run's, the analysis is refused; --anyway allows it, with a note. Sizes of 0 leave
    # analyses out.
    less = ["--probes", "0", "--mixtures", "0", "--size", "0", "--repeats", "0", "--points", "3", "--samples", "64"]
    before = (tmp_path / "run" / "analysis.json").read_bytes()
    other = ["analyze", out, "--model", "small_cnn", "--data", "digits", *less]
    assert main(other) == 2
    assert "the train, val data differ from the run's" in capsys.readouterr().err
    assert (tmp_path / "run" / "analysis.json").read_bytes() == before
    assert main([*other, "--anyway"]) == 0
    assert "the train, val data differ from the run's" in capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert (found["hessian"], found["hull"], found["plane"], found["cost"][0]["sparse_ms"]) == ([], None, None, None)
    # The analysis compares with another run.
    two = str(tmp_path / "two")
    assert (
        main(
            ["run", *common, "--out", two, "--seed", "0", *("--average", "none"), *settings[:-2], "1", "--no-progress"]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["analyze", out, *common, *less, "--against", two]) == 0
    assert "against two, cycle 1: IoU of the masks 0." in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    results = [SwampResult.load(each) for each in (out, two)]
    both = mask_overlap(*(each.masks for each in results))
    first, second = found["against"]["overlap"]
    assert (found["against"]["run"], first["iou"], first["hamming"]) == ("two", 1, 0)
    assert {name: value for name, value in second.items() if name not in ("cycle", "layers")} == pytest.approx(
        {name: getattr(both, name) for name in ("iou", "hamming", "density_a", "density_b")}
    )
    assert second["layers"] == pytest.approx({name: each.iou for name, each in both.layers.items()})
    on = Analysis(build_model("small_cnn", 1, 8, 8, 10), "digits", val=0.1, config=results[0].config, samples=64)
    path = loss_barrier(on, *(each.state_dict for each in results), points=3)
    assert [each["cycle"] for each in found["against"]["barriers"]] == [0, 1]
    between_them = found["against"]["barriers"][1]["barriers"]["train_loss"]
    assert between_them == pytest.approx(path.barriers()["train_loss"], abs=1e-4)
    ends = found["against"]["barriers"][1]["ends"]
    assert ends["test_loss"] == pytest.approx([path.test_loss[0], path.test_loss[-1]], abs=1e-4)
    assert {"train_loss", "test_error"} <= set(found["consecutive"][0]["barriers_as_given"])
    assert main(["analyze", out, "--model", "mlp", "--data", "digits", *less]) == 2
    assert "the model doesn't fit this run" in capsys.readouterr().err
    assert main(["analyze", out, *common, "--probes", "1"]) == 2
    assert "`probes` must be at least 2" in capsys.readouterr().err


def test_a_run_with_a_loss_of_its_own_is_not_scored_with_another(tmp_path, capsys, digits):
    """The command line only has cross-entropy. From Python, `differing` names the loss as different."""

    def halved(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none") / 2

    run = {"epochs": 1, "ticket_epochs": 0, "cycles": 0, "particles": 1, "progress": False}
    out = str(tmp_path / "run")
    model = build_model("mlp", 1, 8, 8, 10)
    result = fast_swamp(model, "digits", loss=halved, run_dir=out, **run)
    few = ["--probes", "0", "--mixtures", "0", "--size", "0", "--repeats", "0", "--points", "3"]
    for more in ([], ["--anyway"]):
        assert main(["analyze", out, "--model", "mlp", "--data", "digits", *few, *more]) == 2
        assert "the run used a `loss` that the command line can't pass: analyse it" in capsys.readouterr().err
    assert not (tmp_path / "run" / "analysis.json").exists()
    assert differing(Analysis(model, "digits", config=result.config, loss=halved), result) == []
    called = Analysis(model, "digits", val=0.2, config=result.config, forward=lambda model, x: model(x))
    assert differing(called, result) == ["train", "val", "loss", "forward"]


def test_other_data_are_standardised_as_the_run_did(tmp_path, capsys, digits):
    """Shifted data change the scores, because they are standardised by the mean and std of the run's data."""
    (inputs, targets), test = digits
    dark = tmp_path / "dark.npz"
    images = {f"{name}_images": (each // 3).movedim(1, -1) for name, each in (("train", inputs), ("test", test[0]))}
    np.savez(dark, **images, train_labels=targets, test_labels=test[1])
    run = {
        "epochs": 4,
        "ticket_epochs": 1,
        "cycles": 0,
        "particles": 1,
        "progress": False,
        "batch_size": 16,
        "engine": "eager",
    }
    out = tmp_path / "run"
    torch.manual_seed(0)
    model = build_model("mlp", 1, 8, 8, 10)
    result = fast_swamp(model, (inputs, targets), test, run_dir=out, **run)
    mean, std = (torch.tensor(result.standardise[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        outputs = result.model(((inputs // 3) / 255 - mean) / std)
    loss = float(nn.functional.cross_entropy(outputs, targets))
    shifted = Analysis(model, str(dark), config=result.config, standardise=result.standardise)
    assert shifted.evaluate([result.state_dict]).train_loss == pytest.approx([loss], rel=1e-4)
    few = ["--probes", "0", "--mixtures", "0", "--size", "0", "--repeats", "0", "--points", "3", "--anyway"]
    assert main(["analyze", str(out), "--model", "mlp", "--data", str(dark), *few, "--against", str(out)]) == 0
    (between,) = json.loads((out / "analysis.json").read_text())["against"]["barriers"]
    assert between["ends"]["train_loss"] == pytest.approx([loss, loss], rel=1e-4)


def test_a_run_on_other_data_is_reported_before_it_is_compared(tmp_path, capsys, digits):
    """If two runs had different data, that is reported, since a barrier then means nothing without their errors."""
    run = {"epochs": 2, "ticket_epochs": 0, "cycles": 0, "particles": 1, "progress": False, "engine": "eager"}
    (inputs, targets), test = digits
    one, two, data = str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "data.npz")
    images = {f"{name}_images": each.movedim(1, -1) for name, each in (("train", inputs), ("test", test[0]))}
    np.savez(data, **images, train_labels=targets, test_labels=test[1])
    model = build_model("mlp", 1, 8, 8, 10)
    fast_swamp(model, data, run_dir=one, batch_size=16, **run)
    fast_swamp(model, (255 - inputs, targets), test, run_dir=two, batch_size=16, **run)
    few = ["--probes", "0", "--mixtures", "0", "--size", "0", "--repeats", "0", "--points", "3"]
    call = ["analyze", one, "--model", "mlp", "--data", data, *few, "--against", two]
    assert main(call) == 2
    assert f"the train data differ from {two}'s" in capsys.readouterr().err
    assert main([*call, "--anyway"]) == 0
    shown = capsys.readouterr()
    assert f"the train data differ from {two}'s" in shown.err
    against = json.loads((tmp_path / "one" / "analysis.json").read_text())["against"]
    own, theirs = against["barriers"][0]["ends"]["test_error"]
    assert f"error between {percent(own)} and {percent(theirs)}" in shown.out
    assert against["differs"] == ["train"]


def test_what_analyze_refuses_and_omits(digits):
    """Wrong arguments raise before any work. Equal particles have all analyses except the plane."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    run = {"epochs": 1, "ticket_epochs": 0, "cycles": 0, "particles": 3, "progress": False, "engine": "eager"}
    rates = {"lr": 0.0, "swa_lr": 0.0, "batch_size": 40}
    result = fast_swamp(model, *digits, keep_particles=True, **run, **rates)
    on = Analysis(model, *digits, config=result.config)
    wrong = [{"points": 2}, {"probes": 1}, {"size": 1}, *({name: -1} for name in ("probes", "mixtures", "size"))]
    with mock.patch("swamp_fast.analysis.evaluator.start_engine", side_effect=AssertionError("worked")):
        for each in (*wrong, {"repeats": -1}):
            (name,) = each
            with pytest.raises(ValueError, match=f"`{name}` must be at least"):
                analyze(on, result, **each)
    found = analyze(on, result, points=3, probes=2, mixtures=2, size=2, repeats=0)
    assert found["plane"] is None
    assert found["particles"]["matrix"]["train_loss"] == [[0] * 3] * 3


def test_the_walk_throughs():
    """The three examples in the docstring of swamp_fast.analysis run and give what they say."""
    found = doctest.testmod(swamp_fast.analysis, optionflags=doctest.ELLIPSIS | doctest.REPORT_ONLY_FIRST_FAILURE)
    assert found.attempted > 12
    assert found.failed == 0
