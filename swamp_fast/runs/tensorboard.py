"""TensorBoard events of a run: each particle and the average, over the epochs trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What a cycle's row holds, and what it is called. Lists have a number a particle.
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
    """Writes the events of one run, which a run that goes on continues.

    A step is an epoch: those of the ticket are 1 … ticket_epochs, the cycles' follow; a cycle's row is at its last.
    Raises ImportError without the package tensorboard.
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
        """Go on after what a run has finished, and so many epochs of the training after that.

        What its folder holds of later epochs is no longer shown.

        Where there are no events yet, the cycles' rows are written.
        """
        self.done = (self.before(len(rows)) if has_ticket else 0) + epochs
        if not self.folder.exists():
            for row in rows:
                self.cycle(row)

    def epoch(self, cycle: int | None, epoch: int, losses: list[float], first: int) -> None:
        """The mean training losses of an epoch, of particles from number `first` on; cycle None is the ticket's."""
        step = (0 if cycle is None else self.before(cycle)) + epoch + 1
        for particle, loss in enumerate(losses, first):
            name = "ticket" if cycle is None else f"particle {particle}"
            self._write(f"train_loss/{name}", loss, step)

    def cycle(self, row: dict[str, Any]) -> None:
        """A row of the history; in the file when this returns."""
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
        """Put what was written into the file."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()

    def before(self, cycle: int) -> int:
        """The epochs before a cycle's first."""
        return self.ticket_epochs + cycle * self.epochs

    def _write(self, tag: str, value: float, step: int) -> None:
        if self.writer is None:  # a run that is only read writes nothing
            self.writer = self.make(str(self.folder), purge_step=self.done + 1)
        self.writer.add_scalar(tag, value, step)
