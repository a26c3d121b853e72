"""Writes a run's TensorBoard events: the scores of each particle and of the average, over the trained epochs."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swamp_fast.problem.metrics import keys_of, names_in

# Key of a history row -> TensorBoard tag. A value that is a list has one number per particle.
TAGS = {
    "accuracy": "accuracy/average",
    "particle_accuracy": "accuracy/particle",
    "mean_accuracy": "accuracy/particles' mean",
    "best_accuracy": "accuracy/best particle",
    "ensemble_accuracy": "accuracy/ensemble",
    "val_accuracy": "val_accuracy/average",
    "val_mean_accuracy": "val_accuracy/particles' mean",
    "loss": "loss/average",
    "particle_loss": "loss/particle",
    "density": "density",
    "train_seconds": "seconds/training",
    "seconds": "seconds/cycle",
}


class Events:
    """Writes the events of one run. A resumed run continues the events that were written before.

    TensorBoard's horizontal axis counts epochs: first the ticket's, 1 … ticket_epochs, then those of the cycles. A
    cycle's scores are written at its last epoch. Raises ImportError if the package tensorboard is missing.
    """

    def __init__(self, folder: Path, ticket_epochs: int, epochs: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard events need the package tensorboard: `pip install "swamp-fast[tensorboard]"`, or set '
                "tensorboard=False."
            ) from error
        self.make, self.folder, self.ticket_epochs, self.epochs = SummaryWriter, folder, ticket_epochs, epochs
        self.done = 0
        self.writer: SummaryWriter | None = None

    def resume(self, rows: list[dict[str, Any]], has_ticket: bool, epochs: int) -> None:
        """Continue after the completed cycles and the first `epochs` epochs of the training that follows them.

        TensorBoard hides events of later epochs, which an interrupted run may have written. If there are no events yet,
        the scores of the completed cycles are written.
        """
        self.done = (self.before(len(rows)) if has_ticket else 0) + epochs
        if not self.folder.exists():
            for row in rows:
                self.cycle(row)

    def epoch(self, cycle: int | None, epoch: int, losses: list[float], first: int) -> None:
        """Write an epoch's mean training losses.

        cycle   None for the ticket's training
        losses  of the particles `first`, `first` + 1, and so on
        """
        step = (0 if cycle is None else self.before(cycle)) + epoch + 1
        for particle, loss in enumerate(losses, first):
            name = "ticket" if cycle is None else f"particle {particle}"
            self._write(f"train_loss/{name}", loss, step)

    def cycle(self, row: dict[str, Any]) -> None:
        """Write the scores in a row of the history, and flush the file."""
        step = self.before(row["cycle"] + 1)
        dropped = {each["lane"] for each in row["dropped"]}
        left = [particle for particle in range(row["particles"]) if particle not in dropped]
        for name, tag in {**TAGS, **_tags_of_metrics(row)}.items():
            value = row.get(name)
            if isinstance(value, list):
                for particle, each in zip(left, value, strict=True):
                    self._write(f"{tag} {particle}", each, step)
            elif value is not None:
                self._write(tag, value, step)
        self.flush()

    def flush(self) -> None:
        """Flush the event file, if there is one."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Close the event file, if there is one."""
        if self.writer is not None:
            self.writer.close()

    def before(self, cycle: int) -> int:
        """Return the number of epochs before a cycle, including the ticket's."""
        return self.ticket_epochs + cycle * self.epochs

    def _write(self, tag: str, value: float, step: int) -> None:
        if self.writer is None:  # made here, so that reopening a finished run writes no file
            _wait_for_a_later_name(self.folder)
            self.writer = self.make(str(self.folder), purge_step=self.done + 1)
        self.writer.add_scalar(tag, value, step)


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a new event file comes after the others, which TensorBoard reads in the order of their names.

    A name begins with the second in which the file was made. Two of one process and second would be ordered by a
    counter, as text: 10 before 9.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    while seconds and (now := datetime.now(UTC).timestamp()) < max(seconds) + 1 <= now + 1:
        time.sleep(0.02)


def _tags_of_metrics(row: dict[str, Any]) -> dict[str, str]:
    """Return the tags of the user's metrics in a row of the history, as in TAGS."""
    kinds = ("average", "particle", "ensemble")
    tags = [(split, kind) for split in ("", "val_") for kind in kinds]
    return {
        key: f"{split}{name}/{kind}"
        for name in names_in(row)
        for key, (split, kind) in zip(keys_of(name), tags, strict=True)
    }
