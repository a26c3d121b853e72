"""Writes the tables and figures of `benchmarks.protocol` from protocol.json. They omit what is not measured yet."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measuring import write
from swamp_fast.common.statistics import half_width
from swamp_fast.report.canvas import save
from swamp_fast.report.charts import draw_accuracy_lines

COLUMNS = ("cycle", "density", "particles", "accuracy", "loss", "mean_accuracy", "best_accuracy", "ensemble_accuracy",
        "val_accuracy", "particle_accuracy", "train_seconds", "seconds", "peak_memory")  # fmt: skip
SHOWN_CYCLES = (0, 3, 6, 10, 14)  # cycles that the tables show, in addition to the last one
NOTE = (
    "accuracies on the JPEG copy of CIFAR-10 compare with each other, not with published CIFAR-10 figures; runs of 30 "
    "epochs a cycle are not of the paper's 150"
)
COMMAND = "python -m benchmarks.protocol --out DIR"

Row = dict[str, Any]


def keep(measurements: Row, results: Path) -> None:
    """Write protocol.json."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "protocol.json").write_text(json.dumps(measurements, indent=None, separators=(",\n", ":")) + "\n")


def tables(results: Path) -> None:
    """Write the tables and figures of all measurements in protocol.json."""
    data = json.loads((results / "protocol.json").read_text())
    for name, table in data["gpu"].items():
        header = {key: value for key, value in table.items() if key != "table"}
        write(name, "python -m benchmarks.gpu --out DIR", header, table["table"], results)
    for study, settings in data["studies"].items():
        rows = [row for row in data["rows"] if row["study"] == study]
        analyses = [row for row in data["analysis"] if row["study"] == study]
        if not rows:
            continue
        places = sorted({f"{row['processor']}, torch {row['torch']}" for row in rows})
        about = {"date": data["date"], "commit": data["commit"], "device": "; ".join(places), "data": data["data"]}
        about |= {**settings, "note": data["note"]}
        accuracy(study, rows, about, results)
        speed(study, rows, data, about, results)
        if analyses:
            geometry(study, analyses, about, results)
    costs(data, results)


def accuracy(study: str, rows: list[Row], about: Row, results: Path) -> None:
    """Write accuracy over sparsity with its spread over seeds, and seed-paired differences from imp or from N = 1."""
    groups = grouped(rows)
    methods = list(dict.fromkeys(method for method, _ in groups))
    baseline = next(name for name in ("imp", "N = 1", methods[0]) if name in methods)
    cycles = shown(rows)
    table, lines = [], {}
    for method in methods:
        line: Row = {"method": method}
        for cycle in cycles:
            by_seed, baseline_by_seed = groups.get((method, cycle), {}), groups.get((baseline, cycle), {})
            name = f"{next(row['density'] for row in rows if row['cycle'] == cycle):.1%}"
            line[name] = spread([row["accuracy"] * 100 for row in by_seed.values()], ".2f")
            if cycle and method != baseline:
                pairs = [(by_seed[seed], baseline_by_seed[seed]) for seed in sorted({*by_seed} & {*baseline_by_seed})]
                gains = [(row["accuracy"] - other["accuracy"]) * 100 for row, other in pairs]
                line[f"{name}, minus {baseline}"] = interval(gains)
            elif cycle:
                line[f"{name}, minus {baseline}"] = "–"
        table.append(line)
        lines[method] = [mean_row(cycle, groups[method, cycle]) for cycle in cycles_of(groups, method)]
    notes = {"cells": "test accuracy, %: mean ± standard deviation over (seeds)",
             "differences": "points, between the same seeds, with the 95 % interval of Student's t"}  # fmt: skip
    write(f"protocol_{study}", COMMAND, about | notes, table, results)
    save(draw_accuracy_lines(lines), results / f"protocol_{study}.svg")


def speed(study: str, rows: list[Row], data: Row, about: Row, results: Path) -> None:
    """Write seconds per cycle, milliseconds per particle-step, the share of the roofline, and memory."""
    groups = grouped(rows)
    floor = data["cost"].get(f"roofline_{about['model']}")
    table = []
    for method, cycle in groups:
        if cycle not in shown(rows):
            continue
        runs = list(groups[method, cycle].values())
        line: Row = {"method": method, "density": f"{runs[0]['density']:.1%}", "runs at once": runs[0]["at_once"]}
        line["engine"] = runs[0]["engine"]
        line["s a cycle of one run"] = spread([row["seconds"] for row in runs], ".3g")
        line["of it training"] = spread([row["train_seconds"] for row in runs], ".3g")
        if floor:
            steps = floor["steps_an_epoch"] * about["epochs"] * runs[0]["particles"]
            step = statistics.fmean(row["train_seconds"] for row in runs) / steps
            line["ms a particle-step"] = f"{step * 1e3:.3g}"
            line["share of the roofline"] = f"{floor['seconds_a_step'] / step:.1%}"
        line["memory, GB"] = f"{max(row['peak_memory'] for row in runs) / 1e9:.2f}"
        table.append(line)
    notes = {"seconds": "runs that train at once have an equal share each",
             "roofline": "the time in which a dense step's feature maps go through memory once, or its products are "
                         "computed, at the measured rates of a copy and of a product"}  # fmt: skip
    write(f"protocol_{study}_speed", COMMAND, about | notes, table, results)


