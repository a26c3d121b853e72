"""Runs that are stopped in the middle: settings of short ones, and what happens before their steps."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from swamp_fast.engines.trainer import Trainer

ALWAYS = 1e-9  # minutes: a checkpoint after every step
RUN = {"batch_size": 64, "cycles": 1, "epochs": 3, "ticket_epochs": 1, "particles": 2, "prune": 0.5, "progress": False}
STEPS = 3  # of an epoch: 160 samples
WAYS = {  # ways to run, as the setting `engine` names them
    "lanes": "eager:lanes",
    "fold": "eager:fold",
    "fold_grouped": "eager:fold_grouped",
    "fused": "fused",
    "by density": "fused@0.7,eager:lanes",
}


class Interrupted(BaseException):
    """Stands for the end of a process."""


@contextmanager
def before_steps(action=lambda trainer, step: None):
    """Call action(trainer, number) before each step of all trainings; gives their count, in a list."""
    step, count = Trainer.step, [0]

    def counted(trainer, handle):
        action(trainer, count[0])
        count[0] += 1
        step(trainer, handle)

    Trainer.step = counted
    try:
        yield count
    finally:
        Trainer.step = step


def stop_at(number: int):
    def stop(trainer, step):
        if step == number:
            raise Interrupted

    return stop


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
