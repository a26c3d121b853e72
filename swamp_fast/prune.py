"""Which weights a cycle keeps."""

from __future__ import annotations

from torch import Tensor

from swamp_fast import ops


def kept_after(kept: int, prune: float) -> int:
    """How many of `kept` weights the next cycle keeps."""
    return round((1 - prune) * kept)


def check_cycles(kept: int, prune: float, cycles: int) -> None:
    """Refuse, before anything runs, more cycles than the weights allow."""
    left = kept
    for cycle in range(1, cycles + 1):
        before, left = left, kept_after(left, prune)
        if left < 1 or left == before:
            what = "nothing would be left to keep" if left < 1 else f"nothing would be pruned of {before}"
            raise ValueError(
                f"{cycles} cycles at prune = {prune} are more than {kept} weights allow: in cycle {cycle} {what}. "
                f"Ask for at most {cycle - 1} cycles."
            )


def pruned(average: Tensor, masks: Tensor, prune: float) -> Tensor:
    """The masks [R, Q] that keep the largest of the averages [R, P], by one global threshold a run."""
    keep = [kept_after(kept, prune) for kept in masks.sum(1).tolist()]
    return ops.global_threshold(average[:, : masks.shape[1]], masks, keep)[1]
