"""The facts that a run's page reports, read from the run's folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

from swamp_fast.config import SwampConfig
from swamp_fast.runs.folder import RunDirectory

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """The content of a run's folder, and the facts that follow from it.

    name       name of the folder; commands and code on the page are to be run in its parent folder
    about      the content of run.json
    rows       the history, one row per cycle
    kept       for each cycle, a dict: layer -> density
    settings   the text of config.toml
    analysis   the content of analysis.json; {} if there is none
    model      the network's name for `--model`; None if the user gave none
    arguments  the network's arguments for `--model-args`; {} if the user gave none
    updated    time at which the last cycle was written, in ISO 8601
    """

    name: str
    about: Row
    rows: list[Row]
    kept: list[dict[str, float]]
    settings: str
    analysis: Row
    model: str | None
    arguments: Row
    updated: str

    @classmethod
    def read(cls, path: Path, model: str | None = None, arguments: Row | None = None) -> RunFacts:
        """Read a run's folder. Raises ValueError if no cycle is finished or a file is damaged."""
        folder = RunDirectory(path)
        about, finished = folder.about(), folder.cycles_done()
        if finished == 0:
            raise ValueError(f"{path}: no cycle of this run is finished yet, so there is nothing to report.")
        rows, kept = [], []
        for cycle in range(finished):
            snapshot = folder.cycle(cycle)
            rows.append(snapshot.row)
            kept.append({layer: mask.float().mean().item() for layer, mask in snapshot.masks.items()})
        settings, analysis = path / "config.toml", path / "analysis.json"
        updated = folder.cycle_path(finished - 1).stat().st_mtime
        return cls(
            name=path.resolve().name,
            about=about,
            rows=rows,
            kept=kept,
            settings=settings.read_text() if settings.exists() else SwampConfig.of(None, about["config"]).to_toml(),
            analysis=read_json(analysis) if analysis.exists() else {},
            model=model,
            arguments=arguments or {},
            updated=datetime.fromtimestamp(updated, UTC).isoformat(),
        )

    @property
    def config(self) -> SwampConfig:
        """The settings of the run."""
        return SwampConfig.of(None, self.about["config"])

    @property
    def densities(self) -> dict[int, float]:
        """The density of each cycle: cycle -> density."""
        return {row["cycle"]: row["density"] for row in self.rows}

    @property
    def trainings_left(self) -> int:
        """The number of trainings that are left."""
        return self.config.cycles + 1 - len(self.rows)

    @property
    def single_particle(self) -> bool:
        """Whether the run has one particle in every cycle."""
        return all(row["particles"] == 1 for row in self.rows)

    @property
    def solution(self) -> str:
        """The name for the model that a cycle's particles are combined into."""
        return "particle" if self.single_particle else "best particle" if self.config.combine == "best" else "average"

    @property
    def analysed_cycles(self) -> int | None:
        """The number of cycles that the analysis covers; None if it has no results by cycle."""
        parts = (self.analysis.get(name) or () for name in ("masks", "cost", "hessian"))
        return max((row["cycle"] + 1 for rows in parts for row in rows), default=None)

    @property
    def console_lines(self) -> dict[str, list[str]]:
        """The console's lines about the model and the data, which run.json keeps: first word -> rest of each line."""
        lines: dict[str, list[str]] = {}
        for line in self.about.get("lines", ()):
            topic, _, text = line.partition(" ")
            lines.setdefault(topic, []).append(text.strip())
        return lines

    @property
    def held_out(self) -> str | None:
        """The fraction of the training data that was held out; "VAL" if it is unknown, None if nothing was held out.

        It is computed from the sizes of both parts, which only the console lines in run.json contain.
        """
        if self.about["fingerprints"].get("val") is None:
            return None
        (_, trained_on), (held_name, held_out) = self._split("train"), self._split("val")
        if not held_name.startswith("held out of ") or not trained_on:
            return "VAL"
        total = trained_on + held_out
        fractions = (round(held_out / total, digits) for digits in range(1, 17))
        return next(f"{fraction}" for fraction in fractions if round(fraction * total) == held_out)

    @property
    def train_name(self) -> str:
        """The name of the training data; "" if they have none."""
        return self._split("train")[0].removesuffix(" train")

    @property
    def data_flags(self) -> str:
        """The flag `--data`, and `--val` and `--test` if the run needs them, with capitals for unknown values."""
        test = self._split("test")[0].removesuffix(" test")
        separate = "test" in self.console_lines and (not test or test != self.train_name)
        val = f" --val {self.held_out}" if self.held_out else ""
        return f"--data {quote(self.data_name or 'DATA')}{val}{' --test TEST' if separate else ''}"

    def _split(self, name: str) -> tuple[str, int]:
        """The source's name, "" if it has none, and the number of samples, 0 if it is unknown, of a split."""
        line = self.console_lines.get(name, [""])[0]
        match = re.fullmatch(r"(?:(?P<name>.*): )?(?P<samples>[\d,]+) samples .*", line)
        return ("", 0) if match is None else (match["name"] or "", int(match["samples"].replace(",", "")))

    @property
    def model_name(self) -> str | None:
        """The network's name for `--model`: the one that the user gave, else the one that the analysis recorded."""
        return self.model or (self.analysis.get("about") or {}).get("model")

    @property
    def model_arguments(self) -> Row:
        """The network's arguments for `--model-args`: those that the user gave, else those of the analysis."""
        recorded = (self.analysis.get("about") or {}).get("model_args") or {}
        return self.arguments if self.model or self.arguments else dict(recorded)

    @property
    def data_name(self) -> str | None:
        """The value of `--data` that the analysis recorded."""
        return (self.analysis.get("about") or {}).get("data")

    @property
    def analysis_is_partial(self) -> bool:
        """Whether the analysis covers a different number of cycles than the run has finished."""
        return self.analysed_cycles not in (None, len(self.rows))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ValueError if the file holds anything else."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away, or create it again.") from error
    return content
