"""torchmetrics: its objects as metrics, and one of them as `select_by`. The `fast_swamp` call is an example."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_its_objects_are_metrics():
    pytest.importorskip("torchmetrics", reason="needs the extra integrations, from pyproject.toml")
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

    from swamp_fast import SwampConfig, fast_swamp
    from swamp_fast.models import SmallCNN

    config = SwampConfig.quick(epochs=2, cycles=1, particles=3, combine="best", select_by="ece", progress=False)
    metrics = {
        "f1": MulticlassF1Score(10),
        "ece": MulticlassCalibrationError(10),
        "top1": MulticlassAccuracy(10, average="micro"),
    }
    result = fast_swamp(SmallCNN(1, 10), "digits", val=0.2, metrics=metrics, config=config)

    for row in result.history:
        assert row["top1"] == pytest.approx(row["accuracy"], abs=1e-6)
        assert row["ensemble_top1"] == pytest.approx(row["ensemble_accuracy"], abs=1e-6)
        assert row["val_ece"] == min(row["val_particle_ece"])  # its higher_is_better is False
        assert 0 < row["f1"] <= 1


@pytest.mark.slow
def test_engines_and_the_naive_loop_compute_the_same(digits, tmp_path):
    pytest.importorskip("torchmetrics", reason="needs the extra integrations, from pyproject.toml")
    import networks
    from equality import same
    from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

    from swamp_fast import fast_swamp, naive_swamp

    metrics = {"f1": MulticlassF1Score(10), "auroc": MulticlassAUROC(10)}  # AUROC keeps all outputs
    settings = {"epochs": 4, "ticket_epochs": 1, "batch_size": 32, "particles": 3, "cycles": 2, "progress": False}
    settings |= {"precision": "float64", "val": 0.2, "metrics": metrics, "combine": "best", "select_by": "auroc"}
    expected = naive_swamp(networks.build("residual"), *digits, **settings)
    for engine in ("eager", "fused"):
        folder = tmp_path / engine
        result = fast_swamp(networks.build("residual"), *digits, engine=engine, run_dir=folder, **settings)
        same(result, expected, 1e-6)
        metrics["auroc"].update(*_a_batch())  # a run's metrics may have been used before
        again = fast_swamp(networks.build("residual"), *digits, engine=engine, run_dir=folder, **settings)
        assert again == result
        metrics["auroc"].reset()


def _a_batch():
    import torch

    return torch.randn(20, 10), torch.arange(20) % 10
