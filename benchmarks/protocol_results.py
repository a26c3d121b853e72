"""Tables and figures of `benchmarks.protocol`, from protocol.json alone; what was not measured is not in them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.timing import write
from swamp_fast.common.statistics import half_width
from swamp_fast.report.canvas import save
from swamp_fast.report.charts import draw_accuracy_lines

KEPT = ("cycle", "density", "particles", "accuracy", "loss", "mean_accuracy", "best_accuracy", "ensemble_accuracy",
        "val_accuracy", "particle_accuracy", "train_seconds", "seconds", "peak_memory")  # fmt: skip
SHOWN = (0, 3, 6, 10, 14)  # cycles of the tables, and the last
NOTE = (
    "accuracies on the JPEG copy of CIFAR-10 compare with each other, not with published CIFAR-10 figures; runs of 30 "
    "epochs a cycle are not of the paper's 150"
)
COMMAND = "python -m benchmarks.protocol --out DIR"

Row = dict[str, Any]


def keep(found: Row, results: Path) -> None:
    """Write all that was measured."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "protocol.json").write_text(json.dumps(found, indent=None, separators=(",\n", ":")) + "\n")


def tables(results: Path) -> None:
    """Write the tables and figures of what is in protocol.json."""
    data = json.loads((results / "protocol.json").read_text())
    for name, table in data["gpu"].items():
        told = {key: value for key, value in table.items() if key != "table"}
        write(name, "python -m benchmarks.gpu --out DIR", told, table["table"], results)
    for study, settings in data["studies"].items():
        rows = [row for row in data["rows"] if row["study"] == study]
        looked_at = [row for row in data["analysis"] if row["study"] == study]
        if not rows:
            continue
        places = sorted({f"{row['processor']}, torch {row['torch']}" for row in rows})
        about = {"date": data["date"], "commit": data["commit"], "device": "; ".join(places), "data": data["data"]}
        about |= {**settings, "note": data["note"]}
        accuracy(study, rows, about, results)
        speed(study, rows, data, about, results)
        if looked_at:
            geometry(study, looked_at, about, results)
    costs(data, results)


def accuracy(study: str, rows: list[Row], about: Row, results: Path) -> None:
    """Accuracy over sparsity with its spread over seeds, and differences from imp, or from N = 1, paired by seed."""
    groups = grouped(rows)
    methods = list(dict.fromkeys(method for method, _ in groups))
    baseline = next(name for name in ("imp", "N = 1", methods[0]) if name in methods)
    cycles = shown(rows)
    table, lines = [], {}
    for method in methods:
        line: Row = {"method": method}
        for cycle in cycles:
            own, there = groups.get((method, cycle), {}), groups.get((baseline, cycle), {})
            name = f"{next(row['density'] for row in rows if row['cycle'] == cycle):.1%}"
            line[name] = spread([row["accuracy"] * 100 for row in own.values()], ".2f")
            if cycle and method != baseline:
                both = sorted(set(own) & set(there))
                gains = [(own[seed]["accuracy"] - there[seed]["accuracy"]) * 100 for seed in both]
                line[f"{name}, minus {baseline}"] = interval(gains)
            elif cycle:
                line[f"{name}, minus {baseline}"] = "–"
        table.append(line)
        lines[method] = [mean_row(cycle, groups[method, cycle]) for cycle in every(groups, method)]
    told = {"cells": "test accuracy, %: mean ± standard deviation over (seeds)",
            "differences": "points, of the same seeds, with the 95 % interval of Student's t"}  # fmt: skip
    write(f"protocol_{study}", COMMAND, about | told, table, results)
    save(draw_accuracy_lines(lines), results / f"protocol_{study}.svg")


def speed(study: str, rows: list[Row], data: Row, about: Row, results: Path) -> None:
    """Seconds a cycle, of a particle's step, the share of the roofline, and memory."""
    groups = grouped(rows)
    floor = data["cost"].get(f"roofline_{about['model']}")
    table = []
    for method, cycle in groups:
        if cycle not in shown(rows):
            continue
        own = list(groups[method, cycle].values())
        line: Row = {"method": method, "density": f"{own[0]['density']:.1%}", "runs at once": own[0]["at_once"]}
        line["engine"] = own[0]["engine"]
        line["s a cycle of one run"] = spread([row["seconds"] for row in own], ".3g")
        line["of it training"] = spread([row["train_seconds"] for row in own], ".3g")
        if floor:
            steps = floor["steps_an_epoch"] * about["epochs"] * own[0]["particles"]
            step = statistics.fmean(row["train_seconds"] for row in own) / steps
            line["ms a particle-step"] = f"{step * 1e3:.3g}"
            line["share of the roofline"] = f"{floor['seconds_a_step'] / step:.1%}"
        line["memory, GB"] = f"{max(row['peak_memory'] for row in own) / 1e9:.2f}"
        table.append(line)
    told = {"seconds": "of runs at once each has an equal share",
            "roofline": "the time of a dense step whose maps go once through memory, or whose products are done, at "
                        "the rates of a copy and a product measured there"}  # fmt: skip
    write(f"protocol_{study}_speed", COMMAND, about | told, table, results)


