"""The predicted memory of a run, against that of the tensors that the run holds at once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

from swamp_fast import fast_swamp, naive_swamp, sweep
from swamp_fast.common.live_memory import LiveMemory
from swamp_fast.cycle.training import alone
from swamp_fast.driver import swamp
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.footprint import eager_footprint, fused_footprint
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.engines.start import start_engine
from swamp_fast.models import build_model
from swamp_fast.problem.prepare import prepare
from swamp_fast.runs.record import Run
from swamp_fast.studies.packing import runs_at_once

TOLERANCE = 0.2


def problem_of(model, particles, engine, batch=128, size=32, **settings):
    torch.manual_seed(0)
    samples = 2 * batch
    data = torch.randn(samples, 3, size, size), torch.arange(samples) % 10
    settings |= {"particles": particles, "cycles": 1, "epochs": 1, "ticket_epochs": 0, "batch_size": batch}
    settings |= {"engine": engine, "progress": False}
    return prepare(build_model(model, 3, size, size, 10), data, data, settings=settings)


def predicted(problem):
    if problem.config.engine == "fused":
        return fused_footprint(problem, fused_plan(problem))
    return eager_footprint(problem, eager_by_rule(problem))


def measured(problem, monkeypatch):
    """The peak of the live tensors of a run of two trainings; the maps of the fused engine count too."""
    monkeypatch.setattr("swamp_fast.engines.fused.cpu.maps.hasattr", lambda *_: False, raising=False)
    gc.collect()
    with Run(problem, "fast_swamp") as run:
        engine = start_engine(problem, run)
        with LiveMemory() as live:
            alone(engine, swamp(problem, engine, run))
    return live.peak


@pytest.mark.parametrize("engine", ["fused", "eager"])
@pytest.mark.parametrize("particles", [2, 12])
def test_predicted_as_allocated(particles, engine, monkeypatch):
    problem = problem_of("small_cnn", particles, engine, batch=64)
    expected = measured(problem, monkeypatch)
    assert predicted(problem).bytes(particles) == pytest.approx(expected, rel=TOLERANCE)


CHILD = """
import ctypes, gc, re, sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_footprint import alone, predicted, problem_of, start_engine, swamp, Run

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def run(problem):
    with Run(problem, "fast_swamp") as record:
        engine = start_engine(problem, record)
        alone(engine, swamp(problem, engine, record))

run(problem_of({model!r}, 1, {engine!r}, batch=16))  # loads libraries and makes threads
problem = problem_of({model!r}, {particles}, {engine!r})
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
before = status("VmRSS")
run(problem)
print(status("VmHWM") - before, predicted(problem).bytes({particles}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a peak since a moment")
@pytest.mark.parametrize("engine", ["fused", "eager"])
@pytest.mark.parametrize("particles", [4, 16])
@pytest.mark.parametrize("model", ["small_cnn", "resnet20", "mlp"])
def test_predicted_as_the_process_grows(model, particles, engine):
    code = CHILD.format(
        tests=[str(Path(__file__).parent), str(ROOT / "tests" / "support")],
        model=model,
        particles=particles,
        engine=engine,
    )
    # Otherwise the allocator keeps freed blocks of up to 32 MB.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3000:]
    grown, expected = map(int, child.stdout.split())
    print(f"{model}, {particles} particles, {engine}: predicted {expected / grown:.2f} of {grown / 1e6:.0f} MB")
    assert expected == pytest.approx(grown, rel=TOLERANCE)


SETTINGS = {"cycles": 1, "epochs": 1, "ticket_epochs": 1, "batch_size": 16, "progress": False}


@pytest.fixture
def little_memory(monkeypatch):
    """Memory for 10 particles with 4 vectors in a bank and 2 to be averaged; the naive loop keeps 2."""
    problem = problem_of("small_cnn", 1, "eager", batch=16, size=8)
    free = 10 * 6 * 4 * problem.layout.P
    monkeypatch.setattr("swamp_fast.problem.checks.known_free_memory", lambda device: free)
    monkeypatch.setattr("swamp_fast.engines.footprint.free_memory", lambda device: free)
    return problem


@pytest.mark.parametrize(("engine", "fit"), [("eager", 10), ("fused", 10), ("naive", 30)])
def test_too_many_particles_are_refused_before_the_ticket(engine, fit, little_memory, monkeypatch):
    data = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    settings = SETTINGS if engine == "naive" else {**SETTINGS, "engine": engine}
    driver = naive_swamp if engine == "naive" else fast_swamp
    steps = []
    monkeypatch.setattr(Run, "step", lambda self, particles, where: steps.append(where))
    for particles in (fit + 1, (fit + 1, 1), 65536):
        with pytest.raises(MemoryError, match=rf"at least .* GB are free on cpu, where at most {fit} fit\. Lower `par"):
            driver(build_model("small_cnn", 3, 8, 8, 10), data, particles=particles, **settings)
    assert steps == []
    driver(build_model("small_cnn", 3, 8, 8, 10), data, particles=fit, **settings)
    assert steps


def test_a_run_of_a_sweep_that_does_not_fit_fails_alone(little_memory):
    data = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    model = build_model("small_cnn", 3, 8, 8, 10)
    small, large = sweep(model, data, grid={"particles": [2, 11]}, **SETTINGS, engine="eager").runs
    assert small.result is not None
    assert "at most 10 fit" in str(large.error)


def test_only_runs_that_fit_are_packed(little_memory, monkeypatch):
    """Until they are averaged, particles take 8 vectors each, so 7 fit: three runs of 2 particles."""
    monkeypatch.setattr("swamp_fast.studies.packing.seconds_of_steps", lambda *_: 1.0)
    problems = [problem_of("small_cnn", 2, "eager", batch=16, size=8, seed=seed) for seed in range(8)]
    assert runs_at_once(EagerEngine(problems[0], eager_by_rule(problems[0])), problems)[0] == 3


def test_the_fused_engine_may_train_more_particles_when_few_weights_are_left(little_memory):
    """At a hundredth of the weights a particle takes about 2 vectors, not 6."""
    data = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    settings = {**SETTINGS, "particles": (1, 25), "prune": 0.99, "ticket_epochs": 0}
    assert len(fast_swamp(build_model("small_cnn", 3, 8, 8, 10), data, engine="fused", **settings).history) == 2
    with pytest.raises(MemoryError, match="25 particles take"):
        fast_swamp(build_model("small_cnn", 3, 8, 8, 10), data, engine="eager", **settings)
