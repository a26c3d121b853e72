"""The common basis of all charts: colours, fonts, axes, and the conversion of matplotlib figures to SVG and PNG.

Figures in files use the light colours. In an SVG inside a page, each colour is a CSS variable, so that it follows the
light or dark theme of the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

Row = Mapping[str, Any]

# Name -> (light, dark). All light colours differ, because in an SVG each is replaced by its own CSS variable.
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
LINE_STYLES = ("-", "--", ":")  # distinguish lines if there are more lines than colours
MARKERS = "osD^vPX*<>hd"
WIDTH = 4.7  # inches: about the width that a phone shows, so that text in a figure has its true size there
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
def styled() -> Iterator[None]:
    """A context in which matplotlib draws in STYLE. Raises ImportError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('figures need matplotlib: `pip install "swamp-fast[report]"`') from error
    with matplotlib.rc_context(STYLE):
        yield


def panels_of(rows: int = 1, columns: int = 1, height: float = 3.5, width: float = WIDTH, **shared: Any) -> Any:
    """A new figure, and the list of its panels row by row. Height and width of the figure are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def density_axis(axes: Any, densities: Sequence[float], max_ticks: int = 7) -> None:
    """Make the x axis show densities in per cent: logarithmic, falling to the right, with at most `max_ticks` ticks."""
    # Three significant digits, so that densities which differ only by rounding share a tick.
    ticks = sorted({float(f"{density * 100:.3g}") for density in densities}, reverse=True)
    axes.set_xscale("log")
    if not axes.xaxis_inverted():
        axes.invert_xaxis()
    axes.set_xticks(_evenly_spaced(ticks, max_ticks))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.minorticks_off()
    axes.set_xlabel("weights kept, % (log)")


def legend_above(figure: Any, axes: Any) -> None:
    """Put the legend of a panel above the figure, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        columns = 1 if longest > 21 else 2 if longest > 11 else 3
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.2)


def shaded_cells(axes: Any, cells: Sequence[tuple[int, int, float]], columns: int, rows: int) -> None:
    """Draw cells (column, row, opacity from 0 to 1) as squares; row 0 is at the top."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    squares = [Rectangle((x - 0.46, y - 0.46), 0.92, 0.92) for x, y, _ in cells]
    colours = [(*to_rgb(BLUE), opacity) for _, _, opacity in cells]
    axes.add_collection(PatchCollection(squares, facecolors=colours, edgecolors=GRID, linewidths=0.6))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def shortened(name: str, length: int) -> str:
    """The name itself if it fits into `length` characters, else its end after an ellipsis."""
    return name if len(name) <= length else "…" + name[1 - length :]


def save(figure: Any, path: Path) -> Path:
    """Write a figure to a file, in the format of the path's suffix. Raises ValueError for an unknown suffix."""
    formats = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"`path` must end in the name of a format, one of .{', .'.join(formats)}; got {path.name}.")
    with styled():
        figure.savefig(path, dpi=160)
    return path


def svg(figure: Any) -> str:
    """The figure as the text of an SVG file. The text is deterministic."""
    with styled():
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        return content.getvalue().decode()


def png(figure: Any) -> bytes:
    """The figure as the content of a PNG file."""
    with styled():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=160)
        return content.getvalue()


@dataclass(frozen=True)
class InlineSvg:
    """An SVG drawing for a page.

    view_box   the attribute of the <svg> element
    max_width  in rem, a CSS unit
    content    the inside of the <svg> element, in which matplotlib has escaped all text
    """

    view_box: str
    max_width: str
    content: Markup


def inline_svg(file: str, prefix: str) -> InlineSvg:
    """Prepare the text of an SVG file for a page: colours become CSS variables, and every id gets a prefix.

    prefix  letters, digits and hyphens; different for every drawing on the page
    """
    opening = re.search(r"<svg[^>]*>", file)
    assert opening is not None  # matplotlib always writes an <svg> element
    view_box = re.search(r'viewBox="([^"]*)"', opening[0])
    size = view_box[1] if view_box else "0 0 1 1"
    content = file[opening.end() : file.rindex("</svg>")]
    for pattern in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        content = re.sub(pattern, "", content, flags=re.S)
    content = re.sub(r'\bid="', f'id="{prefix}-', content)
    content = content.replace("url(#", f"url(#{prefix}-")
    content = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', content)
    for variable, (light, _) in COLOURS.items():
        content = content.replace(light, f"var(--{variable})")
    max_width = float(size.split()[2]) / (WIDTH * 72) * 35
    return InlineSvg(size, f"{max_width:.3g}", Markup(content.strip()))


def _evenly_spaced(ticks: Sequence[float], count: int) -> list[float]:
    """Select at most `count` of the falling numbers `ticks`, with both ends, about evenly spaced in their logarithm."""
    if len(ticks) <= count:
        return list(ticks)
    high, low = math.log(ticks[0]), math.log(ticks[-1])
    wanted = [high + (low - high) * step / (count - 1) for step in range(count)]
    return sorted({min(ticks, key=lambda tick: abs(math.log(tick) - position)) for position in wanted}, reverse=True)
