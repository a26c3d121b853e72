"""Optuna: a search over settings that gives up a run after any cycle. Its `objective` is an example."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_a_search_prunes_runs_between_cycles():
    pytest.importorskip("optuna", reason="needs the extra integrations, from pyproject.toml")
    import optuna
    import torch

    from swamp_fast import SwampConfig, fast_swamp
    from swamp_fast.models import SmallCNN

    config = SwampConfig.quick(epochs=2, ticket_epochs=1, cycles=2, particles=2, progress=False)

    def objective(trial):
        def on_cycle(row):
            trial.report(row["val_accuracy"], step=row["cycle"])
            if trial.should_prune():
                raise optuna.TrialPruned  # its attribute `result` has the finished cycles

        torch.manual_seed(0)
        lr = trial.suggest_float("lr", 1e-6, 0.1, log=True)
        result = fast_swamp(SmallCNN(1, 10), "digits", val=0.2, config=config, lr=lr, on_cycle=on_cycle)
        return result.history[-1]["val_accuracy"]

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for lr in (0.05, 1e-6, 0.1):  # runs that the search does first
        study.enqueue_trial({"lr": lr})
    study.optimize(objective, n_trials=3)

    states = [trial.state.name for trial in study.trials]
    assert states[:2] == ["COMPLETE", "PRUNED"]
    assert list(study.trials[1].intermediate_values) == [0]  # it ended after cycle 0
    assert study.best_params["lr"] in (0.05, 0.1)
    assert sorted(study.trials[0].intermediate_values) == [0, 1, 2]


@pytest.mark.slow
def test_a_run_that_is_stopped_counts_with_the_cycles_it_has():
    pytest.importorskip("optuna", reason="needs the extra integrations, from pyproject.toml")
    import optuna

    from swamp_fast import StopRun, SwampConfig, fast_swamp
    from swamp_fast.models import SmallCNN

    config = SwampConfig.quick(epochs=2, ticket_epochs=1, cycles=3, particles=2, progress=False)

    def objective(trial):
        """The sparsity at which the average is still as accurate as at first, to half a point."""
        rows = []

        def on_cycle(row):
            rows.append(row)
            if row["val_accuracy"] < rows[0]["val_accuracy"] - 0.005:
                raise StopRun

        prune = trial.suggest_float("prune", 0.1, 0.9)
        result = fast_swamp(SmallCNN(1, 10), "digits", val=0.2, config=config, prune=prune, on_cycle=on_cycle)
        matching = [row for row in result.history if row["val_accuracy"] >= rows[0]["val_accuracy"] - 0.005]
        return 1 - min(row["density"] for row in matching)

    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"prune": 0.9})
    study.enqueue_trial({"prune": 0.3})
    study.optimize(objective, n_trials=2)
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
    assert 0 <= study.best_value < 1
