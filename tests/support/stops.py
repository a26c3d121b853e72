"""Settings of short runs, and means to act before their steps, for example to interrupt them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from swamp_fast.engines.trainer import Trainer

ALWAYS = 1e-9  # minutes between checkpoints, so short that there is one after every step
RUN = {"batch_size": 64, "cycles": 1, "epochs": 3, "ticket_epochs": 1, "particles": 2, "prune": 0.5, "progress": False}
STEPS = 3  # steps per epoch of 160 samples
MODES = {  # execution mode -> the setting `engine`
    "lanes": "eager:lanes",
    "fold": "eager:fold",
    "fold_grouped": "eager:fold_grouped",
    "fused": "fused",
    "by density": "fused@0.7,eager:lanes",
}


class Interrupted(BaseException):
    """Raised in place of the sudden end of a process."""


@contextmanager
def before_steps(action=lambda trainer, step: None):
    """A context that calls action(trainer, number) before each training step, where number counts the steps from 0.

    Yields a list that holds the number of steps so far.
    """
    step, count = Trainer.step, [0]

    def counted(trainer, *handles):
        action(trainer, count[0])
        count[0] += 1
        step(trainer, *handles)

    Trainer.step = counted
    try:
        yield count
    finally:
        Trainer.step = step


def stop_at(number: int):
    """Return an action that interrupts the run before the step with this number."""

    def stop(trainer, step):
        if step == number:
            raise Interrupted

    return stop


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder by file name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
