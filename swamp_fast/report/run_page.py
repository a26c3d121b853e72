"""The page of one run: its settings, accuracy and cost, its analysis, and how to load and repeat the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from swamp_fast.config import RUN_ID_EXCLUDES, SwampConfig
from swamp_fast.problem.metrics import names_in
from swamp_fast.report.analysis_sections import (
    connectivity_section,
    flatness_section,
    inference_section,
    layers_section,
    other_run_section,
)
from swamp_fast.report.charts import draw_score, draw_times
from swamp_fast.report.facts import Row, RunFacts
from swamp_fast.report.formats import DASH, decimal, duration, grouped, millions, percent, significant, words
from swamp_fast.report.page import Page, Picture, Section, Table, code, render
from swamp_fast.report.usage_sections import load_section, missing_section, reproduce_section

SCORE_NAMES = {"accuracy": "accuracy", "loss": "loss", "train_loss": "training loss"}
ENSEMBLE_COLUMNS = {"accuracy": "test accuracy", "nll": "NLL", "ece": "ECE"}
# Keys of an engine's record that the list of its choices leaves out: the page shows them elsewhere, or not at all.
NOT_LISTED_AS_CHOICES = ("engine", "name", "why", "engines", "milliseconds", "rows")


def run_page(run: RunFacts) -> Page:
    """The page of a run, which need not be finished, with its analysis if there is one."""
    sections = [
        _settings_section(run),
        _warnings_section(run),
        _accuracy_section(run),
        connectivity_section(run),
        other_run_section(run),
        flatness_section(run),
        layers_section(run),
        _time_section(run),
        _engine_section(run),
        inference_section(run),
        _cycles_section(run),
        load_section(run),
        reproduce_section(run),
        missing_section(run),
    ]
    history = [_plain(row) for row in run.rows]
    present = [section for section in sections if section is not None]
    return Page(_title(run), _lead(run), _facts(run), present, {"cycles": history})


def _title(run: RunFacts) -> str:
    model = run.console_lines.get("model", [""])[0].partition(":")[0]
    names = [name for name in (model, run.train_name) if name]
    return f"{run.name}: {' on '.join(names)}" if names else run.name


def _lead(run: RunFacts) -> Markup:
    first, last = run.rows[0], run.rows[-1]
    counts = sorted({row["particles"] for row in run.rows})
    return render(
        "run/lead.html",
        particle_counts=[f"{count}" for count in dict.fromkeys((counts[0], counts[-1]))],
        single_particle=counts == [1],
        trainings=len(run.rows),
        epochs=run.config.epochs,
        average=run.config.average,
        first=_ends_of(first),
        last=_ends_of(last),
        solution=run.solution,
        trainings_left=run.trainings_left,
        trainings_planned=run.config.cycles + 1,
        analysed_cycles=run.analysed_cycles,
        analysis_is_partial=run.analysis_is_partial,
    )


def _ends_of(row: Row) -> Row:
    return {name: row[name] for name in ("density", "kept", "accuracy")}


def _facts(run: RunFacts) -> dict[str, str]:
    first, last = run.rows[0], run.rows[-1]
    epochs = sum(row["particles"] for row in run.rows) * run.config.epochs + run.config.ticket_epochs
    facts = {"weights kept": percent(last["density"])}
    if last["accuracy"] is not None:
        start = "dense accuracy" if first["density"] == 1 else "accuracy in the first cycle"
        facts |= {"test accuracy": percent(last["accuracy"]), start: percent(first["accuracy"])}
    return facts | {
        "FLOPs left": percent(last["flops"] / first["flops"], 1) if first["flops"] else DASH,
        "time": duration(sum(row["seconds"] for row in run.rows)),
        "particle-epochs": f"{epochs:,}",
    }


def _settings_section(run: RunFacts) -> Section:
    config, about = run.config, run.about
    defaults, settings = SwampConfig().to_dict(), config.to_dict()
    changed = [name for name in defaults if name not in RUN_ID_EXCLUDES and settings[name] != defaults[name]]
    changed_rows = [(code(name), words(settings[name]), words(defaults[name])) for name in changed]
    all_rows = [(code(name), words(value)) for name, value in settings.items()]
    began, updated = about.get("began"), _date(run.updated)
    origin: dict[str, Any] = {topic: Markup("<br>").join(lines) for topic, lines in run.console_lines.items()}
    origin["driver"] = f"{about['driver']}, swamp_fast {about.get('version', DASH)}"
    origin["place"] = about.get("where") or ", ".join(f"{name} {value}" for name, value in about["place"].items())
    origin["date"] = f"{_date(began)} to {updated}" if began else f"last cycle {updated}"
    fingerprints = {name: value for name, value in about["fingerprints"].items() if value is not None}
    values = {
        "method": _method(run),
        "is_swamp": (config.combine, config.rewind, run.single_particle) == ("mean", "ticket", False)
        and config.mask_score != "random"
        and config.mask_from != "dense",
        "changed": Table("settings that differ from the defaults", ("setting", "this run", "default"), changed_rows),
        "all": Table("all settings", ("setting", "value"), all_rows),
        "origin": origin,
        # Hashes, which are strings, come first. Lists of names, such as the prunable parameters, follow.
        "fingerprints": {name: code(value) for name, value in fingerprints.items() if isinstance(value, str)}
        | {name: words(value) for name, value in fingerprints.items() if not isinstance(value, str)},
    }
    return Section("What was run", "run/settings.html", values)


def _method(run: RunFacts) -> str:
    config = run.config
    if run.single_particle:
        particles = "of one particle"
    else:
        particles = f"with {'averaged' if config.combine == 'mean' else 'the best of several'} particles"
    start = "the same ticket" if config.rewind == "ticket" else f"the last {run.solution}"
    if config.mask_score == "random":
        return f"Random pruning {particles}, every cycle from {start}"
    if config.mask_from == "dense":
        return f"Magnitude pruning {particles}, every mask from the dense solution, every cycle from {start}"
    return f"Iterative magnitude pruning {particles}, every cycle from {start}"


def _warnings_section(run: RunFacts) -> Section | None:
    warnings = [warning for row in run.rows for warning in row.get("warnings") or ()]
    dropped = [
        (row["cycle"], particle["lane"], particle["epoch"]) for row in run.rows for particle in row.get("dropped") or ()
    ]
    if not warnings and not dropped:
        return None
    table = Table("dropped particles", ("cycle", "particle", "after epoch"), dropped, text_columns=0)
    return Section("Warnings", "run/warnings.html", {"warnings": warnings, "dropped": table})


def _accuracy_section(run: RunFacts) -> Section:
    rows, last = run.rows, run.rows[-1]
    has_val = any(row.get("val_accuracy") is not None for row in rows)
    if has_val or last["accuracy"] is not None:
        score = "accuracy"
    else:
        score = "loss" if last["loss"] is not None else "train_loss"
    if score == "train_loss":
        caption = (
            "Mean training loss of every particle in its last epoch. Without test data, nothing is known about "
            "generalisation."
        )
    else:
        caption = (
            f"{_legend_in_words(run)} BatchNorm is re-estimated. Test data is only reported; "
            f"{'choices use validation data' if has_val else 'nothing is chosen by it'}. The axis does not begin at 0."
        )
    title = f"{SCORE_NAMES[score].capitalize()} over sparsity"
    drawing = draw_score(rows, score, run.solution)
    picture = Picture("accuracy", title, caption, drawing, _score_rows(rows, score))
    values: dict[str, Any] = {"solution": run.solution, "comparison": None, "ensemble": None}
    values["notes"] = run.console_lines.get("accuracy", [])
    if last["accuracy"] is not None and not run.single_particle:
        chosen_by_val = None if run.config.combine == "best" else last.get("best_accuracy")
        values["comparison"] = {
            "density": last["density"],
            "to_mean": _points_from(last["accuracy"] - last["mean_accuracy"]),
            "to_ensemble": _points_from(last["accuracy"] - last["ensemble_accuracy"]),
            "best_accuracy": chosen_by_val,
        }
    ensemble = run.analysis.get("ensemble")
    if ensemble:
        values["ensemble"] = _ensemble_table(ensemble)
    return Section(title, "run/accuracy.html", values, [picture])


def _legend_in_words(run: RunFacts) -> str:
    if run.single_particle:
        return "The line is the particle."
    line = "their average" if run.solution == "average" else "the one that is best on validation data"
    return f"Every dot is a particle, the line is {line}."


def _score_rows(rows: Sequence[Row], score: str) -> list[Row]:
    """The numbers of the accuracy chart: one row per cycle, with one column per particle."""
    columns = ("cycle", "density", "kept", "accuracy", "loss", "ensemble_accuracy", "mean_accuracy", "best_accuracy")
    numbers = []
    for row in rows:
        scores = row.get(score if score == "train_loss" else f"particle_{score}") or ()
        particles = zip(_particle_numbers(row, len(scores)), scores, strict=True)
        numbers.append(
            {name: row.get(name) for name in (*columns, "val_accuracy")}
            | {f"particle {number}": value for number, value in particles}
        )
    return numbers


def _particle_numbers(row: Row, count: int) -> list[int]:
    """The numbers of the particles to which the entries of a row's lists belong. Diverged particles have no entry."""
    dropped = {particle["lane"] for particle in row.get("dropped") or ()}
    remaining = [number for number in range(row["particles"]) if number not in dropped]
    return remaining if len(remaining) == count else list(range(count))


