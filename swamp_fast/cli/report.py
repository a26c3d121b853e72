"""The command `report`, which writes reports."""

from __future__ import annotations

import argparse

from swamp_fast.cli.flags import Commands, add_command, add_model_arguments
from swamp_fast.report import write_report


def add_report(commands: Commands) -> None:
    """Register the command `report` and its flags."""
    parser = add_command(commands, "report", report)
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="folder of a run, comparison or sweep, which gets the report",
    )
    parser.add_argument("--model", metavar="NAME", help="as for `run`, for the lines on the page that load the model")
    add_model_arguments(parser)


def report(given: argparse.Namespace) -> None:
    """Write an HTML page about the run, comparison or sweep in a folder: figures, tables, and what is missing."""
    print(write_report(given.directory, given.model, given.model_args))
