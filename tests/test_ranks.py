"""A run that several processes share is the run of one, to the bit; one that dies ends the others, nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.durability import same_bits
from benchmarks.ranks import launch, small_runs
from swamp_fast import SwampResult, ranks

ALWAYS, SELDOM = 1e-9, 5.0  # minutes between checkpoints
# Two lanes leave a third rank without. Eager lanes are float64: how they are packed is seen in the last bits.
RUNS = {
    "fused": ("fused", {"particles": 4}),
    "few": ("fused", {"particles": 2, "progress": True, "rewind": "average", "keep_particles": True}),
    "by density": ("by density", {"particles": 3}),
    "eager": ("eager", {"particles": 4, "precision": "float64", "cycles": 1}),
}


def ended(processes, seconds: float = 60) -> list[int]:
    """Their exit codes; those that don't end in time are killed, and have none."""
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
def by(tmp_path_factory):
    """The folder with the runs of each number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (1, 2, 3):
        own = folder / str(world)
        runs = [(engine, str(own / name), SELDOM, settings) for name, (engine, settings) in RUNS.items()]
        codes = ended(launch(world, own / "logs", small_runs, runs), 120)
        assert codes == [0] * world, (own / "logs" / "rank_0").read_text()
    return folder


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("run", ["fused", "few", "by density"])
def test_the_same_bits_by_any_number_of_ranks(world, run, by):
    assert same_bits(by / "1" / run, by / str(world) / run)
    if run == "by density":
        assert set(SwampResult.load(by / str(world) / run).engine["engines"].values()) == {"eager", "fused"}


@pytest.mark.parametrize("world", [2, 3])
def test_the_eager_engine_in_float64(world, by):
    one, more = (SwampResult.load(by / str(each) / "eager") for each in (1, world))
    assert len(one.history) == len(more.history) == 2
    for cycle in (0, 1):
        found, expected = more._snapshot(cycle), one._snapshot(cycle)
        assert all(torch.equal(mask, found.masks[name]) for name, mask in expected.masks.items())
        for name, tensor in expected.state.items():
            assert (tensor.double() - found.state[name].double()).abs().max() <= 1e-10


def test_only_the_first_rank_speaks(by):
    first, *others = ((by / "3" / "logs" / f"rank_{rank}").read_text() for rank in range(3))
    assert "cycle  2/2" in first
    assert others == ["", ""]


def begun(folder: Path, processes) -> None:
    """Wait until a cycle's training has a checkpoint."""
    while not ((folder / "ticket.safetensors").exists() and (folder / "training.safetensors").exists()):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)


def started(world: int, folder: Path, minutes: float = ALWAYS) -> list:
    settings = RUNS["fused"][1] | {"progress": True}
    return launch(world, folder / "logs", small_runs, [("fused", str(folder / "run"), minutes, settings)])


@pytest.mark.parametrize(
    ("world", "dies", "then"), [(2, 1, 3), pytest.param(3, 0, 1, marks=pytest.mark.slow), (3, 2, 2)]
)
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(world, dies, then, by, tmp_path):
    processes = started(world, tmp_path)
    begun(tmp_path / "run", processes)
    os.kill(processes[dies].pid, signal.SIGKILL)
    codes = ended(processes)
    assert codes[dies] == -signal.SIGKILL
    assert None not in codes
    assert 0 not in codes
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for rank in set(range(world)) - {dies}:
        told = (tmp_path / "logs" / f"rank_{rank}").read_text()
        assert re.search(rf"rank {dies} is gone.*Start again with the same run_dir", told), told
    assert ended(started(then, tmp_path, SELDOM)) == [0] * then
    assert "resumed  in cycle" in (tmp_path / "logs" / "rank_0").read_text()
    assert same_bits(by / "1" / "fused", tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_hangs_is_gone_within_a_minute(tmp_path):
    processes = started(2, tmp_path)
    begun(tmp_path / "run", processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    processes[0].join(60)
    assert processes[0].exitcode == ranks.GONE
    assert time.monotonic() - began < 60
    assert "rank 1 is gone, and gave no sign of life" in (tmp_path / "logs" / "rank_0").read_text()
    processes[1].kill()
    processes[1].join()


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_all_with_a_checkpoint(sent, by, tmp_path):
    processes = started(3, tmp_path)
    begun(tmp_path / "run", processes)
    os.kill(processes[1].pid, sent)
    codes = ended(processes)
    assert codes == ([143] * 3 if sent == signal.SIGTERM else [1] * 3)
    assert "the run goes on" in (tmp_path / "logs" / "rank_0").read_text()
    assert (tmp_path / "run" / "training.safetensors").exists()
    assert ended(started(2, tmp_path, SELDOM)) == [0, 0]
    assert same_bits(by / "1" / "fused", tmp_path / "run")
