"""Everything that a recipe may say at once: both engines and the naive loop give the same masks in float64."""

from __future__ import annotations

import math

import networks
import pytest
import torch
from equality import same

from swamp_fast import Recipe, fast_swamp, naive_swamp

SETTINGS = {
    "particles": 2, "epochs": 3, "ticket_epochs": 1, "batch_size": 24, "precision": "float64", "val": 0.2,
    "device": "cpu", "progress": False, "clip_norm": 1.0, "keep_particles": True, "accumulate": 2, "mixup": 0.4,
    "cutmix": 1.0, "average_every": 2, "swa_start": 0.3, "select_by": "margin",
    "target_density": 0.7,
}  # fmt: skip
GROUPS = [{"params": "head.*", "lr": 0.5, "weight_decay": 0.0}, {"params": ["norm*"], "lr": 2.0}]
WEIGHTS = torch.arange(1, 161, dtype=torch.float64)


def noisy(inputs, targets):
    return inputs + 0.05 * torch.randn_like(inputs), targets


def margin(outputs, targets):
    best = outputs.topk(2).values
    return best[:, 0] - best[:, 1]


WITH_SETTINGS = (
    {"average": "ema", "ema_decay": 0.7, "schedule": "linear", "warmup_epochs": 0.5, "lr": 0.05, "groups": GROUPS}
    | {"decay_norms_and_biases": False},
    Recipe(sample_weights=WEIGHTS, score=lambda weights: weights.abs().amin(0)),
)
WITH_CODE = (
    {"combine": "best"},
    Recipe(
        optimizer=lambda named: torch.optim.RMSprop(
            [{"params": [p], "lr": 1e-3 if p.ndim > 1 else 2e-3} for _, p in named], momentum=0.5
        ),
        schedule=lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps)),
        sample_weights=WEIGHTS,
    ),
)


@pytest.mark.parametrize("engine", ["eager:lanes", "eager:fold", "fused"])
@pytest.mark.parametrize(("settings", "recipe"), [WITH_SETTINGS, WITH_CODE], ids=["settings", "code"])
def test_everything_at_once(settings, recipe, engine, digits):
    arguments = {"recipe": recipe, "transform": noisy, "metrics": {"margin": margin}, **SETTINGS, **settings}
    model = networks.build("dropout")
    found = fast_swamp(model, *digits, engine=engine, **arguments)
    same(found, naive_swamp(model, *digits, **arguments), 1e-7)
    assert found.history[-1]["density"] == pytest.approx(0.7, abs=1e-3)
    assert found.history[-1]["val_margin"] > 0
