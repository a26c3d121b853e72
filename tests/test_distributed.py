"""A run that several processes share has the same bits as one by a single process.

If one of the processes dies, the others end, and the run can be resumed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks.durability import SMALL, Small, progress_of, same_bits
from benchmarks.measuring import ROOT
from benchmarks.ranks import launch, small_runs
from swamp_fast import SwampResult, distributed, fast_swamp, sweep
from swamp_fast.distributed import Ranks
from swamp_fast.engines.trainer import Trainer, joined, part_of
from swamp_fast.particles.random import stream_of
from swamp_fast.runs.files import Damaged

ALWAYS, SELDOM = 1e-9, 5.0  # minutes between checkpoints
# Name -> (engine, settings) of a run. With two particles, the third of three ranks has no lane.
RUNS = {
    "fused": ("fused", {"particles": 4}),
    "few": ("fused", {"particles": 2, "progress": True, "rewind": "average", "keep_particles": True}),
    "by density": ("by density", {"particles": 3}),
    "scores": ("fused", {"particles": 3, "mask_score": "signal-to-noise"}),
    "drawn": ("fused", {"particles": 2, "mask_score": "random", "mask_from": "dense"}),
    "eager": ("eager", {"particles": 4, "cycles": 1}),
}


def ended(processes, seconds: float = 60) -> list[int]:
    """Wait for processes and return their exit codes. Kill those that don't end in time; their code is None."""
    until = time.monotonic() + seconds
    codes = []
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        process.kill()
        process.join()
    return codes


@pytest.fixture(scope="module")
def runs_by(tmp_path_factory):
    """Do all RUNS with 1, 2 and 3 ranks, and return the folder that holds them."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (1, 2, 3):
        out = folder / str(world)
        runs = [(engine, str(out / name), SELDOM, settings) for name, (engine, settings) in RUNS.items()]
        codes = ended(launch(world, out / "logs", small_runs, runs), 120)
        assert codes == [0] * world, (out / "logs" / "rank_0").read_text()
    return folder


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("run", [*RUNS])
def test_the_same_bits_by_any_number_of_ranks(world, run, runs_by):
    assert same_bits(runs_by / "1" / run, runs_by / str(world) / run)
    if run == "by density":
        assert set(SwampResult.load(runs_by / str(world) / run).engine["engines"].values()) == {"eager", "fused"}


def test_only_the_first_rank_prints(runs_by):
    first, *others = ((runs_by / "3" / "logs" / f"rank_{rank}").read_text() for rank in range(3))
    assert "cycle  2/2" in first
    assert others == ["", ""]


def wait_for_a_checkpoint(folder: Path, processes) -> None:
    """Wait until a cycle's training has a checkpoint."""
    while True:
        with suppress(OSError, Damaged, RuntimeError):  # a file may vanish while it is read
            if progress_of(folder).startswith("cycle"):
                return
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def started(world: int, folder: Path, minutes: float = ALWAYS) -> list:
    settings = RUNS["fused"][1] | {"progress": True}
    return launch(world, folder / "logs", small_runs, [("fused", str(folder / "run"), minutes, settings)])


