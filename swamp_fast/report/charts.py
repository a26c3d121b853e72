"""Charts of runs and of comparisons: accuracy, differences, cost and time over density, and density by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from swamp_fast.report.canvas import (
    BLUE,
    GREEN,
    LINE_STYLES,
    MARKERS,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    SERIES,
    Row,
    density_axis,
    legend_above,
    panels_of,
    shaded_cells,
    shortened,
    styled,
)

MAX_BANDS = 4  # with more lines than this, no standard deviations are drawn, because their bands would overlap
SCORE_LABELS = {"accuracy": "accuracy, %", "loss": "loss", "train_loss": "training loss"}
MIN_OPACITY = 0.04  # of a layer that keeps any weight, so that it looks different from an empty layer


def draw_score(rows: Sequence[Row], score: str, solution: str = "average") -> Any:
    """Draw a score over density: of the solution and the ensemble as lines, and of every particle as a dot.

    score     "accuracy" (also on validation data if there are any), "loss", or "train_loss" (of particles only)
    solution  what the particles of a cycle become: "average", "best particle" or "particle"
    """
    scale = 100.0 if score == "accuracy" else 1.0
    with styled():
        figure, (axes,) = panels_of()
        rows = [row for row in rows if row.get(score) is not None or row.get(f"val_{score}") is not None]
        of_particles = score if score == "train_loss" else f"particle_{score}"
        dots = [(row["density"] * 100, value * scale) for row in rows for value in row.get(of_particles) or ()]
        if dots:
            hollow = {"markerfacecolor": "none", "markersize": 6, "markeredgewidth": 1, "zorder": 3}
            axes.plot(*zip(*dots, strict=True), "o", color=ORANGE, **hollow, label="a particle")
        lines = {
            f"ensemble_{score}": ("their ensemble", PURPLE, "--", ""),
            f"val_{score}": (f"{solution}, validation", GREEN, ":", "D"),
            score: (f"their {solution}", BLUE, "-", "o"),
        }
        for name, (label, colour, style, marker) in lines.items():
            points = [(row["density"] * 100, row[name] * scale) for row in rows if _is_number(row.get(name))]
            if points:
                shape = {"marker": marker, "linewidth": 1.8, "markersize": 4}
                axes.plot(*zip(*points, strict=True), style, color=colour, **shape, label=label)
        density_axis(axes, [row["density"] for row in rows])
        axes.set_ylabel(SCORE_LABELS[score])
        legend_above(figure, axes)
        return figure


def draw_accuracy_lines(lines: Mapping[str, Sequence[Row]], levels: Mapping[str, float] | None = None) -> Any:
    """Draw accuracy over density, one line per method or grid point, and one horizontal line per level.

    With at most MAX_BANDS lines, a band shows the standard deviation over seeds.
    """
    with styled():
        figure, (axes,) = panels_of(height=3.3 + 0.11 * len(lines))
        for number, (label, rows) in enumerate(lines.items()):
            rows = [row for row in rows if row.get("accuracy") is not None]
            densities, means = [row["density"] * 100 for row in rows], [row["accuracy"] * 100 for row in rows]
            deviations = [(row.get("accuracy_std") or 0.0) * 100 for row in rows]
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            style = LINE_STYLES[number // len(SERIES) % len(LINE_STYLES)]
            shape = {"linestyle": style, "marker": marker, "linewidth": 1.6, "markersize": 4}
            axes.plot(densities, means, color=colour, **shape, label=label)
            if len(lines) <= MAX_BANDS:
                low, high = ([m + side * d for m, d in zip(means, deviations, strict=True)] for side in (-1, 1))
                axes.fill_between(densities, low, high, color=colour, alpha=0.12, linewidth=0)
        for number, (label, level) in enumerate((levels or {}).items()):
            axes.axhline(level * 100, color=MUTED, linewidth=1, linestyle=LINE_STYLES[1 + number % 2], label=label)
        density_axis(axes, [row["density"] for rows in lines.values() for row in rows])
        axes.set_ylabel("test accuracy, %")
        legend_above(figure, axes)
        return figure


def draw_differences(paired: Mapping[str, Sequence[Row]], baseline: str) -> Any:
    """Draw accuracy minus the baseline's over density, in points and with intervals, in one panel per method."""
    with styled():
        columns = min(2, len(paired))
        lines = math.ceil(len(paired) / columns)
        figure, panels = panels_of(lines, columns, 0.8 + 1.3 * lines, sharey=True)
        for axes, (method, rows) in zip(panels, paired.items(), strict=False):
            densities, middle = [row["density"] * 100 for row in rows], [row["difference"] * 100 for row in rows]
            arms = [
                [0.0 if row.get(end) is None else abs(row[end] - row["difference"]) * 100 for row in rows]
                for end in ("low", "high")
            ]
            axes.axhline(0, color=MUTED, linewidth=1)
            axes.errorbar(densities, middle, arms, fmt="o", color=BLUE, markersize=4, linewidth=1.4, capsize=2)
            density_axis(axes, [row["density"] for row in rows], 3)
            axes.set_xlabel("")
            axes.set_title(method, fontsize=10.5, loc="left")
        for axes in panels[len(paired) :]:
            axes.set_visible(False)
        figure.supxlabel("weights kept, % (log)", fontsize=10.5)
        figure.supylabel(f"accuracy minus that of {baseline}, points", fontsize=10.5)
        return figure


