"""The page of a comparison of methods: accuracy over density, paired differences, matching tickets, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swamp_fast.report.charts import MAX_BANDS, draw_accuracy_lines, draw_costs, draw_differences
from swamp_fast.report.formats import DASH, decimal, duration, percent, points, whole, yes_or_no
from swamp_fast.report.page import Page, Picture, Section, Table, render
from swamp_fast.report.tables import spread

Row = dict[str, Any]

FEW_SEEDS = 10  # with fewer seeds than this, the usual differences between methods are hardly visible
MIN_INTERVAL_WIDTH = 1e-9  # a narrower interval means that all seeds gave equal differences, and proves nothing


def comparison_page(name: str, comparison: Mapping[str, Any]) -> Page:
    """The page of the comparison in the folder `name`, from the content of its comparison.json."""
    baseline, summary = str(comparison.get("baseline", "")), list(comparison.get("summary") or [])
    methods = _by_method(summary)
    seeds = max((row.get("seeds") or 1 for row in summary), default=0)
    score = "accuracy" if any(row.get("accuracy") is not None for row in summary) else "loss"
    dense = _dense_accuracies(comparison.get("dense"))
    differences = _by_method(comparison.get("paired") or [])
    differences.pop(baseline, None)
    sections = []
    if errors := comparison.get("errors"):
        failed = [f"{row.get('method')}, seed {row.get('seed')}: {row.get('error')}" for row in errors]
        sections.append(Section("Runs that failed", "failed.html", {"errors": failed}))
    if score == "accuracy":
        sections.append(_accuracy_section(methods, summary, dense))
    if differences:
        sections.append(_differences_section(differences, baseline))
    if methods:
        sections.append(_cost_section(methods))
    sections += [
        _methods_section(methods, summary, list(comparison.get("rows") or []), dense, score),
        Section("Reproduce it", "reproduce.html", {"command": "compare", "rows": "comparison.csv", "name": name}),
    ]
    lead = render(
        "comparison/lead.html",
        methods=len(methods),
        seeds=seeds,
        baseline=baseline,
        few_seeds=seeds < FEW_SEEDS,
        has_accuracies=score == "accuracy",
    )
    facts = {"methods": f"{len(methods)}", "seeds": f"{seeds}", "baseline": baseline}
    if methods:
        facts["lowest density"] = percent(min(row["density"] for row in _sparsest(methods).values()))
    return Page(f"{name}: methods compared", lead, facts, sections)


def band_in_words(lines: int) -> str:
    """A phrase that says where the reader finds the spread over seeds, for a chart with this many lines."""
    few = lines <= MAX_BANDS
    return "the band is one standard deviation over seeds" if few else "the spread over seeds is in the table"


def _accuracy_section(methods: Mapping[str, list[Row]], summary: list[Row], dense: Mapping[str, float]) -> Section:
    caption = (
        f"Test accuracy, one line per method, mean over seeds; {band_in_words(len(methods))}. The axis does not begin "
        "at 0."
    )
    drawing = draw_accuracy_lines(methods, dense)
    picture = Picture("accuracy", "Accuracy over sparsity, by method", caption, drawing, summary)
    counts = sorted({row.get("seeds") or 1 for row in summary})
    values = {"fewest_seeds": counts[0], "most_seeds": counts[-1]}
    return Section("Accuracy over sparsity", "comparison/accuracy.html", values, [picture])


def _differences_section(differences: Mapping[str, list[Row]], baseline: str) -> Section:
    rows = [row for method in differences.values() for row in method]
    caption = (
        f"Accuracy minus that of {baseline} under the same seeds, with the 95 % t interval. An interval that contains "
        "0 shows no difference. Of many intervals, some exclude 0 by chance."
    )
    drawing = draw_differences(differences, baseline)
    picture = Picture("differences", f"Paired differences to {baseline}", caption, drawing, rows)
    head = ("method", "density", "seeds", "difference", "95 % interval", "")
    cells = [
        (row["method"], percent(row["density"]), row.get("seeds", DASH), points(row.get("difference")),
         f"{points(row.get('low'))} … {points(row.get('high'))}", _verdict(row))
        for row in rows
    ]  # fmt: skip
    values = {"differences": Table("paired differences", head, cells)}
    return Section(f"Differences to {baseline}", "comparison/differences.html", values, [picture])


def _cost_section(methods: Mapping[str, list[Row]]) -> Section:
    caption = (
        "The cost of each method up to its lowest density, counted in particle-epochs and measured in seconds. Runs "
        "that trained together share their seconds, so compare particle-epochs first."
    )
    sparsest = _sparsest(methods)
    columns = ("method", "density", "particle_epochs", "seconds")
    rows = [{name: row.get(name) for name in columns} for row in sparsest.values()]
    picture = Picture("cost", "Cost", caption, draw_costs(sparsest), rows)
    return Section("Cost", "comparison/cost.html", {}, [picture])


def _methods_section(
    methods: Mapping[str, list[Row]], summary: list[Row], rows: list[Row], dense: Mapping[str, float], score: str
) -> Section:
    lowest_head = ("method", "density", score, "SGD down to", "SWA down to", "particle-epochs", "took")
    lowest = [
        (method, percent(row["density"]), spread(row, score), _matches_down_to(methods[method], "matching_sgd"),
         _matches_down_to(methods[method], "matching_swa"), *_cost_cells(row))
        for method, row in _sparsest(methods).items()
    ]  # fmt: skip
    density_head = ("method", "density", "seeds", score, "matches SGD", "matches SWA", "particle-epochs", "took")
    densities = [
        (row["method"], percent(row["density"]), row.get("seeds", DASH), spread(row, score),
         yes_or_no(row.get("matching_sgd")), yes_or_no(row.get("matching_swa")), *_cost_cells(row))
        for row in summary
    ]  # fmt: skip
    seed_head = ("method", "seed", "density", "accuracy", "loss")
    seeds = [
        (row["method"], row["seed"], percent(row["density"]), percent(row.get("accuracy")), decimal(row.get("loss")))
        for row in rows
    ]
    values = {
        "dense": {label: percent(accuracy) for label, accuracy in dense.items()},
        "lowest": Table("one row per method", lowest_head, lowest),
        "densities": Table("one row per method and density", density_head, densities),
        "seeds": Table("one row per method, seed and density", seed_head, seeds),
    }
    return Section("All methods", "comparison/methods.html", values)


def _cost_cells(row: Row) -> tuple[str, str]:
    return whole(row.get("particle_epochs")), duration(row.get("seconds"))


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by method, with the highest density first: method -> rows."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(str(row["method"]), []).append(row)
    return {method: sorted(own, key=lambda row: -row["density"]) for method, own in methods.items()}


def _sparsest(methods: Mapping[str, list[Row]]) -> dict[str, Row]:
    """Select each method's row with the lowest density: method -> row."""
    return {method: rows[-1] for method, rows in methods.items()}


def _dense_accuracies(dense: Any) -> dict[str, float]:
    """Label ("dense sgd", "dense swa") -> the accuracy of dense training."""
    if not isinstance(dense, Mapping):
        return {}
    accuracies = {label: run.get("accuracy") if isinstance(run, Mapping) else run for label, run in dense.items()}
    return {f"dense {label}": value for label, value in accuracies.items() if isinstance(value, float)}


def _verdict(row: Row) -> str:
    """Whether the method is "above" or "below" the baseline; "" if the interval shows neither."""
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or high - low < MIN_INTERVAL_WIDTH:
        return ""
    return "above" if low > 0 else "below" if high < 0 else ""


def _matches_down_to(rows: Sequence[Row], matching: str) -> str:
    """The lowest density down to which a method matches without a gap. The rows must fall in density."""
    lowest = None
    for row in rows:
        if not row.get(matching):
            break
        lowest = row["density"]
    return percent(lowest)
