"""The commands for one run: demo, run, show."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from swamp_fast import distributed
from swamp_fast.cli.flags import (
    Commands,
    add_command,
    add_model,
    add_settings,
    add_training_data,
    given_settings,
)
from swamp_fast.cli.networks import seeded_network
from swamp_fast.config import SwampConfig
from swamp_fast.driver import fast_swamp
from swamp_fast.models import SmallCNN
from swamp_fast.report.figures import accuracy_over_sparsity
from swamp_fast.report.tables import history_table
from swamp_fast.runs.result import SwampResult

DEMO = SwampConfig(particles=4, cycles=14, epochs=12, ticket_epochs=4, batch_size=64)


def add_demo(commands: Commands) -> None:
    """Register the command `demo` and its flags."""
    parser = add_command(commands, "demo", demo)
    parser.add_argument("--out", default="swamp_demo", metavar="DIR", help="the folder for the run and its figure")
    parser.add_argument("--epochs", type=int, help="epochs of each training; default 12")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def demo(given: argparse.Namespace) -> None:
    """Prune a small network on scikit-learn's digits through 14 cycles with four particles."""
    out = Path(given.out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEMO.seed)
        model = SmallCNN(1, 10)
    settings = {} if given.epochs is None else {"epochs": given.epochs}
    result = fast_swamp(model, "digits", config=DEMO, run_dir=out / "run", progress=not given.quiet, **settings)
    _show_result(result, out, "SWAMP, a small CNN on digits, 4 particles")
    print(f"\nThe same in a script:\n  result = fast_swamp(model, train, test)\nThe run is in {out / 'run'}.")


def add_run(commands: Commands) -> None:
    """Register the command `run` and its flags."""
    parser = add_command(commands, "run", run)
    add_model(parser)
    add_training_data(parser)
    parser.add_argument("--test", metavar="DATA", help="test data, if --data has no test split")
    parser.add_argument("--val", type=float, metavar="FRACTION", help="fraction of the training data to hold out")
    parser.add_argument("--out", metavar="DIR", help="folder for the run; to continue it, repeat the command")
    parser.add_argument("--config", metavar="FILE.toml", help="settings; flags take precedence")
    add_settings(parser)


def run(given: argparse.Namespace) -> None:
    """Run SWAMP with any network on any data. Settings come from flags or from a TOML file."""
    settings = given_settings(given)
    if given.out is not None:
        settings["run_dir"] = given.out
    base = SwampConfig.from_toml(Path(given.config)) if given.config is not None else None
    config = SwampConfig.of(base, settings)
    model = seeded_network(given.model, given.model_args, given.data, config)
    result = fast_swamp(model, given.data, given.test, val=given.val, config=config)
    if distributed.current().first:
        out = None if given.out is None else Path(given.out)
        _show_result(result, out, f"SWAMP, {given.model} on {given.data}")


def add_show(commands: Commands) -> None:
    """Register the command `show` and its flags."""
    parser = add_command(commands, "show", show)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object: settings, engine, history, place")


def show(given: argparse.Namespace) -> None:
    """Print the settings, the engine and the history of the run in a folder."""
    result = SwampResult.load(given.directory)
    if given.json:
        print(json.dumps(result.to_dict(), indent=1))
        return
    print(result.config.to_toml())
    engine = {name: value for name, value in result.engine.items() if value not in (None, {}) and name != "rows"}
    print("engine: " + ", ".join(f"{name} = {value}" for name, value in engine.items()) + "\n")
    print(history_table(result.history))
    planned = result.config.cycles + 1
    left = planned - len(result.history)
    if left:
        print(f"\n{left} of {planned} trainings are left; repeat the command with the same --out to continue.")


def _show_result(result: SwampResult, out: Path | None, title: str) -> None:
    """Print the history, and draw its accuracies into the folder `out`."""
    print(history_table(result.history))
    if out is not None and result.history[-1]["accuracy"] is not None:
        try:
            print(f"\nfigure: {accuracy_over_sparsity(result.history, out / 'accuracy.png', title)}")
        except ImportError as error:
            print(f"\nno figure: {error}")
