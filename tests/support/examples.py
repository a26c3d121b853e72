"""What the tests of recipes share: a recipe gives the same masks on the engine of the rule and in the naive loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from swamp_fast import SwampResult, fast_swamp, naive_swamp

TINY = {"particles": 2, "cycles": 1, "ticket_epochs": 0, "precision": "float64", "progress": False}


def same_masks(model: nn.Module, train: object, test: object, **recipe: Any) -> SwampResult:
    """Run both drivers with a recipe at a tiny size, and compare them. Returns the result of fast_swamp."""
    settings = {**recipe, **TINY}
    fast = fast_swamp(copy.deepcopy(model), train, test, **settings)
    naive = naive_swamp(copy.deepcopy(model), train, test, **settings)
    for name, mask in naive.masks.items():
        assert torch.equal(fast.masks[name], mask), name
    for row, expected in zip(fast.history, naive.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-9)
    assert fast.history[-1]["density"] < 0.81
    return fast
