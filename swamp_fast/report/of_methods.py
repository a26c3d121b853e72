"""The pages of a comparison of methods and of a sweep: lines over density, differences, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from shlex import quote
from typing import Any

from swamp_fast.common.format import duration, percent
from swamp_fast.report import drawings
from swamp_fast.report.page import Html, Page, Picture, Section, bullets, code, details, link, table, tag
from swamp_fast.report.table import spread

Row = dict[str, Any]


def page_of_comparison(name: str, found: Mapping[str, Any]) -> Page:
    """The page of comparison.json: accuracy over sparsity by method, paired differences, matching and cost."""
    baseline, summary = str(found.get("baseline", "")), list(found.get("summary") or [])
    rows, lines = list(found.get("rows") or []), _by(found.get("summary") or [], "method")
    paired = {method: each for method, each in _by(found.get("paired") or [], "method").items() if method != baseline}
    seeds = max((row.get("seeds") or 1 for row in summary), default=0)
    lowest = {method: min(each, key=lambda row: row["density"]) for method, each in lines.items()}
    text = [f"{len(lines)} methods, {seeds} {'seed' if seeds == 1 else 'seeds'} each; differences are to {baseline}."]
    if seeds < 10:
        text.append(
            "Effects of these methods are a few tenths of a point, about the error of a test set of 10,000: fewer than "
            "ten seeds seldom tell them apart."
        )
    score = "accuracy" if any(row.get("accuracy") is not None for row in summary) else "loss"
    if score == "loss":
        text.append("Without accuracies only mean losses are given, and neither differences nor what matches.")
    sections = []
    failed = [f"{row.get('method')}, seed {row.get('seed')}: {row.get('error')}" for row in found.get("errors") or ()]
    if failed:
        sections.append(Section("Runs that failed", [tag("div", bullets(failed), "warn")]))
    dense = {f"dense {label}": value for label, value in _numbers(found.get("dense")).items()}
    if score == "accuracy":
        caption = f"Test accuracy, a line a method, mean over seeds; {_band(lines)}. The axis does not begin at 0."
        drawing = drawings.lines_over_density(lines, dense)
        picture = Picture("accuracy", "Accuracy over sparsity, by method", caption, drawing, summary)
        sections.append(Section("Accuracy over sparsity", [_all_seeds(summary)], [picture]))
    if paired:
        caption = (
            f"Accuracy minus that of {baseline} under the same seeds, with the 95 % t interval; an interval that holds "
            "0 shows no difference, and of many intervals some miss 0 by chance."
        )
        flat = [row for each in paired.values() for row in each]
        picture = Picture("differences", f"Paired differences to {baseline}", caption,
                          drawings.differences(paired, baseline), flat)  # fmt: skip
        cells = [
            (row["method"], percent(row["density"]), row.get("seeds", "–"), _points(row.get("difference")),
             _interval(row), _verdict(row))
            for row in flat
        ]  # fmt: skip
        head = ("method", "density", "seeds", "difference", "95 % interval", "")
        shown = details("All differences, in points", table(cells, head, "paired differences"))
        sections.append(Section(f"Differences to {baseline}", [], [picture], [shown]))
    caption = (
        "What each method took to reach its lowest density, counted in particle-epochs and measured in seconds; runs "
        "that trained together share the seconds, so compare methods by particle-epochs first."
    )
    costs = [
        {name: row.get(name) for name in ("method", "density", "particle_epochs", "seconds")} for row in lowest.values()
    ]
    if lowest:
        picture = Picture("cost", "Cost", caption, drawings.costs(lowest), costs)
        sections.append(Section("Cost", [], [picture]))
    each_density = [
        (row["method"], percent(row["density"]), row.get("seeds", "–"), spread(row, score),
         _yes(row.get("matching_sgd")), _yes(row.get("matching_swa")), _whole(row.get("particle_epochs")),
         _seconds(row.get("seconds")))
        for row in summary
    ]  # fmt: skip
    columns = ("method", "density", "seeds", score, "matches SGD", "matches SWA", "particle-epochs", "took")
    about = (
        "A row a method, at its lowest density, and the density down to which it matches dense training of the network "
        "by SGD and by SWA, without a gap; selections use validation data."
    )
    ends = [
        (method, percent(row["density"]), spread(row, score), _down_to(lines[method], "matching_sgd"),
         _down_to(lines[method], "matching_swa"), _whole(row.get("particle_epochs")), _seconds(row.get("seconds")))
        for method, row in lowest.items()
    ]  # fmt: skip
    last = ("method", "density", score, "SGD down to", "SWA down to", "particle-epochs", "took")
    single = [
        (row["method"], row["seed"], percent(row["density"]), percent(row.get("accuracy")), _figures(row.get("loss")))
        for row in rows
    ]
    every = details("Every density", table(each_density, columns, "a row a method and density"))
    seeded = details(
        "Every seed", table(single, ("method", "seed", "density", "accuracy", "loss"), "a row a method, seed, density")
    )
    level = bullets(f"{label}: {percent(value)}" for label, value in dense.items())
    sections.append(Section("All methods", [about, level, table(ends, last, "a row a method"), every, seeded]))
    sections.append(_files(name, "compare", "comparison.csv"))
    facts = {"methods": str(len(lines)), "seeds": str(seeds), "baseline": baseline}
    if lowest:
        facts["lowest density"] = percent(min(row["density"] for row in lowest.values()))
    return Page(f"{name}: methods compared", text, facts, sections)


def page_of_sweep(name: str, summary: Sequence[Row], results: Sequence[Row]) -> Page:
    """The page of a sweep's summary.csv and results.csv."""
    settings = takewhile(lambda name: name not in ("cycle", "error"), results[0] if results else ())
    points = [name for name in settings if name not in ("id", "seed")]
    lines: dict[str, list[Row]] = {}
    for row in summary:
        lines.setdefault(_point(row, points) or "all", []).append(row)
    runs = list(dict.fromkeys(row["id"] for row in results))
    failed = {row["id"]: row for row in results if row.get("error")}
    seeds = max((row["seeds"] for row in summary), default=0)
    sections = []
    if failed:
        told = [f"{_point(row, (*points, 'seed'))}: {row['error']}" for row in failed.values()]
        sections.append(Section("Runs that failed", [tag("div", bullets(told), "warn")]))
    if any(row.get("accuracy") is not None for row in summary):
        caption = (
            f"Test accuracy of the averages, a line a point of the grid; {_band(lines)}. The axis does not begin at 0."
        )
        drawing = drawings.lines_over_density(lines)
        picture = Picture("accuracy", "Accuracy over sparsity, by point", caption, drawing, summary)
        words = "A point chosen by test accuracy is chosen on test data: choose by val_accuracy, with `val`."
        sections.append(Section("Accuracy over sparsity", [words], [picture]))
    ends = [max(each, key=lambda row: row["cycle"]) for each in lines.values()]
    scores = [score for score in SCORES if any(row.get(score) is not None for row in summary)]
    head = [*points, "cycle", "density", "seeds", *(score.replace("_", " ") for score in scores)]

    def cells(row: Row) -> list[Any]:
        begin = [row.get(point, "") for point in points]
        return [*begin, row["cycle"], percent(row["density"]), row["seeds"], *(spread(row, score) for score in scores)]

    shown = table([cells(row) for row in ends], head, "the last cycles, a row a point", words=len(points))
    every = table([cells(row) for row in summary], head, "a row a point and cycle", words=len(points))
    sections.append(Section("The last cycles", [shown, details("Every cycle", every)]))
    where = [
        (
            *(row.get(point, "") for point in (*points, "seed")),
            tag("code", f"swamp-fast report {quote(f'{name}/runs')}/{row['id']}"),
        )
        for row in {row["id"]: row for row in results}.values()
    ]
    head = [*points, "seed", "its own page"]
    sections.append(Section("Runs", [table(where, head, "the runs of the sweep", words=len(head))]))
    sections.append(_files(name, "sweep", "results.csv"))
    count = len({_point(row, points) for row in results})
    of = f"{count} {'point' if count == 1 else 'points'}, {seeds} {'seed' if seeds == 1 else 'seeds'} each"
    text = [f"{len(runs)} runs of {of}."]
    if failed:
        text.append(f"{len(failed)} of {len(runs)} runs failed; they are in no mean.")
    return Page(f"{name}: a sweep", text, {"runs": str(len(runs)), "points": str(count), "seeds": str(seeds)}, sections)


