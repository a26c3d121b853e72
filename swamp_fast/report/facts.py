"""What a run's page is made of, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    def known(self, name: str, unknown: str) -> str:
        """The `model` or the `data` as the command line names it, as far as anything says."""
        told = self.model if name == "model" else None
        about = self.analysis.get("about") or {}
        return str(told or about.get(name) or unknown)


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
