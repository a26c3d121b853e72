"""Warnings about a cycle. They are shown to the user and recorded in the cycle's history row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swamp_fast.common.format import percent

MAX_ACCURACY_GAP = 0.05  # an average further below its particles' mean accuracy shows that they share no basin


def found_in_cycle(
    row: Mapping[str, Any], masks: Mapping[str, Tensor], masks_before: Mapping[str, Tensor]
) -> list[str]:
    """Return warnings about layers that this cycle pruned completely, and about an average far below its particles."""
    return _emptied_layers(row["cycle"], masks, masks_before) + _average_outside_basin(row)


def dropped_text(cycle: int, lane: int, epoch: int) -> str:
    """Return the warning about a particle that diverged and was dropped."""
    return f"cycle {cycle}, epoch {epoch}: particle {lane} diverged to NaN or infinity and is left out of the average."


def show(texts: Sequence[str]) -> None:
    """Show each text as a UserWarning that points to the code that called the driver."""
    for text in texts:
        warnings.warn(text, UserWarning, stacklevel=5)


def _emptied_layers(cycle: int, masks: Mapping[str, Tensor], masks_before: Mapping[str, Tensor]) -> list[str]:
    return [
        f"cycle {cycle}: all weights of {name} are pruned."
        for name, mask in masks.items()
        if not bool(mask.any()) and (name not in masks_before or bool(masks_before[name].any()))
    ]


def _average_outside_basin(row: Mapping[str, Any]) -> list[str]:
    held_out = row["val_mean_accuracy"] is not None
    prefix, split = ("val_", "val") if held_out else ("", "test")
    mean, accuracy = row[f"{prefix}mean_accuracy"], row[f"{prefix}accuracy"]
    if mean is None or accuracy >= mean - MAX_ACCURACY_GAP:
        return []
    advice = (
        "Take a later ticket (more ticket_epochs)."
        if held_out
        else "To see whether a later ticket is better, pass validation data, such as val=0.1."
    )
    return [
        f"cycle {row['cycle']}: the averaged weights have {percent(accuracy)} accuracy on {split}, but the particles "
        f"have {percent(mean)} on average, so they did not train into one basin. {advice}"
    ]
