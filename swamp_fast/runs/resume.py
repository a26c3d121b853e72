"""Reads the folder of a run that is resumed. Refuses another run's folder, and renames damaged files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.warn import warn_user
from swamp_fast.config import LENGTH_SETTINGS, SwampConfig
from swamp_fast.ops.backends import backends, has_amx, why_no_nvrtc
from swamp_fast.particles.schedule import kept_at
from swamp_fast.runs.files import Damaged, is_there
from swamp_fast.runs.folder import Packed, RunDirectory, Snapshot, Unfinished, origin_id


@dataclass
class Found:
    """The content of a folder from which a run is resumed.

    engine      the recorded engine; empty if the run was computed on another kind of device
    moved       the machines on which the run was computed before, each with the cycle in which the run left it
    began       when the run was first started
    config      the recorded settings
    snapshots   the path of each cycle's file; for the last cycle its content, which ranks without the folder need
    unfinished  the checkpoint of the training that follows the completed ones
    warnings    warnings that were shown while reading; the next row of the history will hold them too
    elsewhere   whether this machine or its versions differ from where the run was last computed
    prolonged   whether the run now has another number of cycles, or another density at its end
    """

    engine: dict[str, Any]
    moved: list[dict[str, Any]]
    began: str
    config: dict[str, Any]
    ticket: dict[str, Tensor] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[Packed | Path] = field(default_factory=list)
    particles: dict[str, Tensor] | None = None
    unfinished: Unfinished | None = None
    warnings: list[str] = field(default_factory=list)
    elsewhere: bool = False
    prolonged: bool = False


def found_in(folder: RunDirectory, config: SwampConfig, about: dict[str, Any]) -> Found:
    """Read the folder of a run. Raises ValueError if it holds a different run from the one that `about` describes."""
    try:
        there, damage = folder.about(), None
    except Damaged as error:
        there, damage = about, error
        folder.run = origin_id(about)
    refuse_another(folder, there, config, about)
    found = Found(there["engine"], there["moved"], there["began"], there["config"])
    _read_ticket(folder, found)
    if damage is not None:
        _write_about_again(folder, found, damage)
    _read_cycles(folder, found)
    _adapt_to_length(folder, found, config)
    if len(found.rows) == config.cycles + 1 and config.keep_particles:
        _read_particles(folder, found, config.cycles)
    if found.ticket is None or len(found.rows) <= config.cycles:
        _read_training(folder, found)
        _compare_places(there, found, about["place"])
    else:
        folder.forget_training()  # a run that was killed after its last cycle may have left a checkpoint
    if found.rows:
        *before, last = range(len(found.rows))
        found.snapshots = [*map(folder.cycle_path, before), folder.cycle(last).packed()]
    return found


def refuse_another(folder: RunDirectory, there: dict[str, Any], config: SwampConfig, about: dict[str, Any]) -> None:
    """Raise ValueError, naming the differences, if the folder holds another run.

    there  the content of the folder's run.json
    about  the description of the run that was called
    """
    before = SwampConfig.of(None, there["config"])
    identity = before.identity()
    differences = [
        f"{name} was {identity[name]!r}, is {value!r}"
        for name, value in config.identity().items()
        if name not in (*LENGTH_SETTINGS, "particles") and identity[name] != value
    ]
    differences += _differences_of_length(before, config, folder.cycles_done())
    differences += [
        _difference(name, there["fingerprints"].get(name), about["fingerprints"].get(name))
        for name in {**about["fingerprints"], **there["fingerprints"]}
        if there["fingerprints"].get(name) != about["fingerprints"].get(name)
    ]
    if there["driver"] != about["driver"]:
        differences.append(f"it was computed by {there['driver']}")
    if differences:
        raise ValueError(
            f"run_dir {folder.path} holds another run: {'; '.join(differences)}. Name another folder, or repeat the "
            "call that began that run."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe a fingerprint that differs; for a recipe, which of its parts."""
    if name == "recipe" and isinstance(before, dict) and isinstance(now, dict):
        parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
        return f"the recipe's {' and '.join(parts)} differ{'s' if len(parts) == 1 else ''}, by source or by values"
    return f"{FINGERPRINT_NAMES[name]} differ{'s' if name in SINGULAR else ''}"


def _differences_of_length(before: SwampConfig, config: SwampConfig, done: int) -> list[str]:
    """Describe why a run with the settings `before` can't go on as one with `config`; empty if it can.

    done  the number of completed cycles. They must be the first cycles of the new run.
    """
    if done > config.cycles + 1:
        return [f"it has completed cycle {done - 1}, but {_length(config)}; SwampResult.load(…).at(cycle) reads it"]
    differences = []
    if [before.particles_at(cycle) for cycle in range(done)] != [config.particles_at(cycle) for cycle in range(done)]:
        differences.append(f"particles was {before.to_dict()['particles']!r}, is {config.to_dict()['particles']!r}")
    pruned = max(done - 1, 0)
    if (before.layer_kept or ())[:pruned] != (config.layer_kept or ())[:pruned]:
        differences.append("layer_kept differs")
    return differences