SCORES = ("accuracy", "loss", "mean_accuracy", "best_accuracy", "ensemble_accuracy", "val_accuracy")


def _files(name: str, command: str, rows: str) -> Section:
    where = link(rows, rows)
    text = (
        f"Each run's settings are in its own folder's config.toml, every row in {where}. With the file it began with:"
    )
    return Section(
        "Reproduce it", [tag("p", Html(text)), code(f"swamp-fast {command} FILE.toml --out {quote(f'{name}-again')}")]
    )


def _by(rows: Sequence[Row], name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row[name]), []).append(row)
    return {key: sorted(each, key=lambda row: -row["density"]) for key, each in found.items()}


def _band(lines: Mapping[str, Any]) -> str:
    few = len(lines) <= drawings.MOST_BANDS
    return "the band is one standard deviation over seeds" if few else "their spread over seeds is in the table"


def _numbers(dense: Any) -> dict[str, float]:
    """The accuracies of dense training, by how it was trained."""
    if not isinstance(dense, Mapping):
        return {}
    found = {label: each.get("accuracy") if isinstance(each, Mapping) else each for label, each in dense.items()}
    return {str(label): value for label, value in found.items() if isinstance(value, float)}


def _all_seeds(summary: Sequence[Row]) -> str:
    counts = sorted({row.get("seeds") or 1 for row in summary})
    if len(counts) > 1:
        return f"Means over {counts[0]} to {counts[-1]} seeds."
    return "One seed, so no spread." if counts == [1] else f"Means over {counts[0]} seeds."


def _point(row: Row, points: Sequence[str]) -> str:
    return ", ".join(f"{point} = {row[point]}" for point in points if row.get(point) not in (None, ""))


def _points(difference: float | None) -> str:
    return "–" if difference is None else f"{difference * 100:+.2f}"


def _interval(row: Row) -> str:
    return f"{_points(row.get('low'))} … {_points(row.get('high'))}"


def _verdict(row: Row) -> str:
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or high - low < 1e-9:  # of seeds that differ by the same, no spread is known
        return ""
    return "above" if low > 0 else "below" if high < 0 else ""


def _yes(matching: bool | None) -> str:
    return "–" if matching is None else "yes" if matching else "no"


def _down_to(rows: Sequence[Row], matching: str) -> str:
    """The lowest density that matches with all above it; rows fall in density."""
    reached = None
    for row in rows:
        if not row.get(matching):
            break
        reached = row["density"]
    return percent(reached)


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else duration(value)


def _figures(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
