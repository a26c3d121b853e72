"""What the tests of recipes share: both drivers give the same masks, and no setting of a recipe is ignored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from swamp_fast import SwampResult, fast_swamp, naive_swamp
from swamp_fast.config import EFFECTIVE_WITH, default_of

TINY = {"particles": 2, "cycles": 1, "ticket_epochs": 0, "precision": "float64", "progress": False}
ONE_TRAINING = {**TINY, "particles": 1, "cycles": 0}
NEEDED = ("epochs", "batch_size", "ticket_epochs")  # a tiny run can't do without these


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


def ignored(model: nn.Module, train: object, recipe: dict[str, Any], **arguments: Any) -> list[str]:
    """The settings of a recipe without which a training ends in the same weights.

    Those at their defaults aren't tried, nor average="none", without which a short training averages one iterate.
    """

    def trained(settings: dict[str, Any]) -> list[torch.Tensor]:
        result = fast_swamp(copy.deepcopy(model), train, **arguments, **{**settings, **ONE_TRAINING})
        return [*result.state_dict.values()]

    whole, same = trained(recipe), []
    for name in recipe:
        if name in NEEDED or recipe[name] == default_of(name) or (name, recipe[name]) == ("average", "none"):
            continue
        left_out = {name, *(other for other, (setting, _) in EFFECTIVE_WITH.items() if setting == name)}
        without = {other: value for other, value in recipe.items() if other not in left_out}
        without |= {"schedule": "constant"} if name == "schedule" else {}  # "auto" may be the recipe's own
        if all(torch.equal(a, b) for a, b in zip(whole, trained(without), strict=True)):
            same.append(name)
    return same
