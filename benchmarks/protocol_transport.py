"""Moves the state of `benchmarks.protocol` to another machine: only what runs need to continue there."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swamp_fast.runs.files import checksum, load_tensors, save_tensors
from swamp_fast.runs.folder import RunDirectory, Snapshot

MAX_BYTES = 2_900_000  # largest total size of the files in an export; the list of names adds less than 100 kB


def export_state(out: Path, file: Path, analysed: Mapping[Path, int]) -> None:
    """Write a .zip with which another machine can continue each run after its last finished cycle.

    It holds a run's ticket, its last cycle, the cycles that still have to be analysed, and the history of all others.
    A ticket that several runs share is written once, and finished runs don't need one. If the files exceed MAX_BYTES,
    runs are left out, those with the fewest cycles first.

    out       the folder of the protocol
    analysed  folder of a run -> number of its analysed cycles; runs that are missing here will not be analysed
    """
    runs = sorted(out.glob("*/runs/*/run.json"))
    runs.sort(key=lambda path: len(history(path.parent)), reverse=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in itertools.chain.from_iterable(out.glob(f"{part}*.json") for part in ("", "cost/", "gpu/")):
            archive.write(path, path.relative_to(out))
        for path in runs:
            copy, name = Path(folder) / path.parent.name, path.parent.relative_to(out)
            ticket = _copy_reduced(path.parent, copy, analysed.get(path.parent))
            files = {part: f"{name}/{part.name}" for part in sorted(copy.iterdir())}
            analysis = out / "analysis" / f"{copy.name}.json"
            if analysis.exists():
                files[analysis] = f"analysis/{copy.name}.json"
            if ticket is not None and f"tickets/{ticket.name}" not in archive.namelist():
                files[ticket] = f"tickets/{ticket.name}"
            written = sum(info.compress_size for info in archive.infolist())
            if written + sum(map(_compressed_size, files)) > MAX_BYTES:
                print(f"no room for {name}, which will start again from the beginning", flush=True)
                continue
            for part, part_name in files.items():
                archive.write(part, part_name)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB", flush=True)


def import_state(out: Path, file: Path) -> None:
    """Unpack what `export_state` wrote into the folder `out`. Files that exist already stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder)
        shutil.unpack_archive(file, unpacked, "zip")
        for path in sorted(path for path in unpacked.rglob("*") if path.is_file()):
            target = out / path.relative_to(unpacked)
            if path.parent.name != "tickets" and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        for path in unpacked.glob("*/runs/*/run.json"):
            _restore_ticket(RunDirectory(out / path.parent.relative_to(unpacked)), unpacked / "tickets")


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's finished cycles."""
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(folder: Path) -> bool:
    """Whether all cycles of a run are finished, on this machine or on the one that exported the run."""
    return len(history(folder)) > int(RunDirectory(folder).about()["config"]["cycles"])


def _copy_reduced(folder: Path, to: Path, analysed: int | None) -> Path | None:
    """Copy a run's files, but keep only the history of cycles that are no longer needed.

    Returns the path of the run's ticket, or None if the run doesn't need it any more.

    analysed  number of analysed cycles; None if the run will not be analysed
    """
    source, copy = RunDirectory(folder), RunDirectory(to)
    source.about()  # reads the run's id, which its files must contain
    copy.make()
    for name in ("run.json", "config.toml", "history.jsonl"):
        if (folder / name).exists():
            shutil.copy(folder / name, to / name)
    done, is_finished = source.cycles_done(), finished(folder)
    first_needed = done if analysed is None else analysed
    if not is_finished:
        first_needed = min(first_needed, done - 1)
    elif first_needed >= done:
        return None
    for cycle in range(done):
        if cycle >= first_needed:
            shutil.copy(source.cycle_path(cycle), to)
            continue
        tensors, metadata = Snapshot({}, {}, source.cycle(cycle).row).packed()
        save_tensors(copy.cycle_path(cycle), tensors, {**metadata, "run": source.run})
    ticket = source.ticket()
    if is_finished or ticket is None:
        return None
    path = to.parent / f"{checksum(ticket, {})}.safetensors"
    save_tensors(path, ticket)
    (to / "ticket").write_text(path.stem)
    return path


def _compressed_size(path: Path) -> int:
    """Estimate the size in bytes of a file in a compressed archive."""
    return len(zlib.compress(path.read_bytes()))


def _restore_ticket(folder: RunDirectory, tickets: Path) -> None:
    """Write the ticket of a run that continues here."""
    reference = folder.path / "ticket"
    if reference.exists():
        folder.about()  # reads the run's id, which the ticket must contain
        folder.write_ticket(load_tensors(tickets / f"{reference.read_text()}.safetensors")[0])
        reference.unlink()
