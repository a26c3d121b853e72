"""Weights & Biases: the epochs and cycles of a run as charts of a W&B run. Its `fast_swamp` call is an example."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_a_run_is_logged(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra integrations, from pyproject.toml")
    import wandb

    from swamp_fast import SwampConfig, fast_swamp
    from swamp_fast.models import SmallCNN

    config = SwampConfig.quick(epochs=2, cycles=2, particles=2, progress=False)
    with wandb.init(project="swamp", mode="offline", dir=tmp_path, config=config.to_dict()) as run:
        run.define_metric("cycle/*", step_metric="cycle/cycle")

        def on_epoch(row):
            where = "ticket" if row["cycle"] is None else "training"
            run.log({f"{where}/particle {number}": loss for number, loss in enumerate(row["train_loss"])})

        def on_cycle(row):
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            run.log({f"cycle/{name}": value for name, value in numbers.items()})

        result = fast_swamp(SmallCNN(1, 10), "digits", config=config, on_epoch=on_epoch, on_cycle=on_cycle)

        logged = dict(run.summary)
    assert logged["cycle/cycle"] == 2
    assert logged["cycle/accuracy"] == result.history[-1]["accuracy"]
    assert logged["training/particle 1"] == result.history[-1]["train_loss"][1]
    assert "ticket/particle 0" in logged
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