def _ensemble_table(ensemble: Row) -> Table:
    names = [name for name in ENSEMBLE_COLUMNS if name in ensemble]
    rows = [
        (label, *((percent if name == "accuracy" else significant)(scores.get(name)) for name in names))
        for label, scores in (("ensemble", ensemble), ("single model", ensemble.get("single") or {}))
    ]
    return Table("the ensemble and the single model", ("", *(ENSEMBLE_COLUMNS[name] for name in names)), rows)


def _time_section(run: RunFacts) -> Section:
    columns = ("cycle", "density", "particles", "train_seconds", "seconds", "flops", "peak_memory")
    counts = {row["particles"] for row in run.rows}
    if run.single_particle:
        particles = "for one particle"
    elif len(counts) == 1:
        particles = f"for {counts.pop()} particles together"
    else:
        particles = "for all particles of the cycle together"
    caption = (
        f"Time of each cycle on this machine, {particles}; the whole cycle includes evaluation. FLOPs are those of one "
        "sample's forward pass through the kept weights, two per multiply-add; the times show whether an engine gains "
        "from fewer FLOPs."
    )
    rows = [{name: row.get(name) for name in columns} for row in run.rows]
    drawing = draw_times(run.rows, _engine_of_cycle(run))
    picture = Picture("time", "Time and FLOPs over sparsity", caption, drawing, rows)
    values = {
        "total": sum(row["seconds"] for row in run.rows),
        "training": sum(row["train_seconds"] for row in run.rows),
        "first": run.rows[0]["seconds"],
        "last": run.rows[-1]["seconds"],
    }
    return Section("Time", "run/time.html", values, [picture])


