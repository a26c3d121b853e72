"""The report of a folder, a run's, a comparison's or a sweep's: one HTML page, and its figures and numbers as files."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swamp_fast.common.csv import csv_bytes
from swamp_fast.config import SwampConfig
from swamp_fast.report.drawings import png
from swamp_fast.report.facts import RunFacts
from swamp_fast.report.of_methods import page_of_comparison, page_of_sweep
from swamp_fast.report.of_run import page_of_run
from swamp_fast.report.page import Page
from swamp_fast.runs.checkpoint import RunDirectory, write

# What a page is made of, the first file of each tells which page it is.
SOURCES = (("comparison.json",), ("run.json", "analysis.json", "a cycle's row"), ("summary.csv", "results.csv"))


def write_report(directory: str | Path, model: str | None = None) -> Path:
    """Write report.html, figures/NAME.svg and .png, and numbers/NAME.csv into the folder of a run, comparison or sweep.

    Args:
        directory: a run's folder, finished or not, with analysis.json if it was analysed; a comparison's, with
            comparison.json; or a sweep's, with results.csv and summary.csv.
        model: the network as `--model` names it, for the lines that load the model and run it again.

    Returns the page's path. Raises ImportError without matplotlib, FileNotFoundError or ValueError for a folder that
    holds none of them or is damaged.
    """
    folder = Path(directory).expanduser()
    try:
        page = _page(folder, model)
        content = page.html()
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        read = next(names for names in SOURCES if (folder / names[0]).exists())
        raise ValueError(
            f"{folder}: {' or '.join(read)} is damaged or of another version ({type(error).__name__}: {error}); write "
            "it again, or move it away."
        ) from error
    for place in ("figures", "numbers"):
        (folder / place).mkdir(exist_ok=True)
    for picture in page.pictures:
        write(folder / "figures" / f"{picture.name}.svg", picture.svg.encode())
        write(folder / "figures" / f"{picture.name}.png", png(picture.drawing))
        write(folder / "numbers" / f"{picture.name}.csv", csv_bytes(picture.rows))
    for name, rows in page.tables.items():
        write(folder / "numbers" / f"{name}.csv", csv_bytes(rows))
    path = folder / "report.html"
    write(path, content.encode())
    return path


def _page(folder: Path, model: str | None) -> Page:
    name = folder.resolve().name
    if (folder / "comparison.json").exists():
        return page_of_comparison(name, _json(folder / "comparison.json"))
    if (folder / "run.json").exists():
        return page_of_run(_facts(folder, name, model))
    if (folder / "summary.csv").exists() and (folder / "results.csv").exists():
        return page_of_sweep(name, _rows(folder / "summary.csv"), _rows(folder / "results.csv"))
    raise FileNotFoundError(
        f"{folder} holds nothing to report: a run's folder has run.json, a comparison's comparison.json, a sweep's "
        "results.csv and summary.csv. Name the folder that was given as --out or run_dir."
    )


def _facts(path: Path, name: str, model: str | None) -> RunFacts:
    folder = RunDirectory(path)
    about, done = folder.about(), folder.cycles_done()
    if done == 0:
        raise ValueError(f"{path}: no cycle of this run was finished yet; there is nothing to report.")
    rows, kept = [], []
    for cycle in range(done):
        snapshot = folder.cycle(cycle)
        rows.append(snapshot.row)
        kept.append({layer: mask.float().mean().item() for layer, mask in snapshot.masks.items()})
    settings = path / "config.toml"
    toml = settings.read_text() if settings.exists() else SwampConfig.of(None, about["config"]).to_toml()
    analysis = path / "analysis.json"
    updated = datetime.fromtimestamp(folder.cycle_path(done - 1).stat().st_mtime, UTC).isoformat()
    found = _json(analysis) if analysis.exists() else {}
    return RunFacts(name, about, rows, kept, toml, found, model, updated)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away, or write it again.") from error
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        return [{name: _number(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _number(cell: str) -> Any:
    """A cell as a number where it is one, None where it is empty."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None
