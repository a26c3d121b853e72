"""What a run's page is made of, and how its numbers are written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from swamp_fast.config import SwampConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What is told of a run.

    name      of its folder, from whose parent commands and code are written
    about     run.json
    rows      the history
    kept      by cycle, layer -> density
    settings  config.toml's text
    analysis  analysis.json, {} without
    model     the network as `--model` names it, if the user said
    updated   when its last cycle was written
    """

    name: str
    about: Row
    rows: list[Row]
    kept: list[dict[str, float]]
    settings: str
    analysis: Row
    model: str | None
    updated: str

    @property
    def config(self) -> SwampConfig:
        """The settings."""
        return SwampConfig.of(None, self.about["config"])

    @property
    def densities(self) -> dict[int, float]:
        """By cycle."""
        return {row["cycle"]: row["density"] for row in self.rows}

    @property
    def left(self) -> int:
        """Trainings still to come."""
        return self.config.cycles + 1 - len(self.rows)

    @property
    def alone(self) -> bool:
        """Whether there is one particle in every cycle."""
        return all(row["particles"] == 1 for row in self.rows)

    @property
    def solution(self) -> str:
        """What a training comes to."""
        return "particle" if self.alone else "best particle" if self.config.combine == "best" else "average"

    @property
    def analysed(self) -> int | None:
        """Cycles that the analysis has; None without any."""
        parts = (self.analysis.get(name) or () for name in ("masks", "cost", "hessian"))
        return max((row["cycle"] + 1 for rows in parts for row in rows), default=None)

    @property
    def held_out(self) -> str | None:
        """The fraction of the training data that was held out, "VAL" where nothing tells; None without any."""
        if self.about["fingerprints"].get("val") is None:
            return None
        said = [line.partition(" ")[2].strip() for line in self.about.get("lines", ()) if line.startswith("data ")]
        found = [re.search(r": ([\d,]+) samples", line) for line in said[:2]]
        if len(said) < 2 or not said[1].startswith("val of ") or None in found:
            return "VAL"
        left, held = (int(each[1].replace(",", "")) for each in found if each)
        fractions = (round(held / (left + held), digits) for digits in range(1, 17))
        return next(f"{each}" for each in fractions if round(each * (left + held)) == held)

    @property
    def data_flags(self) -> str:
        """`--data` and, where they are needed, `--val` and `--test`, as far as anything says."""
        lines = [line.partition(" ")[2].strip() for line in self.about.get("lines", ())]
        val = f" --val {self.held_out}" if self.held_out else ""
        test = " --test TEST" if any(line.startswith("test: ") for line in lines) else ""
        return f"--data {quote(self.known('data', 'DATA'))}{val}{test}"

    def known(self, name: str, unknown: str) -> str:
        """The `model` or the `data` as the command line names it, as far as anything says."""
        told = self.model if name == "model" else None
        about = self.analysis.get("about") or {}
        return str(told or about.get(name) or unknown)


def in_python(text: str) -> str:
    """A text as a literal of Python's."""
    return json.dumps(text, ensure_ascii=False)


def in_words(value: Any) -> str:
    """Any setting or fact, in words."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "–"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {in_words(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(in_words, value))
    return in_digits(value) if isinstance(value, float) else f"{value}"


def in_digits(value: float | None) -> str:
    """Four digits; a dash for None."""
    return "–" if value is None else f"{value:.4g}"


def in_thousands(value: float | None) -> str:
    """Thousands apart; a dash for None."""
    return "–" if value is None else f"{value:,}"


def in_millions(value: float | None) -> str:
    """In millions; a dash for None."""
    return "–" if value is None else f"{value / 1e6:.2f}"
