"""The result of a sweep: its runs, summarised in tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swamp_fast.common.checked import checked_list, checked_path
from swamp_fast.common.csv_files import csv_bytes
from swamp_fast.common.statistics import mean_and_spread
from swamp_fast.common.warn import warn_user
from swamp_fast.problem.metrics import names_in
from swamp_fast.problem.problem import Problem
from swamp_fast.report.figures import accuracy_of_points
from swamp_fast.runs.files import write
from swamp_fast.runs.folder import RunDirectory
from swamp_fast.runs.result import SUMMARY_SCORES, SwampResult

FINAL_FILES = ("model.safetensors", "masks.safetensors")  # only a finished run has them


@dataclass
class SweptRun:
    """One run of a sweep: its point of the grid, and its result or the error that ended it.

    id      the hash of the run's settings, model and data
    folder  the run's folder; None if the sweep has none
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
        """Whether the run has ended, with a result or with an error."""
        return self.result is not None or self.error is not None

    @property
    def error_text(self) -> str | None:
        """The type and message of the error; None if there is no error."""
        return None if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def begun(self) -> bool:
        """Whether the run's folder exists and holds a run."""
        return self.folder is not None and (self.folder / "run.json").exists()

    def lacks(self, problem: Problem) -> list[str]:
        """The names of the files that a finished run has and that are missing from the folder.

        A run that was ended by StopRun has the files up to its last cycle.
        """
        if self.folder is None:
            return []
        folder, config = RunDirectory(self.folder), problem.config
        with suppress(ValueError, OSError):
            folder.about()
        ended_at = folder.final_cycle()
        last = config.cycles if ended_at is None else ended_at
        names = ["ticket.safetensors", *(folder.cycle_path(cycle).name for cycle in range(last + 1))]
        names += ["particles.safetensors"] * config.keep_particles + [*FINAL_FILES, "history.jsonl"]
        return [name for name in names if not (self.folder / name).exists()]

    def warn_if_repaired(self, problem: Problem) -> None:
        """Warn of a run that was finished but lacks files: it continues from what is there, and writes them again."""
        lacking = self.lacks(problem)
        if lacking and self.begun() and any(name not in lacking for name in FINAL_FILES):
            warn_user(
                f"{self.name}: {self.folder} lacks {', '.join(lacking)}, though the run was finished. What is missing "
                "is computed again; to avoid that, restore the files."
            )

    def load(self, problem: Problem, stopped: bool = False) -> bool:
        """Load the result from the folder if the run is finished. Returns whether it is.

        stopped  whether a run that was ended by StopRun, so that cycles are missing, counts as finished

        A run with damaged files counts as unfinished: it repairs them when it continues.
        """
        if self.folder is None or not self.begun() or self.lacks(problem):
            return False
        try:
            result = SwampResult.load(self.folder, problem.original)
        except (ValueError, OSError):
            return False
        if len(result.history) <= problem.config.cycles and not stopped:
            return False
        self.result = result
        return True


@dataclass
class SweepResult:
    """All runs of a sweep, in the order of the grid."""

    runs: list[SweptRun]

    @property
    def names(self) -> list[str]:
        """The names of the settings that the points specify, without the seed."""
        return list(dict.fromkeys(name for run in self.runs for name in run.point if name != "seed"))

    def rows(self) -> list[dict[str, Any]]:
        """One row per run and cycle, with the history's numbers. A failed run has one row, with its error."""
        rows = []
        for run in self.runs:
            history = [{}] if run.result is None else run.result.history
            for row in history:
                numbers = {name: value for name, value in row.items() if isinstance(value, int | float | None)}
                numbers |= {"dropped": len(row["dropped"])} if row else {}
                rows.append({"id": run.id, **run.point, **numbers, **run.point, "error": run.error_text or ""})
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """One row per point and cycle: the number of seeds, and each score's mean and standard deviation over seeds.

        Points that differ only in the seed count as one. The standard deviation over one seed is None; mean and
        standard deviation are NaN if a score isn't finite.
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
            | {name: value for score in scores_of(rows) for name, value in spread_of(score, rows).items()}
            for key, rows in groups.items()
        ]

    def write_csv(self, path: str | Path, rows: list[dict[str, Any]] | None = None) -> Path:
        """Write `rows`, by default `self.rows()`, as CSV. The id and the points' settings are the first columns.

        Raises TypeError for rows that are no list of dicts, and OSError if the file can't be written.
        """
        path = checked_path("path", path)
        rows = self.rows() if rows is None else checked_list("rows", rows, dict, 0)
        columns = {name for row in rows for name in row}
        first = ["id", *(name for run in self.runs for name in run.point)]
        write(path, csv_bytes(rows, [name for name in first if name in columns]))
        return path

    def figure(self, path: str | Path) -> Path:
        """Draw accuracy over density, one line per point (seeds merged), with the spread over seeds.

        Raises ImportError without matplotlib, ValueError without accuracies.
        """
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in self.summary():
            label = ", ".join(f"{name} = {row[name]}" for name in self.names if name in row) or "all"
            lines.setdefault(label, []).append(row)
        return accuracy_of_points(lines, checked_path("path", path))


def scores_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the scores that are summarised over rows: those of every run, and the metrics that each row has."""
    shared = [name for name in names_in(rows[0]) if all(name in names_in(row) for row in rows)]
    return [*SUMMARY_SCORES, *(f"{kind}{name}" for name in shared for kind in ("", "ensemble_", "val_"))]


def spread_of(score: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean and standard deviation of a score over the rows; {} if a row lacks the score."""
    values = [row[score] for row in rows]
    if any(value is None for value in values):
        return {}
    mean, spread = mean_and_spread(values)
    return {score: mean, f"{score}_std": spread}
