"""SwampResult: the result that a run returns, which can also be loaded from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.checked import checked, checked_path, shown
from swamp_fast.common.copying import copy_of, uncompiled
from swamp_fast.config import SwampConfig
from swamp_fast.particles.spectral_norms import compute_weights
from swamp_fast.runs.display import result_html, summary_lines
from swamp_fast.runs.folder import Packed, RunDirectory, Snapshot, read_snapshot

# The scores in a row of the history, in the row's order; see SwampResult.
SCORES = (
    "accuracy",
    "loss",
    "particle_accuracy",
    "particle_loss",
    "best_accuracy",
    "mean_accuracy",
    "ensemble_accuracy",
    "val_accuracy",
    "val_mean_accuracy",
)
# The scores that a sweep summarises over its seeds.
SUMMARY_SCORES = ("accuracy", "loss", "mean_accuracy", "best_accuracy", "ensemble_accuracy", "val_accuracy")
# The scores that an analysis of a run computes for each solution.
ANALYSIS_SCORES = ("train_loss", "train_error", "test_loss", "test_error")


@dataclass(eq=False, repr=False)
class SwampResult:
    """The averaged, pruned models of all cycles, and the history of the run.

    Attributes:
        history: one plain dict per cycle 0 … C, as in history.jsonl. Its keys: cycle, particles (their number), density
            (kept / prunable), kept, accuracy and loss (of the average, on test data), particle_accuracy and
            particle_loss (lists), best_accuracy (of the particle that is best on val, according to `select_by`; None
            without val), mean_accuracy (of the particles), ensemble_accuracy, val_accuracy and val_mean_accuracy, flops
            (of one sample's forward pass; 2 per multiply-add), train_loss (a list), train_seconds (of the training
            steps and checkpoints; runs that share a bank have equal shares), dropped (the lane and epoch of each
            particle that diverged; the average and the lists leave these particles out), seconds, peak_memory (bytes),
            warnings. Accuracies are fractions, or None without test data. A metric that is named "mae" has the keys mae
            (of the average, on test data), particle_mae (a list) and ensemble_mae, and on validation data val_mae,
            val_particle_mae and val_ensemble_mae; those of a missing split are None. With combine="best", the best
            particle replaces the average.
        ticket: name -> tensor, the matching ticket's parameters and buffers.
        particles: name -> [N, ...], the particles of the last cycle (their SWA means); None without keep_particles.
        engine: the engine, its choices, and the reasons for them.
        config: the settings.
        standardise: the mean and std [C] of pixel / 255 by which uint8 pictures were standardised; None for other data.
    """

    history: list[dict[str, Any]]
    ticket: dict[str, Tensor]
    particles: dict[str, Tensor] | None
    engine: dict[str, Any]
    config: SwampConfig
    standardise: dict[str, list[float]] | None
    snapshots: list[Packed | Path] = field(repr=False)  # each cycle: compact in memory, or its file's path
    about: dict[str, Any] = field(repr=False)
    template: nn.Module | None = field(repr=False, default=None)

    def __repr__(self) -> str:
        """Return at most five lines: what was reached, with which model, how, by which engine, and where it is."""
        return "\n".join(self._summary())

    def _repr_html_(self) -> str:
        """Return a table of the cycles and a picture of the scores over density, for notebooks."""
        return result_html(self._summary(), self.history)

    def __eq__(self, other: object) -> bool:
        """Whether two results have the same bits: the ticket, and the average and the masks of every cycle."""
        if not isinstance(other, SwampResult):
            return NotImplemented
        if len(self.snapshots) != len(other.snapshots) or not _same_tensors(self.ticket, other.ticket):
            return False
        pairs = ((self._snapshot(cycle), other._snapshot(cycle)) for cycle in range(len(self.snapshots)))
        return all(_same_tensors(a.state, b.state) and _same_tensors(a.masks, b.masks) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, the engine, the machine, how uint8 pictures are standardised, and the history."""
        about = {name: self.about.get(name) for name in ("driver", "version", "began", "place", "moved")}
        rows = {"engine": self.engine, "standardise": self.standardise, "history": self.history}
        return {**about, "config": self.config.to_dict(), **rows}

    @cached_property
    def model(self) -> nn.Module:
        """The last cycle's average as a plain module in eval mode.

        Its BatchNorm statistics are re-estimated, and its pruned weights are exactly 0.
        """
        return self.at(len(self.snapshots) - 1)[0]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The last cycle's masks: parameter name -> bool tensor, False for pruned weights."""
        return self._snapshot(len(self.snapshots) - 1).masks

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The parameters and buffers of the last cycle's average: name -> tensor."""
        return self._snapshot(len(self.snapshots) - 1).state

    def at(self, cycle: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the average of a cycle as a plain module, and its masks.

        Raises ValueError for a result that was loaded without a model, and IndexError for an unknown cycle.
        """
        snapshot = self._snapshot(checked("cycle", cycle, int))
        if self.template is None:
            raise ValueError(
                "this result was loaded without a model; call SwampResult.load(dir, model), or use state_dict, masks "
                "and history."
            )
        return module_of(self.template, snapshot.state), snapshot.masks

    def save(self, directory: str | Path) -> None:
        """Write the run to a new or empty folder, with the same files as a run_dir.

        Raises FileExistsError if the folder holds files, ValueError if there can't be such a folder, TypeError if it is
        no path, and OSError if a file can't be written.
        """
        folder = RunDirectory(checked_path("directory", directory))
        if not folder.is_empty():
            raise FileExistsError(f"{folder.path} must be an empty or new folder, but it holds files; name another.")
        folder.create(self.about, self.config.to_toml())
        folder.write_ticket(self.ticket)
        for cycle in range(len(self.snapshots)):
            folder.write_cycle(cycle, self._snapshot(cycle), self.history[: cycle + 1])
        if self.particles is not None:
            folder.write_particles(len(self.history) - 1, self.particles)
        self.write_final(folder)

    def write_final(self, folder: RunDirectory) -> None:
        """Write the files that only a finished run has, into the folder of this run."""
        checked("folder", folder, RunDirectory, advice="A result is written to a path by `save`.")
        state = self.model.state_dict() if self.template is not None else self.state_dict
        folder.write_final(len(self.history) - 1, state, self.masks)

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module | None = None) -> SwampResult:
        """Load a result from a run's folder.

        model  a model of the run's architecture; without it, `.model` and `.at` are not available

        Raises ValueError or FileNotFoundError if the folder isn't a run's or is damaged, or if the model doesn't
        fit; TypeError for another kind of directory or model.
        """
        folder = RunDirectory(checked_path("directory", directory))
        if model is not None:
            checked("model", model, nn.Module, advice="Pass the model itself, not its class or its name.")
        if folder.is_empty():
            raise FileNotFoundError(f"{folder.path} holds no run of swamp_fast; name a run's run_dir.")
        about = folder.about()
        done = folder.cycles_done()
        if done == 0:
            raise ValueError(
                f"{folder.path}: no cycle of this run is finished, so there is no model yet; continue the run first."
            )
        config = SwampConfig.of(None, about["config"])
        history = [folder.cycle(cycle).row for cycle in range(done)]
        ticket, particles = folder.ticket(), folder.particles(done - 1)
        _refuse_incomplete(folder, done, config, ticket, particles)
        if model is not None and any(tensor.is_meta for tensor in model.state_dict().values()):
            raise ValueError("`model` is on the meta device, which holds no values; pass a model on the CPU or a GPU.")
        paths: list[Packed | Path] = [folder.cycle_path(cycle) for cycle in range(done)]
        result = cls(
            history=history,
            ticket=ticket or {},
            particles=particles,
            engine=about["engine"],
            config=config,
            standardise=about["standardise"],
            snapshots=paths,
            about=about,
            template=None if model is None else copy_of(uncompiled(model)),
        )
        if model is not None:
            result.at(done - 1)  # raises here, rather than later, if the model doesn't fit
        return result

    def _summary(self) -> list[str]:
        model = "a run loaded without its model" if self.template is None else type(self.template).__name__
        return summary_lines(model, self.config, self.history, self.engine)

    def _snapshot(self, cycle: int) -> Snapshot:
        if not 0 <= cycle < len(self.snapshots):
            raise IndexError(f"`cycle` must lie in 0 … {len(self.snapshots) - 1}, got {shown(cycle)}.")
        return snapshot_of(self.snapshots[cycle])


def _refuse_incomplete(
    folder: RunDirectory,
    done: int,
    config: SwampConfig,
    ticket: dict[str, Tensor] | None,
    particles: dict[str, Tensor] | None,
) -> None:
    """Raise ValueError if a folder lacks files that a run with `done` completed cycles has written."""
    missing = [] if ticket is not None else ["ticket.safetensors"]
    if done <= config.cycles:
        last = folder.final_cycle()
        if folder.later_cycles(done) or (last is not None and last >= done):
            missing.append(folder.cycle_path(done).name)
    elif config.keep_particles and particles is None:
        missing.append("particles.safetensors")
    if missing:
        raise ValueError(
            f"{folder.path} lacks {' and '.join(missing)}, which this run has written. Restore the file, or repeat the "
            "call that made the run, which computes it again."
        )


def _same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two dicts have the same names and equal tensors; NaN equals NaN."""
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape
        and tensor.dtype == other[name].dtype
        and torch.equal(tensor.nan_to_num(nan=0.0), other[name].nan_to_num(nan=0.0))
        and torch.equal(tensor.isnan(), other[name].isnan())
        for name, tensor in one.items()
    )


def snapshot_of(kept: Packed | Path) -> Snapshot:
    """Return a cycle's snapshot from its compact form in memory or from its file."""
    return read_snapshot(kept) if isinstance(kept, Path) else Snapshot.unpacked(*kept)


def module_of(template: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the template in eval mode, with the parameters and buffers of `state`.

    Raises ValueError if the names or shapes in `state` differ from the template's.
    """
    module = copy_of(template)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if set(own) != set(state):
        missing, foreign = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        raise ValueError(
            f"the model doesn't fit this run: the model lacks {foreign or 'nothing'} that the run has, and the run "
            f"lacks {missing or 'nothing'} that the model has. Pass the architecture that was pruned."
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"the model doesn't fit this run: {name} has shape {list(tensor.shape)}, but in the run it has shape "
                f"{list(state[name].shape)}. Pass the architecture that was pruned."
            )
        with torch.no_grad():
            tensor.data = state[name].to(tensor.device, copy=True)
    compute_weights(module)
    return module.eval()