def _engine_of_cycle(run: RunFacts) -> dict[int, str]:
    """Cycle -> engine; {} if one engine ran all cycles."""
    engines = run.about["engine"].get("engines") or {}
    by_cycle = {int(cycle): engine for cycle, engine in engines.items() if cycle != "ticket"}
    return by_cycle if len(set(by_cycle.values())) > 1 else {}


def _engine_section(run: RunFacts) -> Section | None:
    engine = run.about["engine"]
    if not engine:
        return None
    records = [engine, *(engine.get(name) or {} for name in ("fused", "eager"))]
    switches = Table(
        "the engine of each cycle",
        ("trainings", "engine"),
        list(_engine_spans(engine.get("engines") or {})),
        text_columns=2,
    )
    timings = [
        (
            record.get("engine", ""),
            Table("measured modes", ("mode", "ms"), [(mode, significant(ms)) for mode, ms in measured.items()]),
        )
        for record in records
        if isinstance(measured := record.get("milliseconds"), Mapping) and measured
    ]
    choices = [
        (str(record.get("engine", "engine")).capitalize(), chosen)
        for record in records
        if (chosen := {name: words(value) for name, value in record.items() if _is_shown_choice(name, value)})
    ]
    moved = [
        (move["cycle"], ", ".join(f"{name} {value}" for name, value in move["from"].items()))
        for move in run.about.get("moved") or ()
    ]
    values = {
        "name": engine.get("name", "engine"),
        "why": engine.get("why") or "as requested",
        "switches": switches,
        "timings": timings,
        "choices": choices,
        "moved": moved,
    }
    return Section("The engine's choices", "run/engine.html", values)


