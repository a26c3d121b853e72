"""A seed has one result on a machine: in every process, under load, in a sweep, and at the start of a longer run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from swamp_fast import fast_swamp, models, sweep
from swamp_fast.engines.selection import by_rule
from swamp_fast.engines.start import proven_plan
from swamp_fast.problem.prepare import prepare
from swamp_fast.studies import packing

SETTINGS = {"particles": 2, "cycles": 1, "epochs": 2, "ticket_epochs": 1, "batch_size": 48, "device": "cpu"}
SETTINGS |= {"seed": 1, "progress": False}


class Branching(nn.Module):
    """A convolutional network that the fused engine can't run, because its forward looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = x * 2 if float(x.detach().mean()) > 0 else x
        return self.head(x.mean((2, 3)))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 10))


KINDS = {  # kind of run -> network, settings, whether the data are streamed
    "fused": (lambda: models.SmallCNN(1, 10, 8), {}, False),
    "eager": (Branching, {}, False),
    "both engines": (dropping, {"precision": "float64", "prune": 0.8}, False),
    "bfloat16": (lambda: models.SmallCNN(1, 10, 8), {"precision": "bfloat16", "cycles": 2, "prune": 0.6}, False),
    "dropout": (dropping, {"prune": 0.7}, False),
    "streamed": (lambda: models.SmallCNN(1, 10, 8), {}, True),
}
EXPECTED = {  # kind of run -> the kind of engine that engine="auto" selects
    "fused": "fused",
    "eager": "eager",
    "both engines": "by density",
    "bfloat16": "by density",
    "dropout": "by density",
    "streamed": "fused",
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]()


def data(kind: str):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(160, 1, 8, 8, generator=generator)
    targets = (pictures.mean((1, 2, 3)) * 7919).long() % 10
    if KINDS[kind][2]:
        return DataLoader(TensorDataset(pictures, targets), batch_size=SETTINGS["batch_size"])
    return pictures, targets


def digest(result) -> str:
    """A hash of every cycle's weights and masks, and of the history without times and memory."""
    found = hashlib.blake2b(digest_size=8)
    for cycle, row in enumerate(result.history):
        snapshot = result._snapshot(cycle)
        for tensor in (*snapshot.state.values(), *snapshot.masks.values()):
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        clocks = ("seconds", "train_seconds", "peak_memory")
        found.update(json.dumps({name: value for name, value in row.items() if name not in clocks}).encode())
    return found.hexdigest()


def run(kind: str, **changes):
    return fast_swamp(made(kind), data(kind), **SETTINGS | KINDS[kind][1] | changes)


def main() -> None:
    """Train a run of each kind; print one line of JSON with its engine and its digest, by kind."""
    torch.set_num_threads(2)
    results = {kind: run(kind) for kind in KINDS}
    print(json.dumps({kind: (result.engine["engine"], digest(result)) for kind, result in results.items()}))


def processes(count: int) -> list[dict[str, list[str]]]:
    """The results that `main` prints in each of `count` simultaneous processes."""
    paths = [ROOT, ROOT / "tests" / "support", Path(__file__).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment["OMP_WAIT_POLICY"] = "passive"  # waiting threads must not occupy the cores of the other processes
    command = [sys.executable, "-c", "import test_one_seed; test_one_seed.main()"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(count)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return [json.loads(each.splitlines()[-1]) for each in said]


def test_fresh_processes_give_the_same_bits_idle_and_under_load():
    (alone,) = processes(1)
    assert {kind: engine for kind, (engine, _) in alone.items()} == EXPECTED
    assert processes(3) == [alone] * 3  # three processes with two threads each overload a machine with few cores


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_run_is_the_start_of_a_longer_one(kind):
    short, long = run(kind, cycles=2), run(kind, cycles=4)
    assert short.engine["name"] == long.engine["name"]
    for cycle in range(3):
        own, other = short._snapshot(cycle), long._snapshot(cycle)
        assert all(torch.equal(own.masks[name], each) for name, each in other.masks.items())
        assert all(torch.equal(own.state[name], each) for name, each in other.state.items())


@pytest.mark.parametrize("kind", ["fused", "eager", "dropout"])
def test_a_run_alone_is_one_of_eight_in_a_sweep(kind, monkeypatch):
    """A run has the same bits alone as in a sweep that trains all eight runs in one bank."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (len(problems), "forced"))
    common = {name: value for name, value in (SETTINGS | KINDS[kind][1]).items() if name != "seed"}
    found = sweep(made(kind), data(kind), grid={"seed": [1, 2], "lr": [0.1, 0.08], "weight_decay": [0, 5e-4]}, **common)
    assert len({digest(each.result) for each in found.runs}) == 8
    for each in (found.runs[0], found.runs[5]):
        assert digest(each.result) == digest(run(kind, **each.point))


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_the_engine_gives_the_run_again(kind):
    first = run(kind)
    again = run(kind, engine=first.engine["name"])
    assert again.engine["name"] == first.engine["name"]
    assert digest(again) == digest(first)


def signed(seed: int) -> nn.Module:
    """A model whose weights are all 0.1 or -0.1, so that ReLU's inputs are often exactly 0, where ReLU has a kink."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    for module in (model[0], model[2]):
        module.weight.data = 0.1 * module.weight.data.sign()
    return model


def test_the_engine_does_not_depend_on_the_initial_weights(digits):
    """The rule selects the same engine for every seed."""
    names = set()
    for seed in range(4):
        problem = prepare(signed(seed), *digits, settings=SETTINGS | {"seed": seed})
        names.add(by_rule(problem, proven_plan(problem)).name)
    assert names == {"fused"}


@pytest.mark.parametrize("engine", ["eager:fold", "eager:fold_grouped"])
def test_folded_runs_of_a_sweep_are_what_they_are_alone(engine, monkeypatch):
    """On a CPU, a folded lane's bits depend on the number of lanes, so the runs of a sweep must not share a bank."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (3, "forced"))
    common = {name: value for name, value in SETTINGS.items() if name != "seed"} | {"engine": engine, "batch_size": 7}
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(216, 10))
    for each in sweep(model, data("fused"), grid={"seed": [1, 2, 3]}, **common).runs:
        assert digest(each.result) == digest(fast_swamp(model, data("fused"), **common, **each.point))


def test_a_sweep_takes_no_engine_from_a_damaged_record(tmp_path):
    """A damaged run in a sweep's folder ends with an error, but the sweep's new runs are trained."""
    common = {name: value for name, value in SETTINGS.items() if name != "seed"} | {"engine": "fastest"}
    common |= {"cycles": 0, "ticket_epochs": 0}
    sweep(made("eager"), data("eager"), grid={"seed": [1]}, out=tmp_path, **common)
    (path,) = tmp_path.glob("runs/*/run.json")
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "engine": {**about["engine"], "name": None}, "at_once": "x"}))
    found = sweep(made("eager"), data("eager"), grid={"seed": [1, 2]}, out=tmp_path, **common)
    assert found.runs[1].error is None
    assert found.runs[1].result.engine["name"].startswith("eager:")