@pytest.mark.parametrize(
    ("world", "dies", "then"),
    [(2, 1, 3), pytest.param(3, 0, 1, marks=pytest.mark.slow), pytest.param(3, 2, 2, marks=pytest.mark.slow)],
)
def test_a_rank_that_dies_ends_the_others_and_the_run_can_be_resumed(world, dies, then, runs_by, tmp_path):
    processes = started(world, tmp_path)
    wait_for_a_checkpoint(tmp_path / "run", processes)
    os.kill(processes[dies].pid, signal.SIGKILL)
    codes = ended(processes)
    assert codes[dies] == -signal.SIGKILL
    assert None not in codes
    assert 0 not in codes
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for rank in set(range(world)) - {dies}:
        log = (tmp_path / "logs" / f"rank_{rank}").read_text()
        assert re.search(rf"rank {dies} is gone.*Start again with the same run_dir", log), log
    assert ended(started(then, tmp_path, SELDOM)) == [0] * then
    assert "resumed  in cycle" in (tmp_path / "logs" / "rank_0").read_text()
    assert same_bits(runs_by / "1" / "fused", tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_hangs_is_gone_within_a_minute(tmp_path):
    processes = started(2, tmp_path)
    wait_for_a_checkpoint(tmp_path / "run", processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    processes[0].join(60)
    assert processes[0].exitcode == distributed.EXIT_STATUS
    assert time.monotonic() - began < 60
    assert "rank 1 is gone without an error message" in (tmp_path / "logs" / "rank_0").read_text()
    processes[1].kill()
    processes[1].join()


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(sent, runs_by, tmp_path):
    processes = started(3, tmp_path)
    wait_for_a_checkpoint(tmp_path / "run", processes)
    os.kill(processes[1].pid, sent)
    codes = ended(processes)
    assert codes == ([143] * 3 if sent == signal.SIGTERM else [1] * 3)
    assert "to continue" in (tmp_path / "logs" / "rank_0").read_text()
    assert (tmp_path / "run" / "training.safetensors").exists()
    assert ended(started(2, tmp_path, SELDOM)) == [0, 0]
    assert same_bits(runs_by / "1" / "fused", tmp_path / "run")


def raised(**settings: object) -> str:
    """Do a small run by all ranks of this job, and return its error as text."""
    try:
        fast_swamp(Small(), "digits", **SMALL | {"engine": "fused", "progress": False, "device": "cpu"} | settings)
    except (RuntimeError, ValueError, FloatingPointError) as error:
        return str(error)
    return "nothing"


def swept(out: str, **settings: object) -> str:
    """Do a sweep by all ranks of this job, and return its error as text."""
    try:
        sweep(Small, "digits", None, {"seed": [0, 1]}, out=out, **SMALL | {"progress": False} | settings)
    except ValueError as error:
        return str(error)
    return "nothing"


def faults(folder: str) -> None:
    """Make faulty calls on all ranks; each rank writes the resulting errors to its log."""
    job = distributed.current()

    def report(name: str, text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr)

    report("settings", raised(seed=job.rank // 2))
    report("one", raised(run_dir=folder if job.first else None, cycles=0))
    report("sweep", swept(folder + "_of", lr=0.1 if job.rank < 2 else 0.07))
    report("ours", raised(run_dir=folder, cycles=0))
    report("folder", raised(run_dir=folder, cycles=0, resume=False))

    step, broadcast = Trainer.step, Ranks.broadcast_from_first

    def infinite(trainer, handle):
        step(trainer, handle)
        trainer.bank.weights[trainer.bank.keys[:, 1] == stream_of(0, 2)] = torch.inf

    Trainer.step = infinite
    report("stop", raised(particles=3))
    with warnings.catch_warnings(record=True) as warned:
        settings = SMALL | {"particles": 3, "cycles": 0, "engine": "fused", "device": "cpu", "progress": False}
        result = fast_swamp(Small(), "digits", **settings, on_divergence="drop")
    report("drop", f"{result.history[0]['dropped']} {len(result.history[0]['train_loss'])} {len(warned) > 0}")
    Trainer.step = step

    def flipped(ranks, make):
        value = broadcast(ranks, make)
        if isinstance(value, torch.Tensor) and ranks.rank == 1:
            value[:2] = ~value[:2]
        return value

    Ranks.broadcast_from_first = flipped
    report("mask", raised())


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    assert ended(launch(3, tmp_path, faults, str(tmp_path / "run"))) == [0] * 3
    for rank in range(3):
        lines = (tmp_path / f"rank_{rank}").read_text().splitlines()
        errors = dict(line.split(": ", 1) for line in lines)
        assert "rank 2's differs from rank 0's" in errors["settings"]
        assert ("the settings" in errors["settings"]) == (rank == 2)
        assert ("the settings" if rank else "rank 2's differs") in errors["one"]
        assert "rank 2's settings, model or data differ from rank 0's" in errors["sweep"]
        assert errors["ours"] == "nothing"
        assert "holds a run already, and resume=False" in errors["folder"]
        assert re.match(r"cycle 0, epoch 1: particle 2 diverged", errors["stop"])
        assert errors["drop"] == f"[{{'lane': 2, 'epoch': 1}}] 2 {rank == 0}"
        assert re.match(r"the mask of cycle 1/2.* on rank 1 it differs from rank 0's\. .*same run_dir", errors["mask"])


def fails(in_training: bool) -> None:
    """Make the second rank fail, during a training or before it, and keep its process alive afterwards."""
    step = Trainer.step

    def fail(trainer, handle):
        step(trainer, handle)
        if trainer.done == 5 and distributed.current().rank == 1:
            raise ArithmeticError("no luck")

    Trainer.step, distributed.GRACE_SECONDS = fail, 1.0
    with suppress(ArithmeticError):
        raised(**{} if in_training or distributed.current().first else {"lr": -1.0})
    time.sleep(60)


@pytest.mark.parametrize("in_training", [True, False])
def test_an_error_on_one_rank_ends_the_others_soon(in_training, tmp_path):
    processes = launch(2, tmp_path, fails, in_training)
    processes[0].join(30)
    assert processes[0].exitcode == distributed.EXIT_STATUS
    assert ended(processes[1:], 0) == [None]
    error = "ArithmeticError: no luck" if in_training else "ValueError: `lr` must be"
    assert f"rank 1 failed: {error}" in (tmp_path / "rank_0").read_text()


def test_torchrun_and_the_command_line(tmp_path):
    command = "run --model small_cnn --data digits --engine fused --particles 2 --cycles 1 --epochs 1 --ticket-epochs 0"
    script = [*command.split(), "--device", "cpu", "--out", str(tmp_path / "run")]
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "swamp_fast"]
    about = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*started, *script], capture_output=True, text=True, env=about, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^cycle +1/1", done.stderr, re.M)) == 1
    assert len(re.findall("figure", done.stdout)) == 1
    assert SwampResult.load(tmp_path / "run").history[-1]["particles"] == 2


@pytest.mark.parametrize(("count", "world"), [(4, 2), (5, 3), (2, 3), (0, 2), (7, 1)])
def test_shares_are_all_lanes_in_order(count, world):
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert [lane for share in shares for lane in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


def test_the_state_of_lanes_is_divided_and_joined():
    state = {"done": torch.tensor(3), "kept": torch.arange(35), "rest": torch.randn(5, 2), "none": torch.zeros(5, 0)}
    parts = [part_of(state, Ranks(rank, 3).share(5), 5) for rank in range(3)]
    assert [len(part["kept"]) for part in parts] == [14, 14, 7]
    assert all(torch.equal(tensor, state[name]) for name, tensor in joined(parts).items())


def small_sweep(out: str) -> None:
    """Do a sweep of three runs, of which one diverges."""
    settings = {**SMALL, "engine": "fused", "device": "cpu", "progress": False}
    points = [{"seed": 0}, {"seed": 1, "lr": 1e30}, {"seed": 2}]
    swept = sweep(Small, "digits", None, points, out=out, **settings)
    rows = [(run.error is None, None if run.result is None else len(run.result.history)) for run in swept.runs]
    assert rows == [(True, SMALL["cycles"] + 1), (False, None), (True, SMALL["cycles"] + 1)], rows


def test_the_runs_of_a_sweep_are_dealt_out(tmp_path):
    for world in (1, 2):
        assert (
            ended(launch(world, tmp_path / f"logs{world}", small_sweep, str(tmp_path / str(world))), 90) == [0] * world
        )
    one, two = (sorted((tmp_path / str(world) / "runs").iterdir()) for world in (1, 2))
    assert [folder.name for folder in one] == [folder.name for folder in two]
    finished = [(a, b) for a, b in zip(one, two, strict=True) if (a / "model.safetensors").exists()]
    assert len(finished) == 2
    assert all(same_bits(a, b) for a, b in finished)
    tables = [(tmp_path / str(world) / "results.csv").read_text().splitlines() for world in (1, 2)]
    assert len(tables[0]) == len(tables[1]) == 1 + 2 * (SMALL["cycles"] + 1) + 1
