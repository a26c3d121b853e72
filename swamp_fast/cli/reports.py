"""The command `report`, which writes reports."""

from __future__ import annotations

import argparse

from swamp_fast.cli.flags import Commands, add_command
from swamp_fast.report import write_report


def add_report(commands: Commands) -> None:
    """Register `report`."""
    parser = add_command(commands, "report", report)
    parser.add_argument(
        "directory",
        metavar="DIR",
        help="the folder of a run, a comparison or a sweep, which gets report.html, figures/ and numbers/",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the model as for `run`, for the lines on the page that load it"
    )


def report(given: argparse.Namespace) -> None:
    """Write an HTML page about the run, comparison or sweep in a folder: figures, tables, and what is missing."""
    print(write_report(given.directory, given.model))
