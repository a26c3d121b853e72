"""The commands that examine solutions: analyze a finished run, find a matching ticket."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from swamp_fast import analysis, distributed
from swamp_fast.cli.flags import (
    Commands,
    add_command,
    add_model,
    add_settings,
    add_training_data,
    given_settings,
    numbers,
)
from swamp_fast.cli.networks import seeded_network
from swamp_fast.config import SwampConfig
from swamp_fast.runs.files import write
from swamp_fast.runs.result import SwampResult


def add_analyze(commands: Commands) -> None:
    """Register the command `analyze` and its flags."""
    parser = add_command(commands, "analyze", analyze)
    parser.add_argument("directory", metavar="RUN_DIR")
    add_model(parser, "as for the run")
    parser.add_argument("--data", required=True, help="as for the run")
    parser.add_argument("--test", metavar="DATA", help="as for the run")
    parser.add_argument("--val", type=float, metavar="FRACTION", help="as for the run")
    parser.add_argument("--points", type=int, default=11, help="points on a path; default 11")
    parser.add_argument(
        "--probes", type=int, default=32, help="probes for the Hessian's trace; default 32; 0: no trace"
    )
    parser.add_argument(
        "--mixtures", type=int, default=32, help="random mixtures of the particles; default 32; 0: none"
    )
    parser.add_argument("--size", type=int, default=11, help="points per axis of the plane; default 11; 0: no plane")
    parser.add_argument("--against", metavar="RUN_DIR2", help="another run of the model, for comparison")
    parser.add_argument("--repeats", type=int, default=15, help="repeats of each timing; default 15; 0: no timing")
    parser.add_argument("--samples", type=int, metavar="N", help="use N training samples instead of all")
    parser.add_argument("--anyway", action="store_true", help="analyse even if the data differ from those of the run")
    parser.add_argument("--engine", help="an engine instead of the run's")
    parser.add_argument("--device", help="a device instead of the run's")
    parser.add_argument("--data-dir", help="a data folder instead of the run's")


def analyze(given: argparse.Namespace) -> None:
    """Measure connectivity, flatness, masks and cost of a finished run, and write analysis.json into its folder."""
    if not distributed.current().first:
        return
    result = SwampResult.load(given.directory)
    overrides = {name: getattr(given, name) for name in ("device", "engine", "data_dir")}
    config = result.config.replace(**{name: value for name, value in overrides.items() if value is not None})
    model = seeded_network(given.model, given.model_args, given.data, config)
    SwampResult.load(given.directory, model)  # raises if the model doesn't fit the run
    on = analysis.Analysis(
        *(model, given.data, given.test),
        val=given.val,
        prunable=sorted(result.masks),
        config=config,
        standardise=result.standardise,
        samples=given.samples,
    )
    against = None if given.against is None else SwampResult.load(given.against, model)
    _check_same(analysis.differing(on, result), given.anyway, "the run")
    if against is not None:
        _check_same(analysis.differing(on, against), given.anyway, given.against)
    sizes = {name: getattr(given, name) for name in ("points", "probes", "mixtures", "size", "repeats")}
    content = analysis.analyze(on, result, **sizes, against=against)
    if against is not None:
        content["against"]["run"] = Path(given.against).resolve().name
    content["about"] |= {"model": given.model, "model_args": given.model_args, "data": given.data}
    path = Path(given.directory) / "analysis.json"
    write(path, json.dumps(content, indent=1).encode())
    print(f"{analysis.table(content)}\n\nall numbers: {path}")


def add_ticket(commands: Commands) -> None:
    """Register the command `ticket` and its flags."""
    parser = add_command(commands, "ticket", ticket)
    add_model(parser)
    add_training_data(parser)
    parser.add_argument(
        "--val", type=float, required=True, metavar="FRACTION", help="fraction of the training data to hold out"
    )
    parser.add_argument(
        "--candidates", type=numbers, required=True, metavar="T0,T0,…", help="ticket epochs to try, such as 0,2,5"
    )
    parser.add_argument(
        "--epsilon", type=float, default=0.02, help="the highest error barrier that counts as stable; default 0.02"
    )
    parser.add_argument("--points", type=int, default=11, help="points on each path; default 11")
    parser.add_argument("--samples", type=int, metavar="N", help="use N training samples instead of all")
    parser.add_argument("--out", metavar="DIR", help="folder for the trainings; to continue them, repeat the command")
    add_settings(parser, without=("particles", "cycles", "ticket_epochs", "keep_particles"))


def ticket(given: argparse.Namespace) -> None:
    """Find how long the ticket must train, by the error barrier between two children of each candidate ticket."""
    config = SwampConfig.of(None, {**given_settings(given), "run_dir": given.out})
    model = seeded_network(given.model, given.model_args, given.data, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table below repeats the warning
        stability = analysis.ticket_stability(
            *(model, given.data, given.val, given.candidates),
            config=config,
            epsilon=given.epsilon,
            points=given.points,
            samples=given.samples,
        )
    if distributed.current().first:
        print(stability.table())


def _check_same(differing: list[str], anyway: bool, run: str) -> None:
    """Raise ValueError if the run had another loss or forward, or had other data and `anyway` is not set.

    differing  the names of what differs from the run, as analysis.differing returns them
    run        the run, as messages name it
    """
    callables = [f"`{name}`" for name in ("loss", "forward") if name in differing]
    if callables:
        raise ValueError(
            f"{run} used a {' and a '.join(callables)} that the command line can't pass: analyse it from Python, by "
            "swamp_fast.analysis."
        )
    splits = ", ".join(name for name in ("train", "val", "test") if name in differing)
    if splits and not anyway:
        raise ValueError(
            f"the {splits} data differ from {run}'s; pass the --data, --test and --val of that run, or --anyway to "
            "analyse it on these data."
        )
    if splits:
        print(f"swamp-fast: the {splits} data differ from {run}'s.", file=sys.stderr)