def geometry(study: str, rows: list[Row], about: Row, results: Path) -> None:
    """Barriers between consecutive cycles, and traces of the Hessian."""
    table = []
    for (method, _), own in grouped(rows).items():
        each = list(own.values())
        there = [row["barriers"] for row in each if "barriers" in row]
        line: Row = {"method": method, "density": f"{each[0]['density']:.1%}"}
        for name, what, times in (("train loss", "train_loss", 1), ("test error, points", "test_error", 100)):
            values = [barrier[what]["max"] * times for barrier in there if what in barrier]
            line[f"barrier to the next cycle, {name}"] = spread(values, ".3g")
        for name in ("trace", "scaled", "norm"):
            line[name] = spread([row[name] for row in each], ".3g")
        table.append(line)
    told = {
        "probes": rows[0]["probes"],
        "trace": "of the Hessian, in float32; scaled by the layers' norms",
        "barrier": "11 points, over the higher end, BatchNorm re-estimated at each",
        "±": "standard deviation over (seeds)",
    }
    write(f"protocol_{study}_geometry", COMMAND, about | told, table, results)


def costs(data: Row, results: Path) -> None:
    """What one run of swamp costs by each way: measured where a run is whole, extrapolated where it is called so."""
    table = []
    for study, settings in data["studies"].items():
        model, cycles = settings["model"], settings["cycles"]
        trainings = (cycles + 1) * settings["particles"]
        epochs = trainings * settings["epochs"]
        own = [row for row in data["rows"] if (row["study"], row["method"]) == (study, "swamp")]
        seeds = [[row["seconds"] for row in own if row["seed"] == seed] for seed in {row["seed"] for row in own}]
        whole = [sum(seconds) for seconds in seeds if len(seconds) == cycles + 1]
        lines = []
        if whole:
            lines.append(("swamp_fast, with evaluation", statistics.fmean(whole), "measured"))
        naive, floor = data["cost"].get(f"naive_{model}"), data["cost"].get(f"roofline_{model}")
        if naive and study != "particles":
            models = trainings + cycles + 1
            seconds = epochs * naive["seconds_an_epoch"] + models * naive["evaluation_seconds_a_model"]
            lines.append(("naive loop, with evaluation", seconds, f"extrapolated from {naive['epochs']} epochs"))
        slices = ("gpu_light", "gpu_compiled", "gpu_rivals")  # the last of earlier versions
        rivals = [row for name, table in data["gpu"].items() if name.startswith(slices) for row in table["table"]]
        for row in rivals if floor and model == "resnet20" and study != "particles" else ():
            if not isinstance(row["ms a particle-step"], float):  # it failed
                continue
            seconds = row["ms a particle-step"] / 1e3 * floor["steps_an_epoch"] * epochs
            lines.append((f"{row['']}, training alone", seconds, "extrapolated from single steps"))
        for name, seconds, how in lines:
            line = {"study": study, "particle-epochs": epochs, "": name, "hours": f"{seconds / 3600:.3g}", "how": how}
            table.append(line | {"this / swamp_fast": f"{seconds / lines[0][1]:.2f}" if whole else "–"})
    if table:
        told = {"of": "one run of swamp, without its ticket", "date": data["date"], "commit": data["commit"]}
        devices = sorted({row["processor"] for row in data["rows"]})
        write("protocol_cost", COMMAND, told | {"device": "; ".join(devices)}, table, results)


def grouped(rows: Iterable[Row]) -> dict[tuple[str, int], dict[int, Row]]:
    """Rows by method and cycle, and by seed."""
    groups: dict[tuple[str, int], dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row["cycle"]):
        groups.setdefault((row["method"], row["cycle"]), {})[row["seed"]] = row
    order = list(dict.fromkeys(row["method"] for row in rows))
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def shown(rows: Iterable[Row]) -> list[int]:
    """The cycles of the tables that there are."""
    cycles = {row["cycle"] for row in rows}
    return sorted(cycles & {*SHOWN, max(cycles)})


def every(groups: dict[tuple[str, int], dict[int, Row]], method: str) -> list[int]:
    """A method's cycles."""
    return [cycle for name, cycle in groups if name == method]


def mean_row(cycle: int, own: dict[int, Row]) -> Row:
    """A point of the figure."""
    values = [row["accuracy"] for row in own.values()]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    density = statistics.fmean(row["density"] for row in own.values())
    return {"cycle": cycle, "density": density, "accuracy": statistics.fmean(values), "accuracy_std": deviation}


def spread(values: list[float], form: str) -> str:
    """Mean, standard deviation and number."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation} ({len(values)})"


def interval(values: list[float]) -> str:
    """Mean and its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:+.2f} (1)" if values else "–"
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] ({len(values)})"
