"""How a result shows itself: a few lines in a terminal, a table and a picture in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from swamp_fast.common.format import percent
from swamp_fast.config import SwampConfig

COLUMNS = ("cycle", "density", "kept", "accuracy", "loss")
WIDTH, HEIGHT, MARGIN = 360, 160, 28  # of the picture, in pixels


def summary_lines(model: str, config: SwampConfig, rows: Sequence[dict[str, Any]], engine: dict[str, Any]) -> list[str]:
    """Return at most five lines about a result.

    model  the name of the model's class
    rows   the history
    """
    lines = [f"SwampResult: {model}, cycle {len(rows) - 1} of {config.cycles}"]
    if rows:
        last, dense = rows[-1], rows[0]
        score = "accuracy" if last["accuracy"] is not None else "loss"
        lines.append(
            f"  reached  density {percent(last['density'])}, {score} {_text(score, last[score])} "
            f"(dense {_text(score, dense[score])})"
        )
    lines.append(f"  run      particles {config.particles}, epochs {config.epochs}, seed {config.seed}")
    lines.append(f"  engine   {engine.get('name', 'not chosen yet')}, {config.precision}")
    return [*lines, f"  folder   {config.run_dir or 'none: it is in memory'}"]


def result_html(lines: Sequence[str], history: Sequence[dict[str, Any]]) -> str:
    """Return the lines of a summary, a picture and a table of the cycles as HTML."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(name, row[name]))}</td>" for name in COLUMNS) + "</tr>" for row in history
    )
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    summary = escape("\n".join(lines))
    return f"<pre>{summary}</pre>{_picture(history)}<table><tr>{head}</tr>{rows}</table>"


def _picture(rows: Sequence[dict[str, Any]]) -> str:
    """Return the score of each cycle, from left to right, as an SVG line; empty without two scores."""
    score = "accuracy" if rows and rows[-1]["accuracy"] is not None else "loss"
    values = [row[score] for row in rows if row[score] is not None]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    across, up = (WIDTH - 2 * MARGIN) / (len(values) - 1), (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)
    points = " ".join(
        f"{MARGIN + number * across:.1f},{HEIGHT - MARGIN - (value - low) * up:.1f}"
        for number, value in enumerate(values)
    )
    labels = (
        f'<text x="2" y="{MARGIN - 8}">{escape(score)} {_text(score, high)}</text>'
        f'<text x="2" y="{HEIGHT - MARGIN + 12}">{_text(score, low)}</text>'
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 4}">cycle 0 … {len(rows) - 1}</text>'
    )
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="11" fill="currentColor" role="img" '
        f'aria-label="{escape(score)} by cycle">{labels}'
        f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="2"/></svg>'
    )


def _text(name: str, value: float | int | None) -> str:
    """Return a cell's text."""
    if value is None:
        return "–"
    if name in ("accuracy", "density"):
        return percent(value)
    return f"{value:.4f}" if name == "loss" else f"{value:,}"
