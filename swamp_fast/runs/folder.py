"""A run's folder on disk. It holds plain files; each is written atomically, and loading one executes no code.

Every safetensors file has a checksum over its names, tensors and metadata. A damaged file is renamed, never deleted,
and the run continues from the last intact one.

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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from swamp_fast.config import RUN_ID_EXCLUDES
from swamp_fast.runs import lock

FORMAT = "swamp_fast 2"
REQUIRED_KEYS = ("driver", "config", "fingerprints", "engine", "standardise", "place")  # keys that run.json must have
TABLE_KEYS = ("config", "fingerprints", "engine", "place")  # the required keys whose values must be dicts
# The files that a run which was killed right at its start may leave behind.
STALE_FILES = ("config.toml", "config.toml.part", "run.json.part", lock.NAME)


Packed = tuple[dict[str, Tensor], dict[str, str]]  # the tensors and the metadata of a file
Content = TypeVar("Content")


class Damaged(ValueError):
    """Raised for a file whose content is not what was written."""


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
            "row": json.dumps(self.row),
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
        self.path = Path(path).expanduser()
        self.run = ""  # the run's id, once it is known

    def create(self, about: dict[str, Any], settings: str) -> None:
        """Make the folder, and write run.json from `about` and config.toml from `settings`, a TOML text."""
        self.make()
        self.run = run_id(about)
        write(self.path / "config.toml", settings.encode())
        self.write_about(about)

    def make(self) -> None:
        """Make the folder if it doesn't exist. Raises ValueError if that is not possible."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir {self.path} must be a folder, but it is a file.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run_dir {self.path} can't be made ({error}); name another folder.") from error

    def is_empty(self) -> bool:
        """Whether the folder is missing or empty; files that a run left when it was killed at its start don't count."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir {self.path} must be a folder, but it is a file.")
        return not self.path.exists() or all(entry.name in STALE_FILES for entry in self.path.iterdir())

    def write_about(self, about: dict[str, Any]) -> None:
        """Write run.json."""
        write(self.path / "run.json", json.dumps({"format": FORMAT, **about}, indent=1).encode())

    def about(self) -> dict[str, Any]:
        """Return the content of run.json. Raises ValueError if it is missing, damaged, or of another format version."""
        path = self.path / "run.json"
        if not path.exists():
            raise ValueError(
                f"{self.path} holds files but no run.json, so it is not a run of swamp_fast; name an empty or new "
                "folder."
            )
        try:
            about: dict[str, Any] = json.loads(path.read_text())
            if not isinstance(about, dict):
                raise ValueError(f"it holds a {type(about).__name__}")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); move the folder away to start a new run.") from error
        if about.get("format") != FORMAT:
            raise ValueError(
                f'{path} has the format "{about.get("format")}", but this version reads "{FORMAT}"; read it with the '
                f"version of swamp_fast that wrote it ({about.get('version', 'unknown')})."
            )
        missing = [name for name in REQUIRED_KEYS if name not in about]
        missing += [name for name in TABLE_KEYS if name not in missing and not isinstance(about[name], dict)]
        if missing:
            raise ValueError(
                f"{path} is damaged, it lacks {', '.join(missing)}; move the folder away to start a new run."
            )
        self.run = run_id(about)
        return about

    def write_ticket(self, state: Mapping[str, Tensor]) -> None:
        """Write the ticket's file."""
        save_tensors(self.path / "ticket.safetensors", state, {"run": self.run})

    def ticket(self) -> dict[str, Tensor] | None:
        """Return the ticket's parameters and buffers, or None if it is not trained yet."""
        path = self.path / "ticket.safetensors"
        return self._own(path)[0] if path.exists() else None

    def write_cycle(self, cycle: int, snapshot: Snapshot, rows: list[dict[str, Any]]) -> None:
        """Write a cycle's file, and the history up to this cycle."""
        tensors, metadata = snapshot.packed()
        save_tensors(self.cycle_path(cycle), tensors, {**metadata, "run": self.run})
        self.write_history(rows)

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Write history.jsonl."""
        write(self.path / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def cycle_path(self, cycle: int) -> Path:
        """Return the path of a cycle's file."""
        return self.path / f"cycle_{cycle:02d}.safetensors"

    def cycle(self, cycle: int) -> Snapshot:
        """Read a cycle's file."""
        path = self.cycle_path(cycle)
        snapshot = unpacked(Snapshot.unpacked, path, *self._own(path))
        if snapshot.row["cycle"] != cycle:
            raise ValueError(
                f"{path} holds cycle {snapshot.row['cycle']}: it was renamed. Delete it to train cycle {cycle} again."
            )
        return snapshot

    def write_training(self, state: Unfinished) -> None:
        """Write a checkpoint of the unfinished training; the checkpoint before it is kept as well."""
        tensors, metadata = state.packed()
        newest, previous = self.training_paths()
        save_tensors(newest, tensors, {**metadata, "run": self.run}, previous)

    def training(self, path: Path) -> Unfinished:
        """Read a checkpoint of an unfinished training."""
        return unpacked(Unfinished.unpacked, path, *self._own(path))

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
        to = next(to for name in names if not (to := path.with_name(name)).exists())
        os.replace(path, to)
        return to

    def _own(self, path: Path) -> Packed:
        """Load a file of this run. Raises ValueError if it belongs to another run, Damaged if it is damaged."""
        tensors, metadata = load_tensors(path)
        if metadata.get("run") != self.run:
            raise ValueError(
                f"{path} doesn't belong to this run: another run or another program wrote it. Move it away to continue "
                "from the run's state before it."
            )
        if "checksum" not in metadata:
            raise Damaged(f"{path} is damaged (it lacks its checksum).")
        return tensors, metadata

    def cycles_done(self) -> int:
        """Return the number of completed cycles: those from 0 up to the first one whose file is missing."""
        done = 0
        while self.cycle_path(done).exists():
            done += 1
        return done


