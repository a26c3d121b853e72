"""The page of one run: what was run, what came out, where it lies among its neighbours, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from swamp_fast.config import NOT_IDENTITY, SwampConfig
from swamp_fast.report import drawings
from swamp_fast.report.console import duration, percent
from swamp_fast.report.page import Html, Page, Picture, Section, bullets, code, details, link, pairs, table, tag
from swamp_fast.report.page import text as escaped

Row = dict[str, Any]
PAPER = link("https://arxiv.org/abs/2305.14852", "Choi et al., ICLR 2024, arXiv 2305.14852")
HUTCHINSON = "Hutchinson's estimator with Rademacher vectors on the unmasked weights"


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


def page_of_run(run: RunFacts) -> Page:
    """The page of a run, finished or not, with its analysis if there is one."""
    sections = [_what(run), _warnings(run), _accuracy(run), _connected(run), _flat(run), _layers(run), _time(run)]
    sections += [_engine(run), _inference(run), _table(run), _load(run), _again(run), _missing(run)]
    found = [section for section in sections if section is not None]
    return Page(_title(run), _lead(run), _facts(run), found, {"cycles": [_plain(row) for row in run.rows]})


def _title(run: RunFacts) -> str:
    lines = _lines(run)
    what = " on ".join(each[0].partition(":")[0] for kind in ("model", "data") if (each := lines.get(kind)))
    return f"{run.name}: {what}" if what else run.name


def _lines(run: RunFacts) -> dict[str, list[str]]:
    """What the console said of model and data, by its first word."""
    found: dict[str, list[str]] = {}
    for line in run.about.get("lines", ()):
        kind, _, said = line.partition(" ")
        found.setdefault(kind, []).append(said.strip())
    return found


def _lead(run: RunFacts) -> list[str]:
    config, first, last = run.config, run.rows[0], run.rows[-1]
    counts = sorted({row["particles"] for row in run.rows})
    particles = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    one = "particle" if counts == [1] else "particles"
    window = "the mean of its SWA window" if config.swa else "its last iterate"
    said = [
        f"{particles} {one} from one ticket, {len(run.rows)} trainings of {config.epochs} epochs, pruned from "
        f"{first['kept']:,} to {last['kept']:,} weights ({percent(last['density'])}); each training counts by {window}."
    ]
    if last["accuracy"] is not None:
        start = "dense" if first["density"] == 1 else f"at {percent(first['density'])}"
        said.append(
            f"At {percent(last['density'])} the average has {percent(last['accuracy'])} test accuracy, {start} it has "
            f"{percent(first['accuracy'])}. One run has no spread over seeds."
        )
    if run.left:
        said.append(f"Unfinished: {run.left} of {config.cycles + 1} trainings are still to come.")
    return said


def _facts(run: RunFacts) -> dict[str, str]:
    first, last = run.rows[0], run.rows[-1]
    epochs = sum(row["particles"] for row in run.rows) * run.config.epochs + run.config.ticket_epochs
    facts = {"weights kept": percent(last["density"])}
    if last["accuracy"] is not None:
        start = "dense" if first["density"] == 1 else "first cycle"
        facts |= {"test accuracy": percent(last["accuracy"]), f"{start}, it was": percent(first["accuracy"])}
    facts |= {
        "FLOPs left": percent(last["flops"] / first["flops"], 1),
        "took": duration(sum(row["seconds"] for row in run.rows)),
        "particle-epochs": f"{epochs:,}",
    }
    return facts


def _what(run: RunFacts) -> Section:
    fields = {field.name: field.default for field in dataclasses.fields(SwampConfig)}
    values = run.config.to_dict()
    changed = [name for name in fields if name not in NOT_IDENTITY and values[name] != fields[name]]
    named = [(tag("code", name), _value(values[name]), _value(fields[name])) for name in changed]
    start = "the same ticket" if values["rewind"] == "ticket" else "the last average"
    about = f"Iterative magnitude pruning with averaged particles, every cycle from {start} ({PAPER})."
    text: list[Any] = [tag("p", Html(about))]
    if named:
        text.append(table(named, ("setting", "this run", "default"), "settings that differ from the defaults"))
    else:
        text.append("Every setting has its default.")
    every = [(tag("code", name), _value(value)) for name, value in values.items()]
    text.append(details("All settings", table(every, ("setting", "value"), "all settings")))
    lines = _lines(run)
    facts: dict[str, Any] = {kind: Html("<br>".join(map(escaped, lines[kind]))) for kind in lines}
    facts["driver"] = f"{run.about['driver']}, swamp_fast {run.about.get('version', '–')}"
    facts["place"] = run.about.get("where") or ", ".join(f"{k} {v}" for k, v in run.about["place"].items())
    began = run.about.get("began")
    facts["date"] = f"{_date(began)} to {_date(run.updated)}" if began else f"last cycle {_date(run.updated)}"
    prints = {name: value for name, value in run.about["fingerprints"].items() if value is not None}
    kinds = {name: value for name, value in prints.items() if isinstance(value, str)}
    others = {name: _value(value) for name, value in prints.items() if not isinstance(value, str)}
    stamps = pairs({name: tag("code", value) for name, value in kinds.items()} | others)
    return Section("What was run", [*text, pairs(facts), details("Fingerprints of model, data and callables", stamps)])


def _warnings(run: RunFacts) -> Section | None:
    told = [warning for row in run.rows for warning in row.get("warnings") or ()]
    lost = [(row["cycle"], each["lane"], each["epoch"]) for row in run.rows for each in row.get("dropped") or ()]
    if not told and not lost:
        return None
    text: list[Any] = [tag("div", bullets(told), "warn")] if told else []
    if lost:
        text.append("Particles that diverged to NaN or infinity; no average of their cycle has them:")
        text.append(table(lost, ("cycle", "particle", "after epoch"), "dropped particles", words=0))
    return Section("Warnings", text)


def _accuracy(run: RunFacts) -> Section:
    rows, last = run.rows, run.rows[-1]
    val = any(row.get("val_accuracy") is not None for row in rows)
    score = "accuracy" if val or last["accuracy"] is not None else "loss" if last["loss"] is not None else "train_loss"
    what = {"accuracy": "accuracy", "loss": "loss", "train_loss": "training loss"}[score]
    if score == "train_loss":
        caption = (
            "Mean training loss of every particle's last epoch; without test data nothing says how it generalises."
        )
    else:
        caption = (
            "Every dot is a particle, the line their average with BatchNorm re-estimated; test data is only reported, "
            f"{'selections use validation data' if val else 'nothing is selected on it'}. The axis does not begin at 0."
        )
    wanted = ("accuracy", "loss", "ensemble_accuracy", "mean_accuracy", "best_accuracy", "val_accuracy")
    numbers = []
    for row in rows:
        each = row.get(score if score == "train_loss" else f"particle_{score}") or ()
        numbers.append(
            {name: row.get(name) for name in ("cycle", "density", "kept", *wanted)}
            | {f"particle {number}": value for number, value in zip(_lanes(row, len(each)), each, strict=True)}
        )
    drawing = drawings.score_over_density(rows, score)
    picture = Picture("accuracy", f"{what.capitalize()} over sparsity", caption, drawing, numbers)
    text = []
    if last["accuracy"] is not None:
        gap = (last["accuracy"] - last["mean_accuracy"]) * 100
        beside = (last["accuracy"] - last["ensemble_accuracy"]) * 100
        best = last.get("best_accuracy")
        chosen = "" if best is None else f"; the particle best on validation data has {percent(best)}"
        text.append(
            f"At {percent(last['density'])} the average is {_beside(gap)} its particles' mean and {_beside(beside)} "
            f"their ensemble{chosen}."
        )
    ensemble = run.analysis.get("ensemble")
    after = []
    if ensemble:
        single = ensemble.get("single") or {}
        names = [name for name in ("accuracy", "nll", "ece") if name in ensemble]
        cells = [
            (label, *(percent(them.get(name)) if name == "accuracy" else _number(them.get(name)) for name in names))
            for label, them in (("ensemble", ensemble), ("single model", single))
        ]
        after = [
            table(cells, ("", *(_WORDS.get(name, name) for name in names)), "the ensemble beside the single model")
        ]
    return Section(f"{what.capitalize()} over sparsity", text, [picture], after)


def _connected(run: RunFacts) -> Section | None:
    found, pictures = run.analysis, []
    consecutive = found.get("consecutive") or []
    if consecutive:
        rows = [
            {"from": row["from"], "to": row["to"], "density": run.densities.get(row["to"])}
            | {f"{kind} over {over}": value for kind, both in (row.get("barriers") or {}).items() if both
               for over, value in both.items()}
            for row in consecutive
        ]  # fmt: skip
        caption = (
            "The highest point of the straight line between a cycle's solution and the next one's, over the higher end "
            "and over the mean of the ends; BatchNorm is re-estimated at every point, and a barrier of the test set is "
            "only reported."
        )
        drawing = drawings.barriers(consecutive, run.densities)
        pictures.append(Picture("barriers", "Barriers between consecutive cycles", caption, drawing, rows))
    particles = found.get("particles")
    matrix = (particles or {}).get("matrix") or {}
    if particles and matrix:
        names = [str(each) for each in particles["names"]]
        pairs_of = [(one, other) for one in range(len(names)) for other in range(one + 1, len(names))]
        measured = {kind: values for kind, values in matrix.items() if values}
        rows = [
            {"from": names[one], "to": names[other]} | {kind: each[one][other] for kind, each in measured.items()}
            for one, other in pairs_of
        ]
        shown = {}
        for kind in ("error", "loss"):
            split = "test" if matrix.get(f"test_{kind}") else "train"
            if values := matrix.get(f"{split}_{kind}"):
                times = 100.0 if kind == "error" else 1.0
                title = f"{split} {kind}" + (", points" if kind == "error" else "")
                written = ".2f" if kind == "error" else ".3f"
                shown[title] = ([[value * times for value in row] for row in values], written)
        caption = (
            f"Barriers between the particles of cycle {particles['cycle']}, over the {particles.get('over', 'max')} of "
            "the ends; near 0 everywhere means one basin, in which averaging is safe."
        )
        drawing = drawings.matrices(shown, names)
        pictures.append(Picture("matrix", "Barriers among the particles", caption, drawing, rows))
    plane = found.get("plane")
    if plane:
        name, label = "train_loss", "training loss"
        drawing = drawings.plane(plane["x"], plane["y"], plane[name], plane["points"], plane["names"], label)
        rows = [
            {"x": x, "y": y, name: value}
            for y, line in zip(plane["y"], plane[name], strict=True)
            for x, value in zip(plane["x"], line, strict=True)
        ]
        caption = f"Level lines of the {label} over the plane through three solutions; all other directions are unseen."
        pictures.append(Picture("plane", f"The plane of {', '.join(map(str, plane['names']))}", caption, drawing, rows))
    if not pictures:
        return None
    text = ["A barrier near 0 or below means that two solutions are linearly connected."]
    if (found.get("about") or {}).get("same_training_data") is False:
        text.append("The analysis had other training data than the run: its numbers are of those.")
    after: list[Any] = []
    hull = found.get("hull")
    if hull:
        kinds = [kind for kind in ("train_error", "test_error", "train_loss", "test_loss") if hull.get(kind)]
        corners = hull.get("corners") or {}
        cells = [
            (
                kind.replace("_", " "),
                *map(percent if "error" in kind else _number, (*_ends(hull[kind]), *_ends(corners.get(kind)))),
            )
            for kind in kinds
        ]
        head = ("", "mixtures: lowest", "highest", "particles: lowest", "highest")
        after.append(f"Random mixtures of the particles (in their convex hull): {len(hull[kinds[0]]) if kinds else 0}.")
        after.append(table(cells, head, "mixtures of the particles"))
    return Section("Connectivity", text, pictures, after)


def _flat(run: RunFacts) -> Section | None:
    hessian = run.analysis.get("hessian") or []
    if not hessian:
        return None
    names = ("cycle", "density", "trace", "trace_half_width", "scaled", "scaled_half_width", "norm", "probes")
    rows = [{name: row.get(name) for name in names} for row in hessian]
    probes = hessian[-1].get("probes")
    estimated = f"{HUTCHINSON}, {probes} of them" if probes else HUTCHINSON
    caption = (
        f"Hessian trace of the training loss with its 95 % interval, by {estimated}: the raw trace depends on the "
        "scale of the weights, which BatchNorm leaves free and averaging shrinks, so compare the one scaled by the "
        "layers' norms."
    )
    picture = Picture("flatness", "Hessian trace over sparsity", caption, drawings.traces(hessian), rows)
    last = hessian[-1].get("layers") or {}
    cells = [
        (name, _number(each.get("trace")), _number(each.get("norm")), _count(each.get("kept")))
        for name, each in last.items()
    ]
    head = ("layer", "trace", "norm", "weights kept")
    each = [
        (
            row["cycle"],
            percent(row["density"]),
            _interval(row, "trace"),
            _interval(row, "scaled"),
            _number(row.get("norm")),
        )
        for row in hessian
    ]
    columns = ("cycle", "density", "trace", "scaled", "norm of the weights")
    numbers = details("By cycle", table(each, columns, "trace by cycle", words=0))
    after = [details(f"By layer, cycle {hessian[-1]['cycle']}", table(cells, head, "trace by layer"))] if cells else []
    return Section("Flatness", [], [picture], [numbers, *after])


def _layers(run: RunFacts) -> Section | None:
    cycles = [(row["cycle"], kept) for row, kept in zip(run.rows, run.kept, strict=True)]
    if not cycles or not cycles[0][1]:
        return None
    rows = [{"cycle": cycle, **kept} for cycle, kept in cycles]
    gone = [name for name, density in cycles[-1][1].items() if density == 0]
    caption = (
        "The darker, the more of a layer is kept, in equal steps of the density's logarithm, × where nothing is; one "
        "global threshold decides, so layers thin out unequally."
    )
    drawing = drawings.layers(cycles)
    pictures = [Picture("layers", "Density by layer and cycle", caption, drawing, rows)]
    masks = run.analysis.get("masks") or []
    if masks:
        dead = [
            {"cycle": row["cycle"], "density": run.densities.get(row["cycle"])}
            | {name: row.get(name) for name in ("dead_in", "dead_out")}
            for row in masks
        ]
        caption = (
            "Channels that no weight leads to, and those that lead nowhere; with a bias or BatchNorm a channel without "
            "incoming weights may still pass a constant on."
        )
        drawing = drawings.dead_channels(masks, run.densities)
        pictures.append(Picture("dead-channels", "Dead channels over sparsity", caption, drawing, dead))
    text = [f"Pruned away whole: {', '.join(gone)}."] if gone else []
    last, first = cycles[-1], [(name, percent(density)) for name, density in cycles[-1][1].items()]
    after = [details(f"Densities in cycle {last[0]}", table(first, ("layer", "kept"), "densities by layer"))]
    return Section("Layers", text, pictures, after)


def _time(run: RunFacts) -> Section:
    names = ("cycle", "density", "particles", "train_seconds", "seconds", "flops", "peak_memory")
    rows = [{name: row.get(name) for name in names} for row in run.rows]
    counts = {row["particles"] for row in run.rows}
    of = f"{counts.pop()} particles together" if len(counts) == 1 else "as many particles as the cycle has"
    last = run.rows[-1]
    caption = (
        f"Time of each cycle on this machine, {of}; the whole cycle has evaluation too. FLOPs are of one sample's "
        "forward through kept weights, two a multiply-add; whether an engine gains by them is what the times say."
    )
    picture = Picture("time", "Time and FLOPs over sparsity", caption, drawings.times(run.rows, _ways(run)), rows)
    training = sum(row["train_seconds"] for row in run.rows)
    text = (
        f"All cycles took {duration(sum(row['seconds'] for row in run.rows))}, {duration(training)} of it training; "
        f"the last {duration(last['seconds'])}, the first {duration(run.rows[0]['seconds'])}."
    )
    return Section("Time", [text], [picture])


def _ways(run: RunFacts) -> dict[int, str]:
    """The engine of each cycle, where two ran."""
    engines = run.about["engine"].get("engines") or {}
    ways = {int(cycle): way for cycle, way in engines.items() if cycle != "ticket"}
    return ways if len(set(ways.values())) > 1 else {}


def _engine(run: RunFacts) -> Section | None:
    engine = run.about["engine"]
    if not engine:
        return None
    text: list[Any] = [f"{engine.get('engine', 'engine')}: {engine.get('why') or 'as asked'}."]
    choices = engine.get("engines") or {}
    if choices:
        spans = []
        for way, group in groupby(choices.items(), key=lambda item: item[1]):
            keys = [key if key == "ticket" else f"cycle {key}" for key, _ in group]
            spans.append((keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}", way))
        text.append(table(spans, ("trainings", "engine"), "the engine of each cycle", words=2))
    for each in (engine, *(engine.get(name) or {} for name in ("fused", "eager"))):
        measured = each.get("milliseconds")
        if isinstance(measured, Mapping) and measured:
            cells = [(way, _number(spent)) for way, spent in measured.items()]
            text.append(
                details(
                    f"What a stopwatch measured for the {each.get('engine', '')} engine",
                    table(cells, ("way", "ms"), "measured ways"),
                )
            )
    for each in (engine, *(engine.get(name) or {} for name in ("fused", "eager"))):
        plain = {name: _value(value) for name, value in each.items() if _tells(name, value)}
        if plain:
            text.append(details(f"{str(each.get('engine', 'engine')).capitalize()} engine", pairs(plain)))
    for moved in run.about.get("moved") or ():
        before = ", ".join(f"{name} {value}" for name, value in moved["from"].items())
        text.append(f"Until cycle {moved['cycle']} it ran elsewhere ({before}); bits may differ from there on.")
    return Section("The engine's choices", text)


def _tells(name: str, value: Any) -> bool:
    if name in ("engine", "why", "engines", "milliseconds", "rows"):
        return False
    simple = isinstance(value, Mapping) and all(not isinstance(each, Mapping | list) for each in value.values())
    return value not in (None, "", {}) and (not isinstance(value, Mapping | list) or simple)


def _inference(run: RunFacts) -> Section | None:
    cost = run.analysis.get("cost") or []
    if not cost:
        return None
    cells = []
    for row in cost:
        sparse, dense = row.get("sparse_ms"), row.get("dense_ms")
        faster = f"{dense / sparse:.2f}" if sparse and dense else "–"
        share = percent(row["flops"] / row["dense_flops"], 1) if row.get("flops") and row.get("dense_flops") else "–"
        density = percent(run.densities.get(row["cycle"]))
        numbers = (_mega(row.get("flops")), share, _count(row.get("kept")), _count(row.get("bytes")))
        cells.append((row["cycle"], density, *numbers, _number(sparse), _number(dense), faster))
    head = ("cycle", "density", "MFLOP", "of dense", "kept", "bytes", "sparse, ms", "dense, ms", "dense / sparse")
    text = (
        "Of one forward; milliseconds are measured on this CPU with this project's kernels against the dense model, a "
        "dash where that was not."
    )
    return Section("Inference", [text, table(cells, head, "inference cost", words=0)])


def _table(run: RunFacts) -> Section:
    rows = run.rows
    columns: dict[str, Any] = {
        "cycle": lambda row: row["cycle"],
        "density": lambda row: percent(row["density"]),
        "kept": lambda row: _count(row["kept"]),
        "N": lambda row: row["particles"] if len({row["particles"] for row in rows}) > 1 else "–",
        "average": lambda row: percent(row["accuracy"]),
        "particles": lambda row: _range(row.get("particle_accuracy")),
        "their mean": lambda row: percent(row.get("mean_accuracy")),
        "best on val": lambda row: percent(row.get("best_accuracy")),
        "ensemble": lambda row: percent(row.get("ensemble_accuracy")),
        "val": lambda row: percent(row.get("val_accuracy")),
        "loss": lambda row: "–" if row.get("loss") is None else f"{row['loss']:.4f}",
        "MFLOP": lambda row: _mega(row["flops"]),
        "training": lambda row: duration(row["train_seconds"]),
        "cycle took": lambda row: duration(row["seconds"]),
    }
    cells = {name: [str(made(row)) for row in rows] for name, made in columns.items()}
    shown = [name for name, column in cells.items() if set(column) != {"–"}]
    lines = list(zip(*(cells[name] for name in shown), strict=True))
    text = Html(
        f"Accuracies on test data; every number of the history is in {link('numbers/cycles.csv', 'cycles.csv')}."
    )
    return Section("All cycles", [tag("p", text), table(lines, shown, "a row a cycle", words=0)])


def _load(run: RunFacts) -> Section:
    name = run.known("model", "")
    if ":" in name:
        module, _, factory = name.partition(":")
        made = f"from {module} import {factory}\n\nmodel = {factory}()"
    elif name:
        made = "from swamp_fast.models import build_model\n\n"
        made += f'model = build_model("{name}", channels, height, width, classes)'
    else:
        made = "\nmodel = ...  # the architecture that was pruned, with any weights"
    lines = [
        f"from swamp_fast import SwampResult\n{made}",
        f'result = SwampResult.load("{run.name}", model)',
        "result.model  # the last average as a plain module: zeros where pruned, eval mode",
        "result.masks  # name -> bool tensor",
        f"module, masks = result.at({max(len(run.rows) - 2, 0)})  # any cycle's",
    ]
    text: list[Any] = [f"From the folder that holds {run.name}/:", code("\n".join(lines))]
    if not run.left:
        plain = (
            "from safetensors.torch import load_file\n\n"
            f'model.load_state_dict(load_file("{run.name}/model.safetensors"))\nmodel.eval()'
        )
        text += ["Or without swamp_fast:", code(plain)]
    if run.about.get("standardise"):
        mean, std = (", ".join(f"{each:.6g}" for each in run.about["standardise"][name]) for name in ("mean", "std"))
        text.append(
            f"The model takes pictures as (pictures / 255 - mean) / std, by channel: mean = [{mean}], std = [{std}] "
            "(result.standardise)."
        )
    return Section("Load the model", text)


def _again(run: RunFacts) -> Section:
    model, data = run.known("model", "MODEL"), run.known("data", "DATA")
    command = f"swamp-fast run --model {model} --data {data} --config {run.name}/config.toml --out {run.name}-again"
    particles = run.about["config"].get("particles")
    text: list[Any] = [
        f"The seed of batch order, augmentation and dropout is {run.config.seed}; a particle's draws depend on it, the "
        f"cycle and the particle's number alone (N = {_value(particles)}). The initial weights are the model's: on the "
        "command line they are drawn under the same seed, elsewhere the model's fingerprint tells whether they are the "
        "same.",
        code(command),
    ]
    if run.about["driver"] == "fast_swamp":
        text += ["In Python:", code(
            "from pathlib import Path\n\nfrom swamp_fast import SwampConfig, fast_swamp\n\n"
            f'config = SwampConfig.from_toml(Path("{run.name}/config.toml")).replace(run_dir="{run.name}-again")\n'
            "result = fast_swamp(model, train, test, config=config)"
        )]  # fmt: skip
    chosen = "The engine and its ways are chosen by a stopwatch, so other bits may come on another machine; "
    text += [f"{chosen}what was chosen here is in run.json. The settings, config.toml:", code(run.settings.rstrip())]
    return Section("Reproduce it", text)


def _missing(run: RunFacts) -> Section | None:
    model, data = run.known("model", "MODEL"), run.known("data", "DATA")
    begin, where = f"swamp-fast run --model {model} --data {data}", f"--out {run.name}"
    analyze, last = f"swamp-fast analyze {run.name} --model {model} --data {data}", run.rows[-1]
    lacks = []
    if run.left:
        lacks.append((f"{run.left} trainings", f"{begin} --config {run.name}/config.toml {where}"))
    if last["accuracy"] is None and last["loss"] is None:
        lacks.append(("accuracies: the run had no test data", f"{begin} --test DATA --out NEW_DIR"))
    if last.get("val_accuracy") is None:
        lacks.append(("the particle that is best on validation data: none was held out",
                      f"{begin} --val 0.1 --out NEW_DIR"))  # fmt: skip
    if not run.analysis:
        lacks.append(("barriers, flatness, dead channels and inference cost: no analysis yet", analyze))
    else:
        if not run.analysis.get("particles"):
            lacks.append(("barriers among the particles, which the run must keep for that",
                          f"{begin} --keep-particles --out NEW_DIR"))  # fmt: skip
        names = {"consecutive": "barriers between cycles", "hessian": "flatness", "masks": "dead channels"}
        names |= {"cost": "inference cost", "ensemble": "NLL and ECE of an ensemble"}
        gone = [said for name, said in names.items() if not run.analysis.get(name)]
        if gone:
            lacks.append((", ".join(gone), analyze))
    lacks.append(("a spread over seeds, and the baselines", "swamp-fast compare FILE.toml"))
    return Section("What is missing here", [
        bullets(escaped(f"{what}: ") + tag("code", command) for what, command in lacks)
    ])  # fmt: skip


_WORDS = {"nll": "NLL", "ece": "ECE", "accuracy": "test accuracy"}


def _lanes(row: Row, count: int) -> list[int]:
    """The numbers of the particles that a row's lists are of."""
    dropped = {each["lane"] for each in row.get("dropped") or ()}
    left = [lane for lane in range(row["particles"]) if lane not in dropped]
    return left if len(left) == count else list(range(count))


def _plain(row: Row) -> Row:
    """A row of the history for a CSV file: a list becomes numbers with spaces between."""
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) and name != "dropped" else value
        for name, value in row.items()
    }


def _beside(points: float) -> str:
    """A difference in accuracy, in words."""
    return (
        f"{abs(points):.2f} points {'above' if points > 0 else 'below'}" if f"{points:.2f}" != "0.00" else "level with"
    )


def _ends(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    return (min(values), max(values)) if values else (None, None)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "–"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_value, value))
    return _number(value) if isinstance(value, float) else f"{value}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(row: Row, name: str) -> str:
    half = row.get(f"{name}_half_width")
    return _number(row.get(name)) + ("" if half is None else f" ± {half:.2g}")


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _mega(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}"


def _range(values: Sequence[float] | None) -> str:
    return f"{min(values) * 100:.2f} … {max(values) * 100:.2f} %" if values else "–"


def _date(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC"