def geometry(study: str, rows: list[Row], about: Row, results: Path) -> None:
    """Write barriers between consecutive cycles, and traces of the Hessian."""
    table = []
    for (method, _), by_seed in grouped(rows).items():
        runs = list(by_seed.values())
        barriers = [row["barriers"] for row in runs if "barriers" in row]
        line: Row = {"method": method, "density": f"{runs[0]['density']:.1%}"}
        for name, key, factor in (("train loss", "train_loss", 1), ("test error, points", "test_error", 100)):
            values = [barrier[key]["max"] * factor for barrier in barriers if key in barrier]
            line[f"barrier to the next cycle, {name}"] = spread(values, ".3g")
        for name in ("trace", "scaled", "norm"):
            line[name] = spread([row[name] for row in runs], ".3g")
        table.append(line)
    notes = {
        "probes": rows[0]["probes"],
        "trace": "of the Hessian, in float32; scaled: by the layers' norms",
        "barrier": "over 11 points, above the higher end, with BatchNorm re-estimated at each",
        "±": "standard deviation over (seeds)",
    }
    write(f"protocol_{study}_geometry", COMMAND, about | notes, table, results)


def costs(data: Row, results: Path) -> None:
    """Write the cost of a run of swamp in each implementation. The table says which costs are extrapolated."""
    table: list[Row] = []
    for study in data["studies"]:
        measured = finished_seconds(study, data)
        lines = [("swamp_fast, with evaluation", statistics.fmean(measured), "measured")] if measured else []
        lines += extrapolated(study, data)
        epochs = particle_epochs(data["studies"][study])
        for name, seconds, how in lines:
            line = {"study": study, "particle-epochs": epochs, "": name, "hours": f"{seconds / 3600:.3g}", "how": how}
            table.append(line | {"this / swamp_fast": f"{seconds / lines[0][1]:.2f}" if measured else "–"})
    if table:
        about = {"of": "one run of swamp, without its ticket", "date": data["date"], "commit": data["commit"]}
        devices = sorted({row["processor"] for row in data["rows"]})
        write("protocol_cost", COMMAND, about | {"device": "; ".join(devices)}, table, results)


def particle_epochs(settings: Row) -> int:
    """Return the total number of epochs that the particles of a run train, over all cycles."""
    return int((settings["cycles"] + 1) * settings["particles"] * settings["epochs"])


def finished_seconds(study: str, data: Row) -> list[float]:
    """Return the seconds of each finished run of swamp."""
    runs: dict[int, list[float]] = {}
    for row in data["rows"]:
        if (row["study"], row["method"]) == (study, "swamp"):
            runs.setdefault(row["seed"], []).append(row["seconds"])
    return [sum(seconds) for seconds in runs.values() if len(seconds) == data["studies"][study]["cycles"] + 1]


def extrapolated(study: str, data: Row) -> list[tuple[str, float, str]]:
    """Return name, extrapolated seconds and source, for the naive loop and, for ResNet-20, for its rivals."""
    if study == "particles":
        return []
    settings = data["studies"][study]
    model, cycles, epochs = settings["model"], settings["cycles"], particle_epochs(settings)
    naive, floor = data["cost"].get(f"naive_{model}"), data["cost"].get(f"roofline_{model}")
    lines = []
    if naive:
        models = (cycles + 1) * (settings["particles"] + 1)  # each cycle evaluates its particles and the average
        seconds = epochs * naive["seconds_an_epoch"] + models * naive["evaluation_seconds_a_model"]
        lines.append(("naive loop, with evaluation", seconds, f"extrapolated from {naive['epochs']} epochs"))
    if floor and model == "resnet20":
        slices = ("gpu_light", "gpu_compiled", "gpu_rivals")  # earlier versions wrote gpu_rivals
        rivals = [row for name, table in data["gpu"].items() if name.startswith(slices) for row in table["table"]]
        for row in rivals:
            if isinstance(row["ms a particle-step"], float):  # a contender that failed has an error instead
                seconds = row["ms a particle-step"] / 1e3 * floor["steps_an_epoch"] * epochs
                lines.append((f"{row['']}, training alone", seconds, "extrapolated from single steps"))
    return lines


def grouped(rows: Iterable[Row]) -> dict[tuple[str, int], dict[int, Row]]:
    """Group rows as (method, cycle) -> seed -> row."""
    groups: dict[tuple[str, int], dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row["cycle"]):
        groups.setdefault((row["method"], row["cycle"]), {})[row["seed"]] = row
    order = list(dict.fromkeys(row["method"] for row in rows))
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def shown(rows: Iterable[Row]) -> list[int]:
    """Return those of the cycles to show that have rows."""
    cycles = {row["cycle"] for row in rows}
    return sorted(cycles & {*SHOWN_CYCLES, max(cycles)})


def cycles_of(groups: dict[tuple[str, int], dict[int, Row]], method: str) -> list[int]:
    """Return the cycles of a method that have rows."""
    return [cycle for name, cycle in groups if name == method]


def mean_row(cycle: int, by_seed: dict[int, Row]) -> Row:
    """Return a cycle's point of the figure: means over seeds."""
    values = [row["accuracy"] for row in by_seed.values()]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    density = statistics.fmean(row["density"] for row in by_seed.values())
    return {"cycle": cycle, "density": density, "accuracy": statistics.fmean(values), "accuracy_std": deviation}


def spread(values: list[float], form: str) -> str:
    """Format the mean, standard deviation and number of values."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation} ({len(values)})"


def interval(values: list[float]) -> str:
    """Format the mean with its 95 % interval and the number of values."""
    if len(values) < 2:
        return f"{values[0]:+.2f} (1)" if values else "–"
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] ({len(values)})"
