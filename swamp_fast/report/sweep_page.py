"""The page of a sweep: accuracy over density by grid point, the last cycles, and how to get each run's page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from shlex import quote
from typing import Any

from swamp_fast.report.charts import draw_accuracy_lines
from swamp_fast.report.comparison_page import Row, band_in_words
from swamp_fast.report.formats import percent
from swamp_fast.report.page import Page, Picture, Section, Table, code, render
from swamp_fast.report.tables import spread


def sweep_page(name: str, summary: Sequence[Row], results: Sequence[Row]) -> Page:
    """The page of the sweep in the folder `name`, from the rows of its summary.csv and results.csv."""
    settings = _settings_of(results)
    lines: dict[str, list[Row]] = {}
    for row in summary:
        lines.setdefault(_label(row, settings) or "all", []).append(row)
    runs = {row["id"]: row for row in results}
    failed = {row["id"]: row for row in results if row.get("error")}
    points = len({_label(row, settings) for row in results})
    seeds = max((row["seeds"] for row in summary), default=0)
    sections = []
    if failed:
        errors = [f"{_label(row, (*settings, 'seed'))}: {row['error']}" for row in failed.values()]
        sections.append(Section("Runs that failed", "failed.html", {"errors": errors}))
    if any(row.get("accuracy") is not None for row in summary):
        sections.append(_accuracy_section(lines, summary))
    again = {"command": "sweep", "rows": "results.csv", "name": name}
    sections += [
        _last_cycles_section(lines, summary, settings),
        _runs_section(name, runs, settings),
        Section("Reproduce it", "reproduce.html", again),
    ]
    lead = render("sweep/lead.html", runs=len(runs), points=points, seeds=seeds, failed=len(failed))
    facts = {"runs": f"{len(runs)}", "points": f"{points}", "seeds": f"{seeds}"}
    return Page(f"{name}: a sweep", lead, facts, sections)


def _settings_of(results: Sequence[Row]) -> list[str]:
    """The settings that make up a grid point: the columns before `cycle`, without the run's id and seed."""
    columns = takewhile(lambda column: column not in ("cycle", "error"), results[0] if results else ())
    return [column for column in columns if column not in ("id", "seed")]


def _accuracy_section(lines: dict[str, list[Row]], summary: Sequence[Row]) -> Section:
    caption = (
        f"Test accuracy of the averages, one line per point of the grid; {band_in_words(len(lines))}. The axis does "
        "not begin at 0."
    )
    drawing = draw_accuracy_lines(lines)
    picture = Picture("accuracy", "Accuracy over sparsity, by point", caption, drawing, summary)
    return Section("Accuracy over sparsity", "sweep/accuracy.html", {}, [picture])


def _last_cycles_section(lines: dict[str, list[Row]], summary: Sequence[Row], settings: Sequence[str]) -> Section:
    spreads = [column.removesuffix("_std") for row in summary for column in row if column.endswith("_std")]
    scores = [score for score in dict.fromkeys(spreads) if any(row.get(score) is not None for row in summary)]
    head = [*settings, "cycle", "density", "seeds", *(score.replace("_", " ") for score in scores)]

    def cells(row: Row) -> list[Any]:
        point = [row.get(setting, "") for setting in settings]
        cycle = [row["cycle"], percent(row["density"]), row["seeds"]]
        return [*point, *cycle, *(spread(row, score) for score in scores)]

    last = [cells(max(rows, key=lambda row: row["cycle"])) for rows in lines.values()]
    values = {
        "last": Table("the last cycles, one row per point", head, last, len(settings)),
        "all": Table("one row per point and cycle", head, [cells(row) for row in summary], len(settings)),
    }
    return Section("The last cycles", "sweep/last_cycles.html", values)


def _runs_section(name: str, runs: dict[str, Row], settings: Sequence[str]) -> Section:
    head = [*settings, "seed", "its own page"]
    rows = [
        (*(row.get(setting, "") for setting in (*settings, "seed")),
         code(f"swamp-fast report {quote(f'{name}/runs')}/{run}"))
        for run, row in runs.items()
    ]  # fmt: skip
    return Section("Runs", "sweep/runs.html", {"runs": Table("the runs of the sweep", head, rows, len(head))})


def _label(row: Row, settings: Sequence[str]) -> str:
    """A grid point as text, with only the settings that the point specifies."""
    return ", ".join(f"{setting} = {row[setting]}" for setting in settings if row.get(setting) not in (None, ""))
