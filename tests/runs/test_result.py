"""What a run leaves: a result that shows itself and can be compared, also if the run ends early."""

from __future__ import annotations

import json
import math
import re

import networks
import pytest
from equality import same

from swamp_fast import StopRun, SwampResult, fast_swamp, naive_swamp, sweep
from swamp_fast.runs.files import as_json

SETTINGS = {"batch_size": 32, "epochs": 2, "ticket_epochs": 0, "particles": 2, "cycles": 2, "progress": False}
BOTH = pytest.mark.parametrize("function", [fast_swamp, naive_swamp])


def run(digits, function=fast_swamp, **settings):
    return function(networks.build("tied"), *digits, **SETTINGS | settings)


@pytest.fixture(scope="module")
def result(digits):
    return run(digits)


def at_cycle(number: int, error: BaseException):
    def callback(row):
        if row["cycle"] == number:
            raise error

    return callback


def test_it_shows_itself_in_five_lines(result):
    lines = repr(result).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("SwampResult: ")
    assert "64.00 %" in lines[1]
    assert f"{result.history[-1]['accuracy']:.2%}".replace("%", " %") in lines[1]
    html = result._repr_html_()
    assert html.count("<tr>") == 1 + len(result.history)
    assert "<svg" in html
    assert "<b>" not in run_html_with_name("<b>")


def run_html_with_name(name: str) -> str:
    from swamp_fast.runs.display import result_html

    return result_html([name], [])


def test_results_are_compared_by_their_bits(result, digits):
    assert result == run(digits)
    assert result != run(digits, seed=1)
    assert result != run(digits, cycles=1)
    assert result != 5
    with pytest.raises(TypeError, match="unhashable"):
        hash(result)


def test_the_history_is_a_table(result):
    """Every row has the same keys, as a data frame expects, and plain values, as JSON does."""
    assert len({tuple(row) for row in result.history}) == 1
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["history"] == result.history


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("mine")])
def test_what_is_finished_is_on_the_exception(function, error, result, digits, capsys):
    with pytest.raises(type(error)) as caught:
        run(digits, function, on_cycle=at_cycle(1, error), progress=True)
    partial = caught.value.result
    assert [row["cycle"] for row in partial.history] == [0, 1]
    assert partial.model is not None
    assert re.search(r"stopped  by \w+; its attribute `result` holds 2 of 3 cycles", capsys.readouterr().err)


@BOTH
def test_stop_run_ends_with_a_result(function, result, digits, tmp_path, capsys):
    stopped = run(digits, function, on_cycle=at_cycle(1, StopRun()), run_dir=tmp_path, progress=True)
    assert len(stopped.history) == 2
    assert "stopped  by on_cycle after cycle 1 of 2" in capsys.readouterr().err
    same(run(digits, function, run_dir=tmp_path), run(digits, function), 0)  # it goes on later


def test_stop_iteration_is_named(digits):
    with pytest.raises(RuntimeError, match=r"`on_cycle` raised StopIteration; raise swamp_fast.StopRun"):
        run(digits, on_cycle=at_cycle(0, StopIteration()))


def test_the_callback_gets_copies(digits, result):
    def spoil(row):
        row["particle_accuracy"].clear()
        row["kept"] = 0

    assert [row["kept"] for row in run(digits, on_cycle=spoil).history] == [row["kept"] for row in result.history]


def test_an_interrupted_sweep_has_its_result(digits, monkeypatch):
    from swamp_fast.studies.progress import SweepProgress

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SweepProgress, "cycle", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        sweep(networks.build("tied"), *digits, {"seed": [0, 1]}, **SETTINGS)
    assert len(caught.value.result.runs) == 2


def test_the_working_directory_may_change(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def move(row):
        monkeypatch.chdir(tmp_path / "elsewhere")

    moved = run(digits, run_dir="runs/a", on_cycle=move)
    assert moved == SwampResult.load(tmp_path / "runs" / "a")
    assert not list((tmp_path / "elsewhere").iterdir())
    monkeypatch.chdir(tmp_path)
    swept = sweep(networks.build("tied"), *digits, {"seed": [0]}, out="s", **SETTINGS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert swept.runs[0].result.masks


def test_json_stays_json():
    text = as_json({"loss": math.nan, "each": [1.0, -math.inf], 3: (True, None, "NaN")})
    assert json.loads(text) == {"loss": None, "each": [1.0, None], "3": [True, None, "NaN"]}
