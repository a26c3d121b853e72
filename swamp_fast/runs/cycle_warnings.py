"""What a user should not overlook about a cycle: shown as warnings, and kept in the cycle's row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swamp_fast.common.format import percent

FAR_BELOW = 0.05  # an average whose accuracy is this much below its particles' mean is not in their basin


def found_in_cycle(
    row: Mapping[str, Any], masks: Mapping[str, Tensor], masks_before: Mapping[str, Tensor]
) -> list[str]:
    """Warnings about layers that this cycle pruned away completely, and about an average far below its particles."""
    return _emptied_layers(row["cycle"], masks, masks_before) + _average_outside_basin(row)


def dropped_text(cycle: int, lane: int, epoch: int) -> str:
    """The warning about a particle that diverged and is left out."""
    return (
        f"cycle {cycle}, epoch {epoch}: particle {lane} diverged to NaN or infinity and is in no average of the cycle."
    )


def show(texts: Sequence[str]) -> None:
    """Warn the caller of the driver."""
    for text in texts:
        warnings.warn(text, UserWarning, stacklevel=5)


def _emptied_layers(cycle: int, masks: Mapping[str, Tensor], masks_before: Mapping[str, Tensor]) -> list[str]:
    return [
        f"cycle {cycle}: nothing of {name} is left; the layer is pruned away completely."
        for name, mask in masks.items()
        if not bool(mask.any()) and (name not in masks_before or bool(masks_before[name].any()))
    ]


def _average_outside_basin(row: Mapping[str, Any]) -> list[str]:
    held_out = row["val_mean_accuracy"] is not None
    prefix, split = ("val_", "val") if held_out else ("", "test")
    mean, accuracy = row[f"{prefix}mean_accuracy"], row[f"{prefix}accuracy"]
    if mean is None or accuracy >= mean - FAR_BELOW:
        return []
    advice = (
        "Take a later ticket (more ticket_epochs)."
        if held_out
        else "To see whether a later ticket is better, pass validation data: `val`, such as 0.1."
    )
    return [
        f"cycle {row['cycle']}: the average has {percent(accuracy)} accuracy on {split}, its particles "
        f"{percent(mean)} on average: they did not train into one basin. {advice}"
    ]
