"""Charts of an analysis: barriers, loss planes, Hessian traces, mask overlap, dead channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swamp_fast.report.canvas import (
    BLUE,
    INK,
    MARKERS,
    MUTED,
    ORANGE,
    RED,
    SERIES,
    WIDTH,
    Row,
    density_axis,
    legend_above,
    panels_of,
    shaded_cells,
    shortened,
    styled,
)

CONNECTED_BELOW = 2.0  # by custom, solutions are linearly connected below this error barrier, in percentage points
MAX_NUMBERED_SOLUTIONS = 8  # in a matrix of more solutions, the cells have no room for numbers


def draw_barriers(consecutive: Sequence[Row], densities: Mapping[int, float]) -> Any:
    """Draw the barriers between consecutive cycles, over the density of the later cycle: error above, loss below.

    densities  cycle -> density
    """
    with styled():
        figure, panels = panels_of(2, 1, 4.9, sharex=True)
        for axes, score, scale in zip(panels, ("error", "loss"), (100.0, 1.0), strict=True):
            for split, colour in (("train", BLUE), ("test", ORANGE)):
                for over, style, marker in (("max", "-", "o"), ("mean", ":", "")):
                    points = _barrier_points(consecutive, densities, f"{split}_{score}", over, scale)
                    if points:
                        shape = {"marker": marker, "color": colour, "markersize": 4}
                        axes.plot(*zip(*points, strict=True), style, **shape, label=f"{split}, over {over}")
            axes.axhline(0, color=MUTED, linewidth=1)
            axes.set_ylabel("error barrier, points" if score == "error" else "loss barrier")
        label = f"{CONNECTED_BELOW:g} points"
        panels[0].axhline(CONNECTED_BELOW, color=RED, linewidth=1, linestyle="--", label=label)
        density_axis(panels[1], [densities[row["to"]] for row in consecutive if row["to"] in densities])
        legend_above(figure, panels[0])
        return figure


def draw_overlap(overlap: Sequence[Row]) -> Any:
    """Draw the IoU of two runs' masks over the first run's density, and the IoU of random masks of equal densities."""
    with styled():
        figure, (axes,) = panels_of()
        densities, by_chance = [row["density_a"] * 100 for row in overlap], []
        for row in overlap:
            both = row["density_a"] * row["density_b"]
            by_chance.append(both / (row["density_a"] + row["density_b"] - both or 1.0))
        axes.plot(densities, [row["iou"] for row in overlap], "-o", color=BLUE, markersize=4, label="the two masks")
        axes.plot(densities, by_chance, ":", color=MUTED, label="random masks")
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("kept by both / kept by either")
        density_axis(axes, [row["density_a"] for row in overlap])
        legend_above(figure, axes)
        return figure


def draw_barrier_matrices(kinds: Mapping[str, tuple[Sequence[Sequence[float]], str]], names: Sequence[str]) -> Any:
    """Draw the barriers between all pairs of solutions as one matrix per kind. Darker cells are higher barriers.

    kinds  title -> (barriers [n, n], format of a barrier, such as ".2f")
    """
    with styled():
        side = min(WIDTH, 0.8 + 0.6 * len(names))
        figure, panels = panels_of(len(kinds), 1, len(kinds) * side, side + 1.2)
        for axes, (title, (barriers, number_format)) in zip(panels, kinds.items(), strict=True):
            highest = max((abs(value) for row in barriers for value in row), default=0.0) or 1.0
            cells = [
                (x, y, 0.6 * max(value, 0.0) / highest) for y, row in enumerate(barriers) for x, value in enumerate(row)
            ]
            shaded_cells(axes, cells, len(names), len(names))
            if len(names) <= MAX_NUMBERED_SOLUTIONS:
                for x, y, _ in cells:
                    text = "–" if x == y else f"{barriers[y][x]:{number_format}}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=9.5)
            labels = [shortened(name, 10) for name in names]
            axes.set_xticks(range(len(names)), labels, rotation=45 * (len(names) > 5))
            axes.set_yticks(range(len(names)), labels)
            axes.set_aspect("equal")
            axes.set_title(title, fontsize=10.5, loc="left")
        return figure


def draw_plane(
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
    names: Sequence[str],
    label: str,
) -> Any:
    """Draw level lines of values [Y, X] over a plane in weight space, and the named solutions that span the plane."""
    with styled():
        aspect = (max(y) - min(y)) / ((max(x) - min(x)) or 1.0)
        figure, (axes,) = panels_of(height=1.0 + min(max(3.7 * aspect, 1.5), 4.5))
        lines = axes.contour(x, y, values, levels=10, colors=BLUE, linewidths=1)
        axes.clabel(lines, fontsize=8.5, fmt="%.3g", colors=INK)
        for number, ((right, up), name) in enumerate(zip(points, names, strict=True)):
            colour, marker = SERIES[1 + number % (len(SERIES) - 1)], MARKERS[number % len(MARKERS)]
            axes.plot(right, up, marker, color=colour, markersize=8, label=name)
        axes.set_aspect("equal")
        axes.set_xlabel(f"distance in weights; lines: {label}")
        axes.grid(visible=False)
        axes.locator_params(nbins=6)
        legend_above(figure, axes)
        return figure


def draw_traces(hessian: Sequence[Row]) -> Any:
    """Draw Hessian traces and their intervals over density: raw traces above, scaled ones below."""
    with styled():
        figure, panels = panels_of(2, 1, 4.6, sharex=True)
        kinds = (("trace", "trace, raw", ORANGE), ("scaled", "trace, scaled", BLUE))
        for axes, (name, label, colour) in zip(panels, kinds, strict=True):
            rows = [row for row in hessian if row.get(name) is not None]
            densities, values = [row["density"] * 100 for row in rows], [row[name] for row in rows]
            arms = [row.get(f"{name}_half_width") or 0.0 for row in rows]
            axes.errorbar(densities, values, arms, fmt="-o", color=colour, markersize=4, linewidth=1.4, capsize=2)
            lows = [value - arm for value, arm in zip(values, arms, strict=True)]
            if lows and min(lows) > 0 and max(values) > 20 * min(values):
                axes.set_yscale("log")
                label += " (log)"
            elif values:
                axes.set_ylim(bottom=min(0.0, *lows))
            axes.set_ylabel(label)
        density_axis(panels[1], [row["density"] for row in hessian])
        return figure


def draw_dead_channels(masks: Sequence[Row], densities: Mapping[int, float]) -> Any:
    """Draw the numbers of channels without incoming and without outgoing weights over density, where known.

    densities  cycle -> density
    """
    with styled():
        figure, (axes,) = panels_of()
        rows = [row for row in masks if row["cycle"] in densities]
        for name, label, colour, marker in (
            ("dead_in", "no incoming weight", BLUE, "o"),
            ("dead_out", "no outgoing weight", ORANGE, "s"),
        ):
            known = {densities[row["cycle"]] * 100: row[name] for row in rows if row.get(name) is not None}
            if known:
                axes.plot([*known], [*known.values()], f"-{marker}", color=colour, markersize=4, label=label)
        axes.set_ylim(0, max(1, axes.get_ylim()[1]))
        axes.locator_params(axis="y", nbins=6, integer=True)
        axes.set_ylabel("channels")
        density_axis(axes, [densities[row["cycle"]] for row in rows])
        legend_above(figure, axes)
        return figure


def _barrier_points(
    consecutive: Sequence[Row], densities: Mapping[int, float], score: str, over: str, scale: float
) -> list[tuple[float, float]]:
    """The points (density in per cent, barrier), one per pair of consecutive cycles with this score."""
    return [
        (densities[row["to"]] * 100, barrier[over] * scale)
        for row in consecutive
        if (barrier := (row.get("barriers") or {}).get(score)) and row["to"] in densities
    ]
