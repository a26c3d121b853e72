"""Figures as matplotlib draws them, of plain numbers: for files, and as SVG that takes on a page's colours.

A page has the colours as CSS variables, so that figures follow its light or dark theme.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# Colours by name: (light, dark). Files have the light ones; no two are alike, so that they can be told apart in SVG.
COLOURS = {
    "paper": ("#ffffff", "#15191d"),
    "ink": ("#1d2329", "#e4e8ec"),
    "muted": ("#59636e", "#9aa6b2"),
    "grid": ("#dde2e7", "#323a42"),
    "blue": ("#1f62ab", "#74aeee"),
    "orange": ("#c2570c", "#f0975c"),
    "green": ("#2b7a4b", "#6dc490"),
    "purple": ("#7a4aa8", "#ba97e0"),
    "red": ("#b22f3d", "#f08189"),
    "teal": ("#147f86", "#5cc6cc"),
    "brown": ("#84600e", "#d3ad55"),
    "pink": ("#b8407f", "#ea8fc0"),
}
PAPER, INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE, RED = (light for light, _ in list(COLOURS.values())[:9])
SERIES = [light for light, _ in list(COLOURS.values())[4:]]
STYLES = ("-", "--", ":")  # beside the colours, where there are more lines than colours
MARKERS = "osD^vPX*<>hd"
WIDTH = 4.7  # inches: about a phone's width in points, so that text is as large there as it is here
MOST_BANDS = 4
CUSTOMARY = 2.0  # error in points up to which two solutions are customarily called linearly connected
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "swamp_fast",
}


@contextmanager
def _styled() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures need matplotlib: `pip install "swamp-fast[report]"`') from error
    with matplotlib.rc_context(STYLE):
        yield


def score_over_density(rows: Sequence[Row], score: str, what: str = "average") -> Any:
    """A score of the average, of every particle as a dot, and of the ensemble, over the density.

    score  "accuracy" (with the validation data's, where there are any), "loss", or "train_loss" (of particles alone)
    what   stands in the average's place, where it isn't one
    """
    times = 100.0 if score == "accuracy" else 1.0
    with _styled():
        figure, (axes,) = _canvas()
        rows = [row for row in rows if row.get(score) is not None or row.get(f"val_{score}") is not None]
        each = score if score == "train_loss" else f"particle_{score}"
        dots = [(row["density"] * 100, one * times) for row in rows for one in row.get(each) or ()]
        if dots:
            at, values = zip(*dots, strict=True)
            hollow = {"markerfacecolor": "none", "markersize": 6, "markeredgewidth": 1, "zorder": 3}
            axes.plot(at, values, "o", color=ORANGE, **hollow, label="a particle")
        lines = {
            f"ensemble_{score}": ("their ensemble", PURPLE, "--", ""),
            f"val_{score}": (f"{what}, validation", GREEN, ":", "D"),
            score: (f"their {what}", BLUE, "-", "o"),
        }
        for name, (label, colour, style, marker) in lines.items():
            points = [(row["density"] * 100, row[name] * times) for row in rows if _is_number(row.get(name))]
            if points:
                at, values = zip(*points, strict=True)
                axes.plot(at, values, style, marker=marker, color=colour, linewidth=1.8, markersize=4, label=label)
        _density_axis(axes, [row["density"] for row in rows])
        axes.set_ylabel("accuracy, %" if score == "accuracy" else "training loss" if score == "train_loss" else "loss")
        _legend(figure, axes)
        return figure


def lines_over_density(lines: Mapping[str, Sequence[Row]], levels: Mapping[str, float] | None = None) -> Any:
    """Accuracy over density: a line a method or point, and levels across.

    A band is a line's standard deviation over seeds; of more lines than MOST_BANDS they would hide each other.
    """
    with _styled():
        figure, (axes,) = _canvas(height=3.3 + 0.11 * len(lines))
        for number, (label, rows) in enumerate(lines.items()):
            rows = [row for row in rows if row.get("accuracy") is not None]
            at, mean = [row["density"] * 100 for row in rows], [row["accuracy"] * 100 for row in rows]
            spread = [(row.get("accuracy_std") or 0.0) * 100 for row in rows]
            kind = {"color": SERIES[number % 8], "linestyle": STYLES[number // 8 % 3], "marker": MARKERS[number % 12]}
            axes.plot(at, mean, **kind, linewidth=1.6, markersize=4, label=label)
            low, high = ([m + side * s for m, s in zip(mean, spread, strict=True)] for side in (-1, 1))
            if len(lines) <= MOST_BANDS:
                axes.fill_between(at, low, high, color=kind["color"], alpha=0.12, linewidth=0)
        for number, (label, level) in enumerate((levels or {}).items()):
            axes.axhline(level * 100, color=MUTED, linewidth=1, linestyle=STYLES[1 + number % 2], label=label)
        _density_axis(axes, [row["density"] for rows in lines.values() for row in rows])
        axes.set_ylabel("test accuracy, %")
        _legend(figure, axes)
        return figure


def differences(paired: Mapping[str, Sequence[Row]], baseline: str) -> Any:
    """Each method's accuracy minus the baseline's over density, in points, with its interval; a panel a method."""
    with _styled():
        columns = min(2, len(paired))
        figure, panels = _canvas(
            math.ceil(len(paired) / columns), columns, 0.8 + 1.3 * math.ceil(len(paired) / columns), sharey=True
        )
        for axes, (method, rows) in zip(panels, paired.items(), strict=False):
            at, middle = [row["density"] * 100 for row in rows], [row["difference"] * 100 for row in rows]
            arms = [
                [0.0 if row.get(end) is None else abs(row[end] - row["difference"]) * 100 for row in rows]
                for end in ("low", "high")
            ]
            axes.axhline(0, color=MUTED, linewidth=1)
            axes.errorbar(at, middle, arms, fmt="o", color=BLUE, markersize=4, linewidth=1.4, capsize=2)
            _density_axis(axes, [row["density"] for row in rows], 3)
            axes.set_xlabel("")
            axes.set_title(method, fontsize=10.5, loc="left")
        for axes in panels[len(paired) :]:
            axes.set_visible(False)
        figure.supxlabel("weights kept, % (log)", fontsize=10.5)
        figure.supylabel(f"accuracy minus that of {baseline}, points", fontsize=10.5)
        return figure


def costs(numbers: Mapping[str, Row]) -> Any:
    """Particle-epochs and seconds of each method, as bars from 0."""
    with _styled():
        figure, panels = _canvas(1, 2, 1.1 + 0.26 * len(numbers), sharey=True)
        for axes, (name, label) in zip(
            panels, {"particle_epochs": "particle-epochs", "seconds": "seconds"}.items(), strict=True
        ):
            axes.barh(list(numbers), [row.get(name) or 0 for row in numbers.values()], color=BLUE, height=0.6)
            axes.set_xlabel(label)
            axes.grid(axis="y", visible=False)
            axes.locator_params(axis="x", nbins=4)
        panels[0].invert_yaxis()
        return figure


def barriers(consecutive: Sequence[Row], densities: Mapping[int, float]) -> Any:
    """Barriers between each cycle's solution and the next over the density of the latter: error above, loss below."""
    with _styled():
        figure, panels = _canvas(2, 1, 4.9, sharex=True)
        for axes, what, times in zip(panels, ("error", "loss"), (100.0, 1.0), strict=True):
            for split, colour in (("train", BLUE), ("test", ORANGE)):
                for over, style in (("max", "-"), ("mean", ":")):
                    points = [
                        (densities[row["to"]] * 100, found[over] * times)
                        for row in consecutive
                        if (found := (row.get("barriers") or {}).get(f"{split}_{what}")) and row["to"] in densities
                    ]
                    if points:
                        at, values = zip(*points, strict=True)
                        marker, label = ("o" if over == "max" else ""), f"{split}, over {over}"
                        axes.plot(at, values, style, marker=marker, color=colour, markersize=4, label=label)
            axes.axhline(0, color=MUTED, linewidth=1)
            axes.set_ylabel("error barrier, points" if what == "error" else "loss barrier")
        panels[0].axhline(CUSTOMARY, color=RED, linewidth=1, linestyle="--", label=f"{CUSTOMARY:g} points")
        _density_axis(panels[1], [densities[row["to"]] for row in consecutive if row["to"] in densities])
        _legend(figure, panels[0])
        return figure


def overlaps(overlap: Sequence[Row]) -> Any:
    """IoU of two runs' masks over the density of the first, beside that of random masks as dense as they are."""
    with _styled():
        figure, (axes,) = _canvas()
        at = [row["density_a"] * 100 for row in overlap]
        chance = []
        for row in overlap:
            both = row["density_a"] * row["density_b"]
            chance.append(both / (row["density_a"] + row["density_b"] - both or 1.0))
        axes.plot(at, [row["iou"] for row in overlap], "-o", color=BLUE, markersize=4, label="the two masks")
        axes.plot(at, chance, ":", color=MUTED, label="random masks")
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("kept by both / kept by either")
        _density_axis(axes, [row["density_a"] for row in overlap])
        _legend(figure, axes)
        return figure


def matrices(kinds: Mapping[str, tuple[Sequence[Sequence[float]], str]], names: Sequence[str]) -> Any:
    """Barriers among solutions: the darker, the higher, and the number in it where there is room.

    kinds  what it is of -> the barriers [n, n], and how one is written, as ".2f"; one below the other
    """
    with _styled():
        side = min(WIDTH, 0.8 + 0.6 * len(names))
        figure, panels = _canvas(len(kinds), 1, len(kinds) * side, side + 1.2)
        for axes, (title, (values, written)) in zip(panels, kinds.items(), strict=True):
            most = max((abs(value) for row in values for value in row), default=0.0) or 1.0
            cells = [
                (x, y, 0.6 * max(value, 0.0) / most) for y, row in enumerate(values) for x, value in enumerate(row)
            ]
            _cells(axes, cells, len(names), len(names))
            if len(names) <= 8:
                for x, y, _ in cells:
                    text = "–" if x == y else f"{values[y][x]:{written}}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=9.5)
            axes.set_xticks(range(len(names)), [_short(name, 10) for name in names], rotation=45 * (len(names) > 5))
            axes.set_yticks(range(len(names)), [_short(name, 10) for name in names])
            axes.set_aspect("equal")
            axes.set_title(title, fontsize=10.5, loc="left")
        return figure


def traces(hessian: Sequence[Row]) -> Any:
    """Hessian traces over density, with their intervals: raw above, scaled below."""
    with _styled():
        figure, panels = _canvas(2, 1, 4.6, sharex=True)
        kinds = (("trace", "trace, raw", ORANGE), ("scaled", "trace, scaled", BLUE))
        for axes, (name, label, colour) in zip(panels, kinds, strict=True):
            rows = [row for row in hessian if row.get(name) is not None]
            at, values = [row["density"] * 100 for row in rows], [row[name] for row in rows]
            arms = [row.get(f"{name}_half_width") or 0.0 for row in rows]
            axes.errorbar(at, values, arms, fmt="-o", color=colour, markersize=4, linewidth=1.4, capsize=2)
            lows = [value - arm for value, arm in zip(values, arms, strict=True)]
            if lows and min(lows) > 0 and max(values) > 20 * min(values):
                axes.set_yscale("log")
                label += " (log)"
            elif values:
                axes.set_ylim(bottom=min(0.0, *lows))
            axes.set_ylabel(label)
        _density_axis(panels[1], [row["density"] for row in hessian])
        return figure


def layers(cycles: Sequence[tuple[int, Mapping[str, float]]]) -> Any:
    """Density by layer and cycle: full colour is 1, none 0.001, in equal steps of its logarithm; x is 0."""
    with _styled():
        names = list(cycles[0][1])
        figure, (axes,) = _canvas(height=1.3 + max(0.19 * len(names), 0.5))
        shown = [
            (x, y, max(0.04, 1 + math.log10(kept) / 3)) if (kept := by_layer.get(name, 0.0)) > 0 else (x, y, 0.0)
            for x, (_, by_layer) in enumerate(cycles)
            for y, name in enumerate(names)
        ]
        _cells(axes, shown, len(cycles), len(names))
        for x, y, strength in shown:
            if strength == 0:
                axes.text(x, y, "×", ha="center", va="center", color=RED)
        step = max(1, math.ceil(len(cycles) / 12))
        axes.set_xticks(range(0, len(cycles), step), [str(cycle) for cycle, _ in cycles[::step]])
        axes.set_yticks(range(len(names)), [_short(name.removesuffix(".weight"), 22) for name in names], fontsize=9)
        axes.set_xlabel("cycle")
        from matplotlib.patches import Patch

        keys = {"100 %": 1.0, "10 %": 2 / 3, "1 %": 1 / 3, "0.1 %": 0.04}
        handles = [Patch(facecolor=BLUE, alpha=strength, label=label) for label, strength in keys.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, title="kept of the layer", alignment="left")
        return figure


def dead_channels(masks: Sequence[Row], densities: Mapping[int, float]) -> Any:
    """Channels without incoming and without outgoing weights over density, where their number is known."""
    with _styled():
        figure, (axes,) = _canvas()
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
        _density_axis(axes, [densities[row["cycle"]] for row in rows])
        _legend(figure, axes)
        return figure


def times(rows: Sequence[Row], ways: Mapping[int, str]) -> Any:
    """Seconds of each cycle over density from 0, whole and training alone, and FLOPs below; by engine if two ran.

    ways  the engine of each cycle; {} if one ran all
    """
    with _styled():
        figure, panels = _canvas(2, 1, 4.8, sharex=True)
        at = [row["density"] * 100 for row in rows]
        panels[0].plot(at, [row["seconds"] for row in rows], "--", color=MUTED, label="whole cycle")
        trained = [row["train_seconds"] for row in rows]
        panels[0].plot(at, trained, "-", color=BLUE, label=None if ways else "training")
        for number, way in enumerate(dict.fromkeys(ways.values()) if ways else [""]):
            chosen = [index for index, row in enumerate(rows) if not ways or ways.get(row["cycle"]) == way]
            points = [at[index] for index in chosen], [trained[index] for index in chosen]
            label = f"training, {way} engine" if way else None
            panels[0].plot(*points, MARKERS[number], color=(BLUE, ORANGE, GREEN)[number % 3], markersize=5, label=label)
        panels[0].set_ylabel("seconds a cycle")
        panels[1].plot(at, [row["flops"] / 1e6 for row in rows], "-o", color=GREEN, markersize=4)
        panels[1].set_ylabel("MFLOP a sample")
        for axes in panels:
            axes.set_ylim(bottom=0)
        _density_axis(panels[1], [row["density"] for row in rows])
        _legend(figure, panels[0])
        return figure


def plane(x: Sequence[float], y: Sequence[float], values: Sequence[Sequence[float]], points: Sequence[Sequence[float]],
          names: Sequence[str], label: str, unit: str = "distance in weights") -> Any:  # fmt: skip
    """Level lines of values [len(y), len(x)] over a plane of weights, and the solutions in it."""
    with _styled():
        shape = (max(y) - min(y)) / ((max(x) - min(x)) or 1.0)
        figure, (axes,) = _canvas(height=1.0 + min(max(3.7 * shape, 1.5), 4.5))
        lines = axes.contour(x, y, values, levels=10, colors=BLUE, linewidths=1)
        axes.clabel(lines, fontsize=8.5, fmt="%.3g", colors=INK)
        for number, ((right, up), name) in enumerate(zip(points, names, strict=True)):
            axes.plot(right, up, MARKERS[number % 12], color=SERIES[1 + number % 7], markersize=8, label=name)
        axes.set_aspect("equal")
        axes.set_xlabel(f"{unit}; lines: {label}")
        axes.grid(visible=False)
        axes.locator_params(nbins=6)
        _legend(figure, axes)
        return figure


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format of the path's suffix."""
    with _styled():
        figure.savefig(path, dpi=160)
    return path


def svg(figure: Any) -> str:
    """A figure as an SVG file, in the light colours; the same figure gives the same text."""
    with _styled():
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        return content.getvalue().decode()


def png(figure: Any) -> bytes:
    """A figure as a PNG file, in the light colours."""
    with _styled():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=160)
        return content.getvalue()


