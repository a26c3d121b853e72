"""The predicted memory of a run, against that of the tensors that the run holds at once."""

from __future__ import annotations

import gc

import pytest
import torch

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
@pytest.mark.parametrize(
    "model", ["small_cnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "resnet20"))]
)
def test_predicted_as_allocated(model, particles, engine, monkeypatch):
    problem = problem_of(model, particles, engine, batch=64)
    expected = measured(problem, monkeypatch)
    found = predicted(problem).bytes(particles)
    print(f"{model} {particles} {engine}: predicted {found / 1e6:.1f} MB, {found / expected:.2f} of the measured")
    assert found == pytest.approx(expected, rel=TOLERANCE)


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