def run_id(about: Mapping[str, Any]) -> str:
    """Return a hash of everything that determines a run's results."""
    settings = {name: value for name, value in about["config"].items() if name not in RUN_ID_EXCLUDES}
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


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, previous: Path | None = None
) -> None:
    """Write named tensors as safetensors, atomically and with a checksum.

    previous  where the old file is moved; None replaces it
    """
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    described = {"format": "pt", **(metadata or {})}
    write(path, safetensors.torch.save(plain, metadata={**described, "checksum": checksum(plain, described)}), previous)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the named tensors, on the CPU, and the metadata of a safetensors file.

    Raises FileNotFoundError, or Damaged if the file can't be read or its checksum differs.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            # The tensors are copied, because one that maps the file would change or break with the file.
            tensors, metadata = {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise Damaged(f"{path} is damaged or not a safetensors file ({error}).") from error
    written = metadata.pop("checksum", None)
    if written is not None and written != checksum(tensors, metadata):
        raise Damaged(f"{path} is damaged (its checksum differs).")
    return tensors, metadata if written is None else {**metadata, "checksum": written}


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a hash of a file's tensors and metadata."""
    digest = hashlib.blake2b(json.dumps(dict(metadata), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file atomically: write a temporary file beside it, flush that, and rename it.

    previous  where the old file is moved; None replaces it

    Raises OSError if the file can't be written; then the old file is intact.
    """
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise refused(path, error) from error


def part_of(path: Path) -> Path:
    """Return the temporary path to which a file is written before it is renamed."""
    return path.with_name(path.name + ".part")


def refused(path: Path, error: OSError) -> OSError:
    """Return the error for a file that can't be written, with advice."""
    return OSError(
        error.errno,
        f"{path} can't be written ({error}). The folder's earlier content is intact: free some space or make the "
        "folder writable, and start the run again to continue. To only read a folder, use SwampResult.load.",
    )


def _flush_folder(path: Path) -> None:
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
