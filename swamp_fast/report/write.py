"""Write the report on the run, comparison or sweep in a folder: one HTML page, figures and numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swamp_fast.common.checked import checked, checked_path, shown
from swamp_fast.common.csv_files import csv_bytes
from swamp_fast.report.canvas import png
from swamp_fast.report.comparison_page import comparison_page
from swamp_fast.report.facts import RunFacts, read_json
from swamp_fast.report.page import Page
from swamp_fast.report.run_page import run_page
from swamp_fast.report.sweep_page import sweep_page
from swamp_fast.runs.files import write

# The sources of each kind of page, for error messages. The first file of each tuple identifies the kind.
SOURCES = (("comparison.json",), ("run.json", "analysis.json", "a cycle's row"), ("summary.csv", "results.csv"))


def write_report(directory: str | Path, model: str | None = None, model_args: Mapping[str, Any] | None = None) -> Path:
    """Write report.html, figures/NAME.svg and .png, and numbers/NAME.csv into a folder.

    Args:
        directory: the folder of a run, which need not be finished or analysed; of a comparison, with comparison.json;
            or of a sweep, with results.csv and summary.csv.
        model: the network's name for `--model`, for the lines that load the model and repeat the run.
        model_args: the network's own arguments, such as {"width": 32}, for `--model-args`.

    Returns the path of the page. Raises ImportError without matplotlib, FileNotFoundError if the folder holds neither a
    run nor a comparison nor a sweep, ValueError if a file is damaged.
    """
    folder = checked_path("directory", directory)
    if model is not None:
        checked("model", model, str, advice="It is the network's name for `--model`, not the network.")
    if not isinstance(model_args, Mapping | None):
        raise TypeError(f"`model_args` must be a dict of the network's arguments, got {shown(model_args)}.")
    try:
        page = _page_of(folder, model, dict(model_args or {}))
        html = page.html()
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        sources = next(names for names in SOURCES if (folder / names[0]).exists())
        raise ValueError(
            f"{folder}: {' or '.join(sources)} is damaged or of another version ({type(error).__name__}: {error}); "
            "write it again, or move it away."
        ) from error
    for subfolder in ("figures", "numbers"):
        (folder / subfolder).mkdir(exist_ok=True)
    for picture in page.pictures:
        write(folder / "figures" / f"{picture.name}.svg", picture.svg.encode())
        write(folder / "figures" / f"{picture.name}.png", png(picture.drawing))
        write(folder / "numbers" / f"{picture.name}.csv", csv_bytes(picture.rows))
    for name, rows in page.tables.items():
        write(folder / "numbers" / f"{name}.csv", csv_bytes(rows))
    path = folder / "report.html"
    write(path, html.encode())
    return path


def _page_of(folder: Path, model: str | None, arguments: dict[str, Any]) -> Page:
    name = folder.resolve().name
    if (folder / "comparison.json").exists():
        return comparison_page(name, read_json(folder / "comparison.json"))
    if (folder / "run.json").exists():
        return run_page(RunFacts.read(folder, model, arguments))
    if (folder / "summary.csv").exists() and (folder / "results.csv").exists():
        return sweep_page(name, _read_csv(folder / "summary.csv"), _read_csv(folder / "results.csv"))
    raise FileNotFoundError(
        f"{folder} holds nothing to report: a run has run.json, a comparison has comparison.json, a sweep has "
        "results.csv and summary.csv. Pass the folder that was given as --out or run_dir."
    )


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        return [{name: _value_of(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _value_of(cell: str) -> Any:
    """Parse a cell of a CSV file: an int or a float if possible, None if it is empty, else its text."""
    for number_type in (int, float):
        try:
            return number_type(cell)
        except ValueError:
            continue
    return cell or None
