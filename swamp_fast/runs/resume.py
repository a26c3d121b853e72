"""Reads the folder of a run that is resumed. Refuses another run's folder, and renames damaged files."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamp_fast.config import RUN_ID_EXCLUDES, SwampConfig
from swamp_fast.ops.backends import backends, has_amx, why_no_nvrtc
from swamp_fast.runs.folder import Damaged, Packed, RunDirectory, Unfinished, load_tensors


@dataclass
class Found:
    """The content of a folder from which a run is resumed.

    engine      the recorded engine; empty if the run was computed on another kind of device
    moved       the machines on which the run was computed before, each with the cycle in which the run left it
    began       when the run was first started; None if its folder doesn't say
    snapshots   the path of each cycle's file; for the last cycle its content, which ranks without the folder need
    unfinished  the checkpoint of the training that follows the completed ones
    warnings    warnings that were shown while reading; the next row of the history will hold them too
    elsewhere   whether this machine or its versions differ from where the run was last computed
    """

    engine: dict[str, Any]
    moved: list[dict[str, Any]]
    began: str | None = None
    ticket: dict[str, Tensor] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[Packed | Path] = field(default_factory=list)
    particles: dict[str, Tensor] | None = None
    unfinished: Unfinished | None = None
    warnings: list[str] = field(default_factory=list)
    elsewhere: bool = False


def found_in(folder: RunDirectory, config: SwampConfig, about: dict[str, Any]) -> Found:
    """Read the folder of a run. Raises ValueError if it holds a different run from the one that `about` describes."""
    there = folder.about()
    refuse_another(folder, there, config, about)
    found = Found(there["engine"], there.get("moved", []), there.get("began"))
    _read_ticket(folder, found)
    _read_cycles(folder, found, config.cycles + 1)
    if len(found.rows) == config.cycles + 1 and config.keep_particles:
        _read_particles(folder, found, config.cycles)
    if found.ticket is None or len(found.rows) <= config.cycles:
        _read_training(folder, found)
        _compare_places(there, found, about["place"])
    if found.rows:
        *before, last = range(len(found.rows))
        found.snapshots = [*map(folder.cycle_path, before), folder.cycle(last).packed()]
    return found


def refuse_another(folder: RunDirectory, there: dict[str, Any], config: SwampConfig, about: dict[str, Any]) -> None:
    """Raise ValueError, naming the differences, if the folder holds another run.

    there  the content of the folder's run.json
    about  the description of the run that was called
    """
    differences = [
        f"{name} was {there['config'].get(name)!r}, is {value!r}"
        for name, value in config.to_dict().items()
        if name not in RUN_ID_EXCLUDES and there["config"].get(name) != value
    ]
    differences += [
        f"{FINGERPRINT_NAMES[name]} differ{'s' if name in SINGULAR else ''}"
        for name, value in about["fingerprints"].items()
        if there["fingerprints"].get(name) != value
    ]
    if there["driver"] != about["driver"]:
        differences.append(f"it was computed by {there['driver']}")
    if differences:
        raise ValueError(
            f"run_dir {folder.path} holds another run: {'; '.join(differences)}. Name another folder, or repeat the "
            "call that began that run."
        )


def place_of(device: torch.device) -> dict[str, Any]:
    """Describe the device, processor and library versions on which the bits of a run's results depend."""
    if device.type == "cuda":
        own: dict[str, Any] = {"processor": torch.cuda.get_device_name(device), "nvrtc": why_no_nvrtc() is None}
        own["capability"] = list(torch.cuda.get_device_capability(device))
    else:
        own = {"processor": torch.backends.cpu.get_cpu_capability(), "amx": has_amx()}
        own |= {"kernels": backends()["cpp"].get("instruction_set"), "threads": torch.get_num_threads()}
    return {"device": device.type, **own, "torch": torch.__version__, "triton": backends()["triton"].get("version")}


def _read_ticket(folder: RunDirectory, found: Found) -> None:
    try:
        found.ticket = folder.ticket()
    except Damaged as error:
        _aside(folder, found, "ticket.safetensors", error, "The ticket is trained again.")


def _read_cycles(folder: RunDirectory, found: Found, most: int) -> None:
    done = min(folder.cycles_done(), most)
    for cycle in range(done):
        try:
            found.rows.append(folder.cycle(cycle).row)
        except Damaged as error:
            _aside(folder, found, folder.cycle_path(cycle).name, error, f"The run continues with cycle {cycle}.")
            for later in range(cycle + 1, done):
                folder.set_aside(folder.cycle_path(later), "unused")
            return


def _read_particles(folder: RunDirectory, found: Found, last: int) -> None:
    path = folder.path / "particles.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}, with the particles of the finished run, is missing. Move {folder.cycle_path(last)} away to train "
            "the last cycle again."
        )
    try:
        found.particles = load_tensors(path)[0]
    except Damaged as error:
        _aside(folder, found, path.name, error, "The last cycle is trained again.")
        folder.set_aside(folder.cycle_path(last), "unused")
        found.rows.pop()


def _read_training(folder: RunDirectory, found: Found) -> None:
    wanted = None if found.ticket is None else len(found.rows)
    for path in folder.training_paths():
        try:
            kept = folder.training(path) if path.exists() else None
        except Damaged as error:
            _aside(folder, found, path.name, error, "The run continues from the checkpoint before it.")
            continue
        if kept is not None and kept.cycle == wanted:
            found.unfinished = kept
            return


def _compare_places(there: dict[str, Any], found: Found, now: dict[str, Any]) -> None:
    """Warn if the run was last computed on another machine or version.

    The engine is chosen anew if it was chosen for another kind of device.
    """
    before = there["place"]
    differences = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if not differences:
        return
    found.elsewhere = True
    found.moved.append({"cycle": len(found.rows), "from": before, "engine": there["engine"]})
    text = (
        f"the run continues on another machine or version: {'; '.join(differences)}. Results may differ from here on."
    )
    if before.get("device") != now["device"]:
        text += " The engine is chosen anew."
        found.engine = {}
    _warn(found, text)


def _aside(folder: RunDirectory, found: Found, name: str, error: Damaged, then: str) -> None:
    to = folder.set_aside(folder.path / name)
    _warn(found, f"{error} It was renamed to {to.name}. {then}")


def _warn(found: Found, text: str) -> None:
    found.warnings.append(text)
    warnings.warn(text, UserWarning, stacklevel=8)


# Fingerprint -> its name in error messages.
FINGERPRINT_NAMES = {
    **{name: f"the {name}" for name in ("model", "forward", "loss", "transform")},
    "train": "the training data",
    "val": "the validation data",
    "test": "the test data",
    "mask": "the initial masks",
    "prunable": "the prunable parameters",
    "drop_last": "drop_last",
}
SINGULAR = ("model", "forward", "loss", "transform", "drop_last")
