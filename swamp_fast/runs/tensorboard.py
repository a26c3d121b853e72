"""TensorBoard events of a run: each particle and the average, over the epochs trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Keys of a cycle's row, and their tags. Lists hold one number per particle.
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
    """Writes the events of one run; a resumed run continues them.

    A step on TensorBoard's axis is an epoch: first the ticket's, 1 … ticket_epochs, then those of the cycles. A cycle's
    row is written at its last epoch. Raises ImportError without the package tensorboard.
    """

    def __init__(self, folder: Path, ticket_epochs: int, epochs: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard events need the package tensorboard: `pip install "swamp-fast[tensorboard]"`, or leave '
                "`tensorboard` off."
            ) from error
        self.make, self.folder, self.ticket_epochs, self.epochs = SummaryWriter, folder, ticket_epochs, epochs
        self.done = 0
        self.writer: SummaryWriter | None = None

    def resume(self, rows: list[dict[str, Any]], has_ticket: bool, epochs: int) -> None:
        """Continue after the completed cycles, and after `epochs` epochs of the training that follows them.

        Events of later epochs are no longer shown. If there are no events yet, the rows of the cycles are written.
        """
        self.done = (self.before(len(rows)) if has_ticket else 0) + epochs
        if not self.folder.exists():
            for row in rows:
                self.cycle(row)

    def epoch(self, cycle: int | None, epoch: int, losses: list[float], first: int) -> None:
        """Write an epoch's mean training losses of particles `first`, `first` + 1, …; cycle None is the ticket."""
        step = (0 if cycle is None else self.before(cycle)) + epoch + 1
        for particle, loss in enumerate(losses, first):
            name = "ticket" if cycle is None else f"particle {particle}"
            self._write(f"train_loss/{name}", loss, step)

    def cycle(self, row: dict[str, Any]) -> None:
        """Write a row of the history, and flush it."""
        step = self.before(row["cycle"] + 1)
        dropped = {each["lane"] for each in row["dropped"]}
        left = [particle for particle in range(row["particles"]) if particle not in dropped]
        for name, tag in TAGS.items():
            value = row.get(name)
            if isinstance(value, list):
                for particle, each in zip(left, value, strict=True):
                    self._write(f"{tag} {particle}", each, step)
            elif value is not None:
                self._write(tag, value, step)
        self.flush()

    def flush(self) -> None:
        """Flush the file."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()

    def before(self, cycle: int) -> int:
        """How many epochs come before a cycle."""
        return self.ticket_epochs + cycle * self.epochs

    def _write(self, tag: str, value: float, step: int) -> None:
        if self.writer is None:  # a complete run that is only opened again writes nothing
            self.writer = self.make(str(self.folder), purge_step=self.done + 1)
        self.writer.add_scalar(tag, value, step)
