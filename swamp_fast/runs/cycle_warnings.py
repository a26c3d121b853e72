"""Warnings about a cycle. They are shown to the user and recorded in the cycle's history row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swamp_fast.common.format import percent
from swamp_fast.common.warn import warn_user
from swamp_fast.config import SwampConfig
from swamp_fast.particles.schedule import average_samples
from swamp_fast.problem.metrics import keys_of, names_in

MAX_ACCURACY_GAP = 0.05  # an average further below its particles' mean accuracy shows that they share no basin


def found_in_cycle(
    row: Mapping[str, Any], state: Mapping[str, Tensor], masks: Mapping[str, Tensor], masks_before: Mapping[str, Tensor]
) -> list[str]:
    """Return warnings about a cycle.

    They are about layers that it pruned completely, an average far below its particles, and values that are not finite.
    """
    cycle = row["cycle"]
    return _emptied_layers(cycle, masks, masks_before) + _average_outside_basin(row) + _not_finite(row, state)


def found_in_settings(config: SwampConfig, steps_per_epoch: int) -> list[str]:
    """Return warnings about settings that are allowed but unlikely to be meant."""
    samples = average_samples(config, steps_per_epoch, config.epochs * steps_per_epoch)
    if config.average == "none" or samples > 1:
        return []
    every = f", average_every = {config.average_every}" if config.average_every else ""
    return [
        f"the averaging window has one sample, as epochs = {config.epochs} and swa_start = {config.swa_start}{every}, "
        "so each particle is its last iterate. Train for more epochs, lower `swa_start`, or set "
        'average="none".'
    ]


def _not_finite(row: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    texts = []
    names = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if names:
        texts.append(
            f"cycle {row['cycle']}: {', '.join(names)} of the average {'is' if len(names) == 1 else 'are'} not finite."
        )
    losses = {"loss": [row["loss"]], "particle_loss": row["particle_loss"] or []}
    bad = [name for name, values in losses.items() if any(v is not None and not math.isfinite(v) for v in values)]
    if bad:
        texts.append(
            f"cycle {row['cycle']}: {' and '.join(bad)} on test data {'is' if len(bad) == 1 else 'are'} not finite, "
            "which files hold as null."
        )
    of_metrics = {key: row[key] for name in names_in(row) for key in keys_of(name) if row[key] is not None}
    bad = [
        key
        for key, value in of_metrics.items()
        if not all(math.isfinite(each) for each in (value if isinstance(value, list) else [value]))
    ]
    if bad:
        texts.append(
            f"cycle {row['cycle']}: {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite, which files hold "
            "as null."
        )
    return texts


def dropped_text(cycle: int, lane: int, epoch: int) -> str:
    """Return the warning about a particle that diverged and was dropped."""
    return f"cycle {cycle}, epoch {epoch}: particle {lane} diverged to NaN or infinity and is left out of the average."


def show(texts: Sequence[str]) -> None:
    """Show each text as a UserWarning that points to the code that called the driver."""
    for text in texts:
        warn_user(text)


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
