"""The result of a sweep: its runs, and tables and a figure of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swamp_fast.common.csv_files import csv_bytes
from swamp_fast.common.statistics import mean_and_spread
from swamp_fast.problem.problem import Problem
from swamp_fast.report.figures import accuracy_of_points
from swamp_fast.runs.folder import write
from swamp_fast.runs.result import SUMMARY_SCORES, SwampResult


@dataclass
class SweptRun:
    """One run of a sweep: its point of the grid, and its result or the error that ended it.

    id      the hash of its settings, model and data
    folder  its run directory, if the sweep has one
    """

    point: dict[str, Any]
    id: str
    folder: Path | None
    result: SwampResult | None = None
    error: Exception | None = None

    @property
    def name(self) -> str:
        """The name of the run on the console."""
        return ", ".join(f"{name} = {value}" for name, value in self.point.items()) or self.id[:8]

    @property
    def over(self) -> bool:
        """Whether it has a result or an error."""
        return self.result is not None or self.error is not None

    @property
    def error_text(self) -> str | None:
        """The error with its type, if there is one."""
        return None if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def begun(self) -> bool:
        """Whether its folder holds a run."""
        return self.folder is not None and (self.folder / "run.json").exists()

    def load(self, problem: Problem) -> bool:
        """Take the result from the folder if that holds the whole run; returns whether it does.

        A folder with damaged files doesn't: they are repaired when the run goes on.
        """
        if self.folder is None or not self.begun():
            return False
        files = ["model", "masks"] + ["particles"] * problem.config.keep_particles
        if not all((self.folder / f"{name}.safetensors").exists() for name in files):
            return False
        try:
            result = SwampResult.load(self.folder, problem.original)
        except ValueError:
            return False
        if len(result.history) <= problem.config.cycles:
            return False
        self.result = result
        return True


@dataclass
class SweepResult:
    """All runs of a sweep, in the order of the grid."""

    runs: list[SweptRun]

    @property
    def names(self) -> list[str]:
        """The settings that differ between points, without the seed."""
        return list(dict.fromkeys(name for run in self.runs for name in run.point if name != "seed"))

    def rows(self) -> list[dict[str, Any]]:
        """One row per run and cycle: id, the run's point, the history's numbers; one with the error of a failed run."""
        rows = []
        for run in self.runs:
            history = [{}] if run.result is None else run.result.history
            for row in history:
                numbers = {name: value for name, value in row.items() if isinstance(value, int | float | None)}
                numbers |= {"dropped": len(row["dropped"])} if row else {}
                rows.append({"id": run.id, **run.point, **numbers, **run.point, "error": run.error_text or ""})
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """One row per cycle and point without its seed: the number of seeds, each score's mean and standard deviation.

        The standard deviation of one seed is None; both are NaN if a score isn't finite.
        """
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        points: dict[tuple[Any, ...], dict[str, Any]] = {}
        for run in self.runs:
            if run.result is None:
                continue
            point = {name: value for name, value in run.point.items() if name != "seed"}
            for row in run.result.history:
                key = (*(f"{name} = {value}" for name, value in point.items()), row["cycle"])
                points[key] = point
                groups.setdefault(key, []).append(row)
        return [
            {**points[key], "cycle": rows[0]["cycle"], "density": rows[0]["density"], "seeds": len(rows)}
            | {name: value for score in SUMMARY_SCORES for name, value in spread_of(score, rows).items()}
            for key, rows in groups.items()
        ]

    def write_csv(self, path: str | Path, rows: list[dict[str, Any]] | None = None) -> Path:
        """Write `rows()`, or other rows, as CSV; id and the settings of the points are the first columns."""
        rows = self.rows() if rows is None else rows
        columns = {name for row in rows for name in row}
        first = ["id", *(name for run in self.runs for name in run.point)]
        write(Path(path), csv_bytes(rows, [name for name in first if name in columns]))
        return Path(path)

    def figure(self, path: str | Path) -> Path:
        """Draw the accuracy over the density, one line per point without its seed, with its spread over seeds.

        Raises ImportError without matplotlib, ValueError without accuracies.
        """
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in self.summary():
            label = ", ".join(f"{name} = {row[name]}" for name in self.names if name in row) or "all"
            lines.setdefault(label, []).append(row)
        return accuracy_of_points(lines, Path(path))


def spread_of(score: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """A score's mean and standard deviation over at least one row; {} if a row doesn't have it."""
    values = [row[score] for row in rows]
    if any(value is None for value in values):
        return {}
    mean, spread = mean_and_spread(values)
    return {score: mean, f"{score}_std": spread}
