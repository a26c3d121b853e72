"""The sections of a run's page on using it: loading the model, repeating the run, adding what is missing."""

from __future__ import annotations

from shlex import quote

from swamp_fast.report.facts import RunFacts
from swamp_fast.report.formats import words
from swamp_fast.report.page import Section


def load_section(run: RunFacts) -> Section:
    """The section with code that loads the model, with this package and without it."""
    name = run.model_name
    module, _, factory = (name or "").partition(":")
    in_a_module = factory != "" and all(part.isidentifier() for part in [*module.split("."), factory])
    scaling = run.about.get("standardise")
    values = {
        "name": run.name,
        "model": name,
        "module": module if in_a_module else None,
        "factory": factory,
        "arguments": f"{run.model_arguments}" if run.model_arguments else "",
        "solution": run.solution,
        "earlier_cycle": max(len(run.rows) - 2, 0),
        "finished": not run.trainings_left,
        "scaling": scaling and {name: [f"{value:.6g}" for value in scaling[name]] for name in ("mean", "std")},
    }
    return Section("Load the model", "run/load.html", values)


def reproduce_section(run: RunFacts) -> Section:
    """The section with commands and code that repeat the run."""
    values = {
        "name": run.name,
        "seed": run.config.seed,
        "particles": words(run.about["config"].get("particles")),
        "model_flags": _model_flags(run),
        "data_flags": run.data_flags,
        "val": run.held_out,
        "in_python": run.about["driver"] == "fast_swamp",
        "settings": run.settings.rstrip(),
    }
    return Section("Reproduce it", "run/reproduce.html", values)


def missing_section(run: RunFacts) -> Section:
    """The section that lists what the page lacks, such as test data or an analysis, and the command for each item."""
    last, analysis = run.rows[-1], run.analysis
    names = {"consecutive": "barriers between cycles", "hessian": "flatness", "masks": "dead channels"}
    names |= {"cost": "inference cost", "ensemble": "NLL and ECE of an ensemble"}
    values = {
        "name": run.name,
        "model_flags": _model_flags(run),
        "data": run.data_name or "DATA",
        "data_flags": run.data_flags,
        "trainings_left": run.trainings_left,
        "has_test": last["accuracy"] is not None or last["loss"] is not None,
        "has_val": last.get("val_accuracy") is not None,
        "has_analysis": bool(analysis),
        "analysis_is_partial": run.analysis_is_partial,
        "cycles": len(run.rows),
        "analysed_cycles": run.analysed_cycles,
        "has_particles": bool(analysis.get("particles")) or run.single_particle,
        "keeps_particles": run.config.keep_particles,
        "analyses": [text for name, text in names.items() if not analysis.get(name)],
    }
    return Section("What is missing here", "run/missing.html", values)


def _model_flags(run: RunFacts) -> str:
    """The flag `--model`, and `--model-args` if the network was made with arguments."""
    arguments = ",".join(f"{name}={value!r}" for name, value in run.model_arguments.items())
    return f"--model {quote(run.model_name or 'MODEL')}" + (f" --model-args {quote(arguments)}" if arguments else "")