def _length(config: SwampConfig) -> str:
    return f"cycles = {config.cycles}" if config.target_density is None else f"target_density = {config.target_density}"


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


def _write_about_again(folder: RunDirectory, found: Found, damage: Damaged) -> None:
    """Move a damaged run.json aside and forget what it had recorded: the call knows all but the engine's choices.

    Raises ValueError if no file of the folder shows that the folder belongs to this run.
    """
    first = folder.cycle_path(0)
    if found.ticket is None and not is_there(first):
        raise ValueError(f"{damage} Nothing else in the folder tells which run it holds; name another folder.")
    _aside(folder, found, "run.json", damage, "It is written again from this call. The engine is chosen anew.")
    found.elsewhere = True  # so that run.json is written


def _read_cycles(folder: RunDirectory, found: Found) -> None:
    """Read the rows of all cycles up to the first one that is missing or damaged, and move those after it aside."""
    for cycle in range(folder.cycles_done()):
        try:
            found.rows.append(folder.cycle(cycle).row)
        except Damaged as error:
            _aside(folder, found, folder.cycle_path(cycle).name, error, f"The run continues with cycle {cycle}.")
            break
    unused = [folder.set_aside(path, "unused") for path in folder.later_cycles(len(found.rows))]
    if unused and not found.warnings:
        names = ", ".join(path.name for path in unused)
        _warn(found, f"{folder.cycle_path(len(found.rows))} is missing; later cycles were renamed to {names}.")


def _adapt_to_length(folder: RunDirectory, found: Found, config: SwampConfig) -> None:
    """Prepare a run that is prolonged: compute its last cycle again if that was not made as one before others."""
    if not found.rows or found.config == config.to_dict():
        return
    before, last = SwampConfig.of(None, found.config), len(found.rows) - 1
    found.prolonged = (before.cycles, before.target_density) != (config.cycles, config.target_density)
    if not found.prolonged:
        return
    why = _why_not_the_same(folder.cycle(last), found.rows, config)
    if why is not None:
        to = folder.set_aside(folder.cycle_path(last), "unused")
        _warn(found, f"cycle {last} is computed again, because {why}. Its file was renamed to {to.name}.")
        found.rows.pop()


def _why_not_the_same(last: Snapshot, rows: list[dict[str, Any]], config: SwampConfig) -> str | None:
    """Why the last completed cycle differs from the one that a run with these settings would have; None if it doesn't.

    rows  the rows of all completed cycles
    """
    cycle = len(rows) - 1
    if cycle > 0 and config.layer_kept is None:
        prunable = sum(mask.numel() for mask in last.masks.values())
        kept = kept_at(config, cycle, rows[-2]["kept"], prunable)
        if kept != rows[-1]["kept"]:
            return f"it keeps {rows[-1]['kept']:,} weights, not {kept:,} as on the way to the new density"
    if cycle < config.cycles and config.scored_at(cycle) and not last.score:
        return "it lacks the mask_score that the next mask needs"
    return None


def _read_particles(folder: RunDirectory, found: Found, last: int) -> None:
    """Read the last cycle's particles, without which that cycle must be computed again."""
    path = folder.cycle_path(last)
    try:
        found.particles = folder.particles(last)
    except Damaged as error:
        _aside(folder, found, "particles.safetensors", error, "The last cycle is computed again.")
    if found.particles is None:
        if not found.warnings:
            _warn(found, f"{folder.path} lacks the particles of cycle {last}, so that cycle is computed again.")
        folder.set_aside(path, "unused")
        found.rows.pop()


def _read_training(folder: RunDirectory, found: Found) -> None:
    wanted = None if found.ticket is None else len(found.rows)
    for path in folder.training_paths():
        try:
            kept = folder.training(path) if is_there(path) else None
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
    warn_user(text)


# Fingerprint -> its name in error messages.
FINGERPRINT_NAMES = {
    **{name: f"the {name}" for name in ("model", "forward", "loss", "transform", "recipe")},
    "train": "the training data",
    "val": "the validation data",
    "test": "the test data",
    "mask": "the initial masks",
    "prunable": "the prunable parameters",
    "drop_last": "drop_last",
    "select_by": "the metric of select_by",
}
SINGULAR = ("model", "forward", "loss", "transform", "recipe", "drop_last", "select_by")
