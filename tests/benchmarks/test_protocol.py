"""benchmarks.protocol: its items, and a rehearsal in slices on two machines, which must equal one in one slice."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from stops import Interrupted, before_steps, stop_at

from benchmarks import cifar10, protocol_transport
from benchmarks import protocol as module
from benchmarks.budget import Budget
from benchmarks.gpu import SLICES
from benchmarks.protocol import Item, Protocol, main
from swamp_fast.common.timing import Stopwatch
from swamp_fast.runs.files import load_tensors
from swamp_fast.runs.folder import RunDirectory

STEPS_PER_SLICE = 25


@pytest.fixture(autouse=True)
def _packed(monkeypatch):
    """Make all runs share a bank, whatever a stopwatch would choose."""
    monkeypatch.setattr("swamp_fast.studies.packing.runs_at_once", lambda engine, problems: (len(problems), "forced"))


def test_the_items_in_their_order(tmp_path):
    protocol = Protocol(tmp_path, seeds=5)
    names = [item.name for item in protocol.items()]
    assert names[: len(SLICES)] == [f"gpu/{name}" for name in SLICES]
    assert names[len(SLICES) : len(SLICES) + 8] == [
        *("cost/naive_resnet20", "cost/roofline_resnet20", "cost/naive_wrn28_2", "cost/roofline_wrn28_2"),
        *("runs/resnet20_30", "analysis/resnet20_30", "runs/resnet20_150", "analysis/resnet20_150"),
    ]
    assert [name for name in names if name.startswith("runs/wrn")] == [f"runs/wrn28_2_30/{seed}" for seed in range(10)]
    assert names[-1] == "runs/particles"
    first, long, _, particles = protocol.studies
    assert [*first.methods] == ["swamp", "imp", "imp+swa"]
    config = first.config("swamp", 0)
    assert (config.particles, config.cycles, config.epochs, config.batch_size) == (4, 14, 30, 128)
    assert (long.config("imp", 0).epochs, [*long.methods], [*long.seeds]) == (150, ["swamp", "imp"], [0])
    assert particles.config("N = 4", 3) == first.config("swamp", 3)  # so the run isn't done twice
    assert [particles.config(name, 0).particles for name in particles.methods] == [1, 2, 4, 8, 16]


def test_a_slice_stops_in_time_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    def slow():
        time.sleep(60)

    def failing():
        raise ValueError("as it does")

    items = [Item("fits no slice", slow, False), Item("fails", failing), Item("goes on", slow), Item("short", bool)]
    monkeypatch.setattr(Protocol, "items", lambda self: items)
    for left in (["fails", "goes on", "short"], ["goes on", "short"]):
        watch = Stopwatch()
        protocol = Protocol(tmp_path, rehearse=True)
        assert protocol.run_items(0.5 / 60) == left
        assert watch.seconds < 5
    assert capsys.readouterr().out.count("goes on: the slice ended before anything could be kept") == 1
    assert protocol.marks["fails"] == "failed: ValueError: as it does"
    assert protocol.marks["fits no slice"] == "failed: it takes longer than 0.00833333 minutes"
    assert json.loads((tmp_path / "protocol.json").read_text()) == protocol.marks


def test_seeds_are_packed_all_or_a_few_at_a_time(tmp_path):
    names = [item.name for item in Protocol(tmp_path, seeds=5, at_once=2).items() if "resnet20_30" in item.name]
    pairs = ["0-1", "2-3", "4"]
    assert [name for name in names if name.startswith("runs/")] == [f"runs/resnet20_30/{each}" for each in pairs]
    assert f"analysis/resnet20_30/{pairs[1]}" in names  # seed 2 is analysed
    assert f"analysis/resnet20_30/{pairs[2]}" not in names


def test_an_export_holds_what_is_needed_and_no_more_than_may_be_committed(tmp_path, monkeypatch, capsys):
    """It has the history of finished runs, and all that unfinished runs continue from, unless that is too large."""
    here, there, state = tmp_path / "here", tmp_path / "there", tmp_path / "to" / "state.zip"
    arguments = ["--rehearse", "--seeds", "1", "--only", "runs/small_cnn_30", "analysis/small_cnn_30", "--out"]
    with before_steps(stop_at(150)), pytest.raises(Interrupted):
        main([*arguments, str(here), "--budget-minutes", "10"])
    done = sorted(RunDirectory(folder).cycles_done() for folder in (here / "small_cnn" / "runs").iterdir())
    assert done == [2, 2, 3]  # the runs of swamp, with two particles, share no bank with runs of one particle
    main([*arguments, str(here), "--export", str(state)])
    whole = state.stat().st_size
    monkeypatch.setattr(protocol_transport, "MAX_BYTES", whole * 3 // 4)
    main([*arguments, str(here), "--export", str(state)])
    assert "start again from the beginning" in capsys.readouterr().out
    assert state.stat().st_size < whole * 3 // 4
    monkeypatch.undo()
    main([*arguments, str(here), "--budget-minutes", "10"])
    main([*arguments, str(here), "--export", str(state)])
    assert state.stat().st_size < 50_000 < whole
    main([*arguments, str(there), "--import", str(state), "--budget-minutes", "10"])
    assert "left: nothing" in capsys.readouterr().out
    rows = [json.loads((out / "results" / "protocol.json").read_text()) for out in (here, there)]
    assert sum(row["study"] == "small_cnn_30" for row in rows[0]["rows"]) == 9
    for part in ("rows", "analysis"):
        assert rows[0][part] == rows[1][part]


def test_without_data_or_gpu_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "ROOT", tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError, match="pass --data cifar10.npz"):
        main(["--out", str(tmp_path)])
    if not torch.cuda.is_available():
        assert not Protocol(tmp_path).table_of("ceilings")


class Counting(Budget):
    """A budget in steps instead of seconds, so that a slice gets equally far on a busy and on an idle machine."""

    now: Counting

    def __init__(self, seconds: float) -> None:
        super().__init__(3600.0)
        self.steps, Counting.now = STEPS_PER_SLICE if seconds > 1 else 1, self

    def step(self, *_) -> None:
        self.steps -= 1
        if self.steps <= 0:
            self.watch = Stopwatch(self.seconds)
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_rehearsal_in_slices_on_two_machines_gives_what_one_slice_gives(tmp_path, monkeypatch, capsys):
    whole, here, there, state = (tmp_path / name for name in ("whole", "here", "there", "state.zip"))
    arguments = ["--rehearse", "--seeds", "2", "--only", "runs/small_cnn_30", "analysis/small_cnn_30", "--out"]
    main([*arguments, str(whole), "--budget-minutes", "10"])
    assert "left: nothing" in capsys.readouterr().out
    trace = module.hessian_trace
    monkeypatch.setattr(module, "Budget", Counting)
    monkeypatch.setattr(module, "hessian_trace", lambda *args, **more: (Counting.now.step(), trace(*args, **more))[1])
    stopped = 0
    with before_steps(lambda *_: Counting.now.step()):
        for number in range(100):
            main([*arguments, str(here if number < 3 else there), "--budget-minutes", "1"])
            printed = capsys.readouterr().out
            assert "0 failed" in printed
            if "left: nothing" in printed:
                break
            stopped += 1
            if number == 2:
                main([*arguments, str(here), "--export", str(state)])
                main([*arguments, str(there), "--import", str(state), "--budget-minutes", "0.01"])
                assert "0 failed" in capsys.readouterr().out
        else:
            pytest.fail("100 slices were not enough")
    assert stopped > 3
    runs = {path.name: path for path in (whole / "small_cnn" / "runs").iterdir()}
    assert len(runs) == 6
    for name, folder in runs.items():
        # A run that had finished before the export is only in the folder that was exported.
        places = (out / "small_cnn" / "runs" / name for out in (there, here))
        last = RunDirectory(next(place for place in places if (place / "cycle_02.safetensors").exists()))
        tensors, others = (load_tensors(path / "cycle_02.safetensors")[0] for path in (folder, last.path))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
        assert last.cycles_done() == 3
    rows = [json.loads((out / "results" / "protocol.json").read_text()) for out in (whole, there)]
    for part in ("rows", "analysis"):
        assert [row.get("accuracy", row.get("trace")) for row in rows[0][part]] == [
            row.get("accuracy", row.get("trace")) for row in rows[1][part]
        ]
    assert {path.name for path in (whole / "results").iterdir()} == {
        path.name for path in (there / "results").iterdir()
    }
    assert (there / "results" / "protocol_small_cnn_30.svg").exists()
