"""The page of one run: what was run, what came out, where it lies among its neighbours, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from shlex import quote
from typing import Any

from swamp_fast.common.format import duration, percent
from swamp_fast.config import RUN_ID_EXCLUDES, SwampConfig
from swamp_fast.report import drawings
from swamp_fast.report.facts import Row, RunFacts, in_digits, in_millions, in_python, in_thousands, in_words
from swamp_fast.report.of_analysis import compared, connected, flat, inference, layers
from swamp_fast.report.page import Html, Page, Picture, Section, bullets, code, details, link, pairs, table, tag
from swamp_fast.report.page import text as escaped

PAPER = link("https://arxiv.org/abs/2305.14852", "Choi et al., ICLR 2024, arXiv 2305.14852")


def page_of_run(run: RunFacts) -> Page:
    """The page of a run, finished or not, with its analysis if there is one."""
    sections = [_what(run), _warnings(run), _accuracy(run), connected(run), compared(run), flat(run), layers(run)]
    sections += [_time(run)]
    sections += [_engine(run), inference(run), _table(run), _load(run), _again(run), _missing(run)]
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
            f"At {percent(last['density'])} the {run.solution} has {percent(last['accuracy'])} test accuracy, {start} "
            f"it has {percent(first['accuracy'])}. One run has no spread over seeds."
        )
    if run.left:
        said.append(f"Unfinished: {run.left} of {config.cycles + 1} trainings are still to come.")
    if run.analysed not in (None, len(run.rows)):
        said.append(f"The analysis is of {run.analysed} cycles, the run has {len(run.rows)}: analyse it again.")
    return said


def _facts(run: RunFacts) -> dict[str, str]:
    first, last = run.rows[0], run.rows[-1]
    epochs = sum(row["particles"] for row in run.rows) * run.config.epochs + run.config.ticket_epochs
    facts = {"weights kept": percent(last["density"])}
    if last["accuracy"] is not None:
        start = "dense" if first["density"] == 1 else "first cycle"
        facts |= {"test accuracy": percent(last["accuracy"]), f"{start}, it was": percent(first["accuracy"])}
    facts |= {
        "FLOPs left": percent(last["flops"] / first["flops"], 1) if first["flops"] else "–",
        "took": duration(sum(row["seconds"] for row in run.rows)),
        "particle-epochs": f"{epochs:,}",
    }
    return facts


def _what(run: RunFacts) -> Section:
    fields = {field.name: field.default for field in dataclasses.fields(SwampConfig)}
    values = run.config.to_dict()
    changed = [name for name in fields if name not in RUN_ID_EXCLUDES and values[name] != fields[name]]
    named = [(tag("code", name), in_words(values[name]), in_words(fields[name])) for name in changed]
    text: list[Any] = [tag("p", Html(f"{_method(run)}."))]
    if named:
        text.append(table(named, ("setting", "this run", "default"), "settings that differ from the defaults"))
    else:
        text.append("Every setting has its default.")
    every = [(tag("code", name), in_words(value)) for name, value in values.items()]
    text.append(details("All settings", table(every, ("setting", "value"), "all settings")))
    lines = _lines(run)
    facts: dict[str, Any] = {kind: Html("<br>".join(map(escaped, lines[kind]))) for kind in lines}
    facts["driver"] = f"{run.about['driver']}, swamp_fast {run.about.get('version', '–')}"
    facts["place"] = run.about.get("where") or ", ".join(f"{k} {v}" for k, v in run.about["place"].items())
    began = run.about.get("began")
    facts["date"] = f"{_date(began)} to {_date(run.updated)}" if began else f"last cycle {_date(run.updated)}"
    prints = {name: value for name, value in run.about["fingerprints"].items() if value is not None}
    kinds = {name: value for name, value in prints.items() if isinstance(value, str)}
    others = {name: in_words(value) for name, value in prints.items() if not isinstance(value, str)}
    stamps = pairs({name: tag("code", value) for name, value in kinds.items()} | others)
    return Section("What was run", [*text, pairs(facts), details("Fingerprints of model, data and callables", stamps)])


def _method(run: RunFacts) -> str:
    """What the run does, in words."""
    config = run.config
    of = "of one particle" if run.alone else f"with {'averaged' if config.combine == 'mean' else 'the best of several'}"
    of += "" if run.alone else " particles"
    start = "the same ticket" if config.rewind == "ticket" else f"the last {run.solution}"
    if config.mask_score == "random":
        return f"Random pruning {of}, every cycle from {start}"
    if config.mask_from == "dense":
        return f"Magnitude pruning {of}, every mask from the dense solution, every cycle from {start}"
    swamp = (config.combine, config.rewind, run.alone) == ("mean", "ticket", False)
    paper = f" ({PAPER})" if swamp else ""
    return f"Iterative magnitude pruning {of}, every cycle from {start}{paper}"


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
            f"{_seen(run)} with BatchNorm re-estimated; test data is only reported, "
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
    drawing = drawings.score_over_density(rows, score, run.solution)
    picture = Picture("accuracy", f"{what.capitalize()} over sparsity", caption, drawing, numbers)
    text = []
    if last["accuracy"] is not None and not run.alone:
        gap = (last["accuracy"] - last["mean_accuracy"]) * 100
        beside = (last["accuracy"] - last["ensemble_accuracy"]) * 100
        best = last.get("best_accuracy")
        chosen = f"; the particle best on validation data has {percent(best)}"
        chosen = "" if best is None or run.config.combine == "best" else chosen
        text.append(
            f"At {percent(last['density'])} the {run.solution} is {_beside(gap)} its particles' mean and "
            f"{_beside(beside)} their ensemble{chosen}."
        )
    ensemble = run.analysis.get("ensemble")
    after = []
    if ensemble:
        single = ensemble.get("single") or {}
        names = [name for name in ("accuracy", "nll", "ece") if name in ensemble]
        cells = [
            (label, *(percent(them.get(name)) if name == "accuracy" else in_digits(them.get(name)) for name in names))
            for label, them in (("ensemble", ensemble), ("single model", single))
        ]
        after = [
            table(cells, ("", *(_WORDS.get(name, name) for name in names)), "the ensemble beside the single model")
        ]
    return Section(f"{what.capitalize()} over sparsity", text, [picture], after)


def _time(run: RunFacts) -> Section:
    names = ("cycle", "density", "particles", "train_seconds", "seconds", "flops", "peak_memory")
    rows = [{name: row.get(name) for name in names} for row in run.rows]
    counts = {row["particles"] for row in run.rows}
    of = f"{counts.pop()} particles together" if len(counts) == 1 else "as many particles as the cycle has"
    of = "of one particle" if run.alone else of
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


def _seen(run: RunFacts) -> str:
    """What dots and the line are."""
    line = "their average" if run.solution == "average" else "the one best on validation data"
    return "The line is the particle" if run.alone else f"Every dot is a particle, the line {line}"


def _ways(run: RunFacts) -> dict[int, str]:
    """The engine of each cycle, where two ran."""
    engines = run.about["engine"].get("engines") or {}
    ways = {int(cycle): way for cycle, way in engines.items() if cycle != "ticket"}
    return ways if len(set(ways.values())) > 1 else {}


def _engine(run: RunFacts) -> Section | None:
    engine = run.about["engine"]
    if not engine:
        return None
    text: list[Any] = [f"{engine.get('name', 'engine')}: {engine.get('why') or 'as requested'}."]
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
            cells = [(way, in_digits(spent)) for way, spent in measured.items()]
            text.append(
                details(
                    f"What a stopwatch measured for the {each.get('engine', '')} engine",
                    table(cells, ("way", "ms"), "measured ways"),
                )
            )
    for each in (engine, *(engine.get(name) or {} for name in ("fused", "eager"))):
        plain = {name: in_words(value) for name, value in each.items() if _tells(name, value)}
        if plain:
            text.append(details(f"{str(each.get('engine', 'engine')).capitalize()} engine", pairs(plain)))
    for moved in run.about.get("moved") or ():
        before = ", ".join(f"{name} {value}" for name, value in moved["from"].items())
        text.append(f"Until cycle {moved['cycle']} it ran elsewhere ({before}); bits may differ from there on.")
    return Section("The engine's choices", text)


def _tells(name: str, value: Any) -> bool:
    if name in ("engine", "name", "why", "engines", "milliseconds", "rows"):
        return False
    simple = isinstance(value, Mapping) and all(not isinstance(each, Mapping | list) for each in value.values())
    return value not in (None, "", {}) and (not isinstance(value, Mapping | list) or simple)


def _table(run: RunFacts) -> Section:
    rows = run.rows
    columns: dict[str, Any] = {
        "cycle": lambda row: row["cycle"],
        "density": lambda row: percent(row["density"]),
        "kept": lambda row: in_thousands(row["kept"]),
        "N": lambda row: row["particles"] if len({row["particles"] for row in rows}) > 1 else "–",
        run.solution: lambda row: percent(row["accuracy"]),
        "particles": lambda row: _range(row.get("particle_accuracy")),
        "their mean": lambda row: percent(row.get("mean_accuracy")),
        "best on val": lambda row: percent(row.get("best_accuracy")),
        "ensemble": lambda row: percent(row.get("ensemble_accuracy")),
        "val": lambda row: percent(row.get("val_accuracy")),
        "loss": lambda row: "–" if row.get("loss") is None else f"{row['loss']:.4f}",
        "MFLOP": lambda row: in_millions(row["flops"]),
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
    if ":" in name and all(part.isidentifier() for part in name.replace(":", ".").split(".")):
        module, _, factory = name.partition(":")
        made = f"from {module} import {factory}\n\nmodel = {factory}()"
    elif name:
        made = "from swamp_fast.models import build_model\n\n"
        made += f"model = build_model({in_python(name)}, channels, height, width, classes)"
    else:
        made = "\nmodel = ...  # the architecture that was pruned, with any weights"
    lines = [
        f"from swamp_fast import SwampResult\n{made}",
        f"result = SwampResult.load({in_python(run.name)}, model)",
        f"result.model  # the last {run.solution} as a plain module: zeros where pruned, eval mode",
        "result.masks  # name -> bool tensor",
        f"module, masks = result.at({max(len(run.rows) - 2, 0)})  # any cycle's",
    ]
    text: list[Any] = [f"From the folder that holds {run.name}/:", code("\n".join(lines))]
    if not run.left:
        plain = (
            "from safetensors.torch import load_file\n\n"
            f"model.load_state_dict(load_file({in_python(f'{run.name}/model.safetensors')}))\nmodel.eval()"
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
    settings, out = f"{run.name}/config.toml", f"{run.name}-again"
    command = f"swamp-fast run --model {quote(run.known('model', 'MODEL'))} {run.data_flags} --config {quote(settings)}"
    val = "" if run.held_out is None else f"val={run.held_out}, "
    particles = run.about["config"].get("particles")
    text: list[Any] = [
        f"The seed of batch order, augmentation and dropout is {run.config.seed}; a particle's draws depend on it, the "
        f"cycle and the particle's number alone (N = {in_words(particles)}). The initial weights are the model's: on "
        "the command line they are drawn under the same seed, elsewhere the model's fingerprint tells whether they are "
        "the same.",
        code(f"{command} --out {quote(out)}"),
    ]
    if run.about["driver"] == "fast_swamp":
        text += ["In Python:", code(
            "from pathlib import Path\n\nfrom swamp_fast import SwampConfig, fast_swamp\n\n"
            f"config = SwampConfig.from_toml(Path({in_python(settings)})).replace(run_dir={in_python(out)})\n"
            f"result = fast_swamp(model, train, test, {val}config=config)"
        )]  # fmt: skip
    chosen = (
        "The engine's name and where it ran are in run.json; another processor or other versions may give other bits."
    )
    text += [f"{chosen} The settings, config.toml:", code(run.settings.rstrip())]
    return Section("Reproduce it", text)


def _missing(run: RunFacts) -> Section | None:
    model, data = quote(run.known("model", "MODEL")), quote(run.known("data", "DATA"))
    begin, last = f"swamp-fast run --model {model}", run.rows[-1]
    analyze = f"swamp-fast analyze {quote(run.name)} --model {model} {run.data_flags}"
    lacks = []
    if run.left:
        settings = quote(f"{run.name}/config.toml")
        lacks.append((f"{run.left} trainings", f"{begin} {run.data_flags} --config {settings} --out {quote(run.name)}"))
    if last["accuracy"] is None and last["loss"] is None:
        lacks.append(("accuracies: the run had no test data", f"{begin} --data {data} --test TEST --out NEW_DIR"))
    if last.get("val_accuracy") is None:
        lacks.append(("the particle that is best on validation data: none was held out",
                      f"{begin} --data {data} --val 0.1 --out NEW_DIR"))  # fmt: skip
    if not run.analysis:
        lacks.append(("barriers, flatness, dead channels and inference cost: no analysis yet", analyze))
    else:
        if run.analysed not in (None, len(run.rows)):
            lacks.append((f"an analysis of all {len(run.rows)} cycles: there is one of {run.analysed}", analyze))
        elif not run.analysis.get("particles") and not run.alone:
            kept = run.config.keep_particles
            lacks.append(("barriers among the particles" + ("" if kept else ", which the run must keep for that"),
                          analyze if kept else f"{begin} {run.data_flags} --keep-particles --out NEW_DIR"))  # fmt: skip
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


def _range(values: Sequence[float] | None) -> str:
    return f"{min(values) * 100:.2f} … {max(values) * 100:.2f} %" if values else "–"


def _date(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC"
