"""The engines: eager (any model, any device). Each trains a bank of particles, and runs models side by side."""

from __future__ import annotations

from swamp_fast.engines.eager import Choice, EagerEngine, choose
from swamp_fast.problem import Problem
from swamp_fast.run import Run

Engine = EagerEngine


def start_engine(problem: Problem, run: Run) -> Engine:
    """The engine that the settings ask for; what a stopwatch chose is recorded in the run, and replayed from it.

    Raises ValueError for an engine that can't be had.
    """
    if problem.config.engine == "fused":
        raise ValueError('engine="fused" can\'t be had: this version has no fused engine yet; use "auto" or "eager".')
    if "way" in run.engine:
        missing = [name for name in Choice.__dataclass_fields__ if name not in run.engine]
        if missing:
            raise ValueError(
                f"the run's run.json is damaged: its engine lacks {', '.join(missing)}. Name another run_dir to start "
                "afresh."
            )
        choice = Choice(**{name: run.engine[name] for name in Choice.__dataclass_fields__})
    else:
        most = max(problem.config.particles_at(cycle) for cycle in range(problem.config.cycles + 1))
        run.console.status("trying how the particles run fastest")
        choice = choose(problem, most)
    engine = EagerEngine(problem, choice)
    if not run.engine:
        run.keep_engine(engine.describe())
    threads = f", {_threads()} threads" if problem.device.type == "cpu" else ""
    run.console.line(f"engine   eager on {problem.device}{threads}, {problem.config.precision}; {choice}")
    return engine


def _threads() -> int:
    import torch

    return torch.get_num_threads()
