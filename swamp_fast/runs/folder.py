"""A run's folder on disk. It holds plain files; each is written atomically, and loading one executes no code.

Every file that is read back says to which run it belongs and what it holds, and has a checksum. A damaged file is
renamed, never deleted, and the run continues from the last intact one. A file that can't be read for another reason,
such as its permissions, stops the run with an error and stays as it is. `config.toml`, `history.jsonl`,
`model.safetensors` and `masks.safetensors` are copies for the user; the run never reads them.

run.json                description of the run: settings, fingerprints, versions, start time, the engine's choices
config.toml             the settings alone, from which another run can be started
history.jsonl           one line per cycle
ticket.safetensors      the ticket's parameters and buffers
cycle_00.safetensors …  each cycle's average in compact form: values/NAME has the kept weights in order, mask/NAME the
                        mask's bits (numpy.packbits), state/NAME every other tensor, and score/NAME the kept weights'
                        mask_score if masks rank something other than the average; the metadata has shapes and row
model.safetensors       the last cycle's average as a plain state dict, for load_state_dict
masks.safetensors       the last cycle's masks, bool
particles.safetensors   with keep_particles, the particles of the last cycle, [N, ...]
training.safetensors    checkpoint of the unfinished training between two steps: the tensors that a step changes,
                        without the pruned weights (NAME/kept, NAME/rest), buffers/NAME, loss_sum, and the number of
                        steps done. The checkpoint before it is training.previous.safetensors. Both are deleted when
                        the training is complete
lock                    the name of the process that runs in the folder
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from swamp_fast.config import LENGTH_SETTINGS, SwampConfig
from swamp_fast.runs import lock
from swamp_fast.runs.files import (
    Damaged,
    as_json,
    check_readable,
    is_there,
    load_tensors,
    part_of,
    read_json,
    save_tensors,
    write,
    write_json,
)

FORMAT = "swamp_fast 3"
# The files that a run which was killed right at its start may leave behind.
STALE_FILES = ("config.toml", "config.toml.part", "run.json.part", lock.NAME)


Packed = tuple[dict[str, Tensor], dict[str, str]]  # the tensors and the metadata of a file
Content = TypeVar("Content")


class OtherFormat(ValueError):
    """Raised for the folder of a run that another version of swamp_fast wrote in another format."""


@dataclass(frozen=True)
class Unfinished:
    """The state of an unfinished training between two steps.

    cycle    None for the ticket's training
    dropped  lane of a diverged particle -> the epoch, counted from 1, in which it diverged
    seconds  how long the training took so far
    tensors  the content of training.safetensors
    """

    cycle: int | None
    dropped: dict[int, int]
    seconds: float
    tensors: dict[str, Tensor]

    @property
    def steps(self) -> int:
        """The number of steps done."""
        return int(self.tensors["done"])

    def packed(self) -> Packed:
        """Return the tensors and the metadata of the checkpoint's file."""
        about = {"cycle": self.cycle, "dropped": list(self.dropped.items()), "seconds": self.seconds}
        return self.tensors, {"training": json.dumps(about)}

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Unfinished:
        """Read what `packed` returned."""
        about = json.loads(metadata["training"])
        return cls(about["cycle"], dict(about["dropped"]), about["seconds"], tensors)