def _engine_spans(engines: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each span of consecutive trainings by one engine, for example ("ticket to cycle 2", "eager")."""
    for engine, group in groupby(engines.items(), key=lambda item: item[1]):
        trainings = [key if key == "ticket" else f"cycle {key}" for key, _ in group]
        yield (trainings[0] if len(trainings) == 1 else f"{trainings[0]} to {trainings[-1]}"), engine


def _is_shown_choice(name: str, value: Any) -> bool:
    if name in NOT_LISTED_AS_CHOICES or value in (None, "", {}):
        return False
    if isinstance(value, Mapping):
        return all(not isinstance(part, Mapping | list) for part in value.values())
    return not isinstance(value, list)


def _cycles_section(run: RunFacts) -> Section:
    varies = len({row["particles"] for row in run.rows}) > 1
    columns = {
        "cycle": [f"{row['cycle']}" for row in run.rows],
        "density": [percent(row["density"]) for row in run.rows],
        "kept": [grouped(row["kept"]) for row in run.rows],
        "N": [f"{row['particles']}" if varies else DASH for row in run.rows],
        run.solution: [percent(row["accuracy"]) for row in run.rows],
        "particles": [_range(row.get("particle_accuracy")) for row in run.rows],
        "their mean": [percent(row.get("mean_accuracy")) for row in run.rows],
        "best on val": [percent(row.get("best_accuracy")) for row in run.rows],
        "ensemble": [percent(row.get("ensemble_accuracy")) for row in run.rows],
        "val": [percent(row.get("val_accuracy")) for row in run.rows],
        "loss": [decimal(row.get("loss")) for row in run.rows],
        "MFLOP": [millions(row["flops"]) for row in run.rows],
        "training": [duration(row["train_seconds"]) for row in run.rows],
        "cycle took": [duration(row["seconds"]) for row in run.rows],
    }
    for key in dict.fromkeys(f"{split}{name}" for row in run.rows for name in names_in(row) for split in ("", "val_")):
        columns[f"metric {key}"] = [significant(row.get(key)) for row in run.rows]
    filled = {name: cells for name, cells in columns.items() if set(cells) != {DASH}}
    rows = list(zip(*filled.values(), strict=True))
    return Section("All cycles", "run/cycles.html", {"cycles": Table("one row per cycle", [*filled], rows, 0)})


def _plain(row: Row) -> Row:
    """A row of the history for a CSV file, in which a list becomes numbers separated by spaces."""
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) and name != "dropped" else value
        for name, value in row.items()
    }


def _points_from(difference: float) -> str:
    """A phrase for a difference in accuracy, such as "0.12 points above"."""
    points = f"{abs(difference) * 100:.2f}"
    return "level with" if points == "0.00" else f"{points} points {'above' if difference > 0 else 'below'}"


def _range(values: Sequence[float] | None) -> str:
    return f"{min(values) * 100:.2f} … {percent(max(values))}" if values else DASH


def _date(moment: str) -> str:
    return moment[:16].replace("T", " ") + " UTC"