def draw_costs(by_method: Mapping[str, Row]) -> Any:
    """Draw the particle-epochs and seconds of each method as bars."""
    with styled():
        figure, panels = panels_of(1, 2, 1.1 + 0.26 * len(by_method), sharey=True)
        labels = {"particle_epochs": "particle-epochs", "seconds": "seconds"}
        for axes, (name, label) in zip(panels, labels.items(), strict=True):
            axes.barh(list(by_method), [row.get(name) or 0 for row in by_method.values()], color=BLUE, height=0.6)
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
            axes.locator_params(axis="x", nbins=4)
        panels[0].invert_yaxis()
        return figure


def draw_times(rows: Sequence[Row], engines: Mapping[int, str]) -> Any:
    """Draw the seconds of each cycle over density, total and for training alone; below, the FLOPs of a forward pass.

    engines  cycle -> engine, to mark cycles by engine; {} if one engine ran all cycles
    """
    with styled():
        figure, panels = panels_of(2, 1, 4.8, sharex=True)
        densities = [row["density"] * 100 for row in rows]
        panels[0].plot(densities, [row["seconds"] for row in rows], "--", color=MUTED, label="whole cycle")
        trained = [row["train_seconds"] for row in rows]
        panels[0].plot(densities, trained, "-", color=BLUE, label=None if engines else "training")
        for number, engine in enumerate(dict.fromkeys(engines.values()) if engines else [""]):
            chosen = [place for place, row in enumerate(rows) if not engines or engines.get(row["cycle"]) == engine]
            points = [densities[place] for place in chosen], [trained[place] for place in chosen]
            label = f"training, {engine} engine" if engine else None
            panels[0].plot(*points, MARKERS[number], color=(BLUE, ORANGE, GREEN)[number % 3], markersize=5, label=label)
        panels[0].set_ylabel("seconds per cycle")
        panels[1].plot(densities, [row["flops"] / 1e6 for row in rows], "-o", color=GREEN, markersize=4)
        panels[1].set_ylabel("MFLOPs per sample")
        for axes in panels:
            axes.set_ylim(bottom=0)
        density_axis(panels[1], [row["density"] for row in rows])
        legend_above(figure, panels[0])
        return figure


def draw_layers(cycles: Sequence[tuple[int, Mapping[str, float]]]) -> Any:
    """Draw density by layer and cycle as opacity, on a logarithmic scale from 1 to 0.001; a cross means 0."""
    with styled():
        names = list(cycles[0][1])
        figure, (axes,) = panels_of(height=1.3 + max(0.19 * len(names), 0.5))
        cells = [
            (x, y, _opacity(densities.get(name, 0.0)))
            for x, (_, densities) in enumerate(cycles)
            for y, name in enumerate(names)
        ]
        shaded_cells(axes, cells, len(cycles), len(names))
        for x, y, opacity in cells:
            if opacity == 0:
                axes.text(x, y, "×", ha="center", va="center", color=RED)
        step = max(1, math.ceil(len(cycles) / 12))
        axes.set_xticks(range(0, len(cycles), step), [str(cycle) for cycle, _ in cycles[::step]])
        axes.set_yticks(range(len(names)), [shortened(name.removesuffix(".weight"), 22) for name in names], fontsize=9)
        axes.set_xlabel("cycle")
        from matplotlib.patches import Patch

        keys = {"100 %": 1.0, "10 %": 2 / 3, "1 %": 1 / 3, "0.1 %": MIN_OPACITY}
        handles = [Patch(facecolor=BLUE, alpha=opacity, label=label) for label, opacity in keys.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, title="kept of the layer", alignment="left")
        return figure


def _opacity(density: float) -> float:
    return max(MIN_OPACITY, 1 + math.log10(density) / 3) if density > 0 else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