@dataclass(frozen=True)
class Snapshot:
    """One cycle's average, its masks and its row of the history.

    state  the average's parameters and buffers
    masks  bool masks of the prunable parameters
    row    the cycle's row of the history
    score  the mask_score of the prunable parameters; empty if masks rank the average's |w|
    """

    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    row: dict[str, Any]
    score: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ranked(self) -> dict[str, Tensor]:
        """The tensors that the global threshold ranks: the state, with `score` in place of the prunable parameters."""
        return {**self.state, **self.score}

    def packed(self) -> Packed:
        """Return the compact tensors and the metadata of the cycle's file."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state.items():
            if name in self.masks:
                mask = self.masks[name].cpu()
                tensors[f"values/{name}"] = tensor.detach().cpu()[mask]
                tensors[f"mask/{name}"] = torch.from_numpy(np.packbits(mask.numpy()))
                if name in self.score:
                    tensors[f"score/{name}"] = self.score[name].cpu()[mask]
            else:
                tensors[f"state/{name}"] = tensor.detach().cpu().clone()
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        order = list(self.state)
        return tensors, {
            "shapes": json.dumps(shapes),
            "order": json.dumps(order),
            "row": as_json(self.row),
        }

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Snapshot:
        """Read what `packed` returned."""
        shapes = json.loads(metadata["shapes"])
        state, masks, score = {}, {}, {}
        for name in json.loads(metadata["order"]):
            if name not in shapes:
                state[name] = tensors[f"state/{name}"]
                continue
            shape = shapes[name]
            count = int(np.prod(shape))
            bits = np.unpackbits(tensors[f"mask/{name}"].numpy(), count=count)
            masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
            state[name] = _spread(tensors[f"values/{name}"], masks[name])
            if f"score/{name}" in tensors:
                score[name] = _spread(tensors[f"score/{name}"], masks[name])
        return cls(state, masks, json.loads(metadata["row"]), score)


def _spread(kept: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor of the mask's shape with the kept weights where the mask is True and zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=kept.dtype).masked_scatter_(mask, kept)


class RunDirectory:
    """Reads and writes the files in the folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()  # the working directory may change
        self.run = ""  # the run's origin_id, once it is known

    def create(self, about: dict[str, Any], settings: str) -> None:
        """Make the folder, and write run.json from `about` and config.toml from `settings`, a TOML text."""
        self.make()
        self.write_about(about, settings)

    def make(self) -> None:
        """Make the folder if it doesn't exist. Raises ValueError if that is not possible."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"run_dir {self.path} must be a folder, but it is a file.")
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir {self.path} can't be made ({error}); name another folder.") from error

    def is_empty(self) -> bool:
        """Whether the folder is missing or empty; files that a run left when it was killed at its start don't count."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir {self.path} must be a folder, but it is a file.")
        return not self.path.exists() or all(entry.name in STALE_FILES for entry in self.path.iterdir())

    def write_about(self, about: dict[str, Any], settings: str | None = None) -> None:
        """Write run.json, and config.toml if `settings`, a TOML text, are given."""
        self.run = origin_id(about)
        if settings is not None:
            write(self.path / "config.toml", settings.encode())
        write_json(self.path / "run.json", {"format": FORMAT, "run": self.run, "kind": "run", **about})

    def about(self) -> dict[str, Any]:
        """Return the content of run.json.

        Raises ValueError if it is missing or of another format version, Damaged if it is damaged, and OSError if it
        can't be read.
        """
        path = self.path / "run.json"
        if not is_there(path):
            raise ValueError(
                f"{self.path} holds files but no run.json, so it is not a run of swamp_fast; name an empty or new "
                "folder."
            )
        self._refuse_other_format(path)
        about = read_json(path)
        self.run = origin_id(about)
        return about

    def _refuse_other_format(self, path: Path) -> None:
        """Raise ValueError if run.json is whole but of another format version, whose files have no checksum here."""
        check_readable(path)
        try:
            about = json.loads(path.read_bytes())
        except ValueError:
            return  # damaged, which `read_json` reports
        if isinstance(about, dict) and about.get("format", FORMAT) != FORMAT:
            raise OtherFormat(
                f'{path} has the format "{about["format"]}", but this version reads "{FORMAT}"; read it with the '
                f"version of swamp_fast that wrote it ({about.get('version', 'unknown')})."
            )

    def write_ticket(self, state: Mapping[str, Tensor]) -> None:
        """Write the ticket's file."""
        self._save("ticket.safetensors", "ticket", None, state)

    def ticket(self) -> dict[str, Tensor] | None:
        """Return the ticket's parameters and buffers, or None if it is not trained yet."""
        path = self.path / "ticket.safetensors"
        return self._load(path, "ticket")[0] if is_there(path) else None

    def write_cycle(self, cycle: int, snapshot: Snapshot, rows: list[dict[str, Any]]) -> None:
        """Write a cycle's file, and the history up to this cycle."""
        tensors, metadata = snapshot.packed()
        self._save(self.cycle_path(cycle).name, "cycle", cycle, tensors, metadata)
        self.write_history(rows)

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Write history.jsonl."""
        write(self.path / "history.jsonl", "".join(as_json(row) + "\n" for row in rows).encode())

    def write_particles(self, cycle: int, states: Mapping[str, Tensor]) -> None:
        """Write the particles of a cycle; `states` has [N, ...] for each name."""
        self._save("particles.safetensors", "particles", cycle, states)

    def particles(self, cycle: int) -> dict[str, Tensor] | None:
        """Return the particles of a cycle, name -> [N, ...], or None if the folder doesn't have them."""
        path = self.path / "particles.safetensors"
        if not is_there(path):
            return None
        tensors, metadata = self._load(path, "particles")
        return tensors if metadata["cycle"] == str(cycle) else None

    def write_final(self, cycle: int, state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Write the last cycle's average and masks in plain form, for the user."""
        self._save("model.safetensors", "model", cycle, state)
        self._save("masks.safetensors", "masks", cycle, masks)

    def final_cycle(self) -> int | None:
        """Return the cycle whose average model.safetensors has; None if there is no such file of this run."""
        path = self.path / "model.safetensors"
        if not is_there(path):
            return None
        try:
            return int(self._load(path, "model")[1]["cycle"])
        except ValueError:  # the user's own file, or a damaged one: it is a copy that nothing depends on
            return None

    def cycle_path(self, cycle: int) -> Path:
        """Return the path of a cycle's file."""
        return self.path / f"cycle_{cycle:02d}.safetensors"

    def cycle(self, cycle: int) -> Snapshot:
        """Read a cycle's file."""
        path = self.cycle_path(cycle)
        tensors, metadata = self._load(path, "cycle")
        if metadata["cycle"] != str(cycle):
            raise ValueError(
                f"{path} holds cycle {metadata['cycle']}: it was renamed. Move it away to train cycle {cycle} again."
            )
        return unpacked(Snapshot.unpacked, path, tensors, metadata)

    def write_training(self, state: Unfinished) -> None:
        """Write a checkpoint of the unfinished training; the checkpoint before it is kept as well."""
        tensors, metadata = state.packed()
        newest, previous = self.training_paths()
        self._save(newest.name, "training", state.cycle, tensors, metadata, previous)

    def training(self, path: Path) -> Unfinished:
        """Read a checkpoint of an unfinished training."""
        return unpacked(Unfinished.unpacked, path, *self._load(path, "training"))

    def training_paths(self) -> tuple[Path, Path]:
        """Return the paths of the unfinished training's two checkpoints, the newest first."""
        return self.path / "training.safetensors", self.path / "training.previous.safetensors"

    def forget_training(self) -> None:
        """Delete the checkpoints of a training that is complete."""
        newest, previous = self.training_paths()
        for path in (newest, previous, part_of(newest)):
            path.unlink(missing_ok=True)

    def set_aside(self, path: Path, why: str = "damaged") -> Path:
        """Rename a file that can't be used, adding `why` to its name. Returns its new path."""
        names = [f"{path.name}.{why}", *(f"{path.name}.{why}{number}" for number in range(2, 100))]
        to = next(to for name in names if not is_there(to := path.with_name(name)))
        os.replace(path, to)
        return to

    def _save(
        self,
        name: str,
        kind: str,
        cycle: int | None,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        previous: Path | None = None,
    ) -> None:
        """Write a file of this run that says what it holds."""
        described = {**(metadata or {}), "run": self.run, "kind": kind, "cycle": str(cycle)}
        save_tensors(self.path / name, tensors, described, previous)

    def _load(self, path: Path, kind: str) -> Packed:
        """Load a file of this run.

        Raises ValueError if it belongs to another run or is of another kind, Damaged if it is damaged, and OSError if
        it can't be read.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("run") != self.run:
            raise ValueError(
                f"{path} doesn't belong to this run: another run or another program wrote it. Move it away to continue "
                "from the run's state before it."
            )
        if "checksum" not in metadata:
            raise Damaged(f"{path} is damaged (it lacks its checksum).")
        if metadata.get("kind") != kind:
            raise ValueError(
                f'{path} was renamed: it should hold "{kind}", but holds "{metadata.get("kind")}". Move it away to '
                "continue from the run's state before it."
            )
        return tensors, metadata

    def cycles_done(self) -> int:
        """Return the number of completed cycles: those from 0 up to the first one whose file is missing."""
        done = 0
        while is_there(self.cycle_path(done)):
            done += 1
        return done

    def later_cycles(self, done: int) -> list[Path]:
        """Return the files of cycles from `done` on."""
        numbered = ((path, path.stem.removeprefix("cycle_")) for path in self.path.glob("cycle_*.safetensors"))
        return sorted(path for path, number in numbered if number.isdecimal() and int(number) >= done)


def run_id(about: Mapping[str, Any]) -> str:
    """Return a hash of everything that determines a run's results."""
    return _hash_of(about, _changed(SwampConfig.of(None, about["config"])))


def origin_id(about: Mapping[str, Any]) -> str:
    """Return a hash of everything that determines the results of a run's first cycles, however many it has."""
    config = SwampConfig.of(None, about["config"])
    settings = {name: value for name, value in _changed(config).items() if name not in LENGTH_SETTINGS}
    return _hash_of(about, {**settings, "particles": config.particles_at(0)})


def _changed(config: SwampConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes, without those at their defaults.

    So a setting that a later version adds doesn't turn the runs of earlier versions into others.
    """
    defaults = SwampConfig().identity()
    return {name: value for name, value in config.identity().items() if value != defaults[name]}


def _hash_of(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    what = json.dumps([about["driver"], settings, about["fingerprints"]], sort_keys=True)
    return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()


def read_snapshot(path: Path) -> Snapshot:
    """Read the snapshot in a cycle's file."""
    return unpacked(Snapshot.unpacked, path, *load_tensors(path))


def unpacked(
    read: Callable[[dict[str, Tensor], dict[str, str]], Content],
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
) -> Content:
    """Read a file's tensors and metadata with `read`, an `unpacked` method. Raises Damaged if it can't read them."""
    try:
        return read(tensors, metadata)
    except (KeyError, ValueError, RuntimeError) as error:
        raise Damaged(f"{path} is not a checkpoint of swamp_fast ({type(error).__name__}: {error}).") from error