def inlined(text: str, name: str, label: str) -> str:
    """An SVG file's text for a page: its colours the page's variables, its ids its own, told to those who hear it.

    name   begins its ids: letters, digits and hyphens, once a page
    label  what is read out
    """
    text = text[text.index("<svg") :]
    for pattern in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        text = re.sub(pattern, "", text, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', text)
    size = box[1] if box else "0 0 1 1"
    widest = float(size.split()[2]) / (WIDTH * 72) * 35
    begin = f'<svg viewBox="{size}" style="max-width: {widest:.3g}rem" role="img" aria-label="{html.escape(label)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: begin, text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    return text.strip()


def _canvas(rows: int = 1, columns: int = 1, height: float = 3.5, width: float = WIDTH, **shared: Any) -> Any:
    """A figure and its panels, in a list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def _density_axis(axes: Any, densities: Sequence[float], most: int = 7) -> None:
    """Densities on a logarithmic axis that falls to the right, as per cent."""
    ticks = sorted(
        {float(f"{density * 100:.3g}") for density in densities}, reverse=True
    )  # equal but for rounding: one
    axes.set_xscale("log")
    if not axes.xaxis_inverted():
        axes.invert_xaxis()
    axes.set_xticks(_spaced(ticks, most))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.minorticks_off()
    axes.set_xlabel("weights kept, % (log)")


def _spaced(ticks: Sequence[float], most: int) -> list[float]:
    """Of falling numbers so many that are about equally far apart in their logarithm, the ends among them."""
    if len(ticks) <= most:
        return list(ticks)
    high, low = math.log(ticks[0]), math.log(ticks[-1])
    wanted = [high + (low - high) * step / (most - 1) for step in range(most)]
    return sorted({min(ticks, key=lambda tick: abs(math.log(tick) - at)) for at in wanted}, reverse=True)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        wide = max(map(len, labels))
        columns = 1 if wide > 21 else 2 if wide > 11 else 3
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.2)


def _cells(axes: Any, cells: Sequence[tuple[int, int, float]], columns: int, rows: int) -> None:
    """Squares at (column, row), row 0 on top, whose strength 0 … 1 is how opaque they are."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    squares = [Rectangle((x - 0.46, y - 0.46), 0.92, 0.92) for x, y, _ in cells]
    colours = [(*to_rgb(BLUE), strength) for _, _, strength in cells]
    axes.add_collection(PatchCollection(squares, facecolors=colours, edgecolors=GRID, linewidths=0.6))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
