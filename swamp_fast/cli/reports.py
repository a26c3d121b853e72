"""The command that writes reports: report."""

from __future__ import annotations

import argparse

from swamp_fast.cli.flags import Commands, add_command
from swamp_fast.report import write_report


def add_report(commands: Commands) -> None:
    """Register `report`."""
    parser = add_command(commands, "report", report)
    parser.add_argument("directory", metavar="DIR", help="the folder; report.html, figures/ and numbers/ go into it")
    parser.add_argument("--model", metavar="NAME", help="as for run, for the lines that load the model")


def report(given: argparse.Namespace) -> None:
    """Write the HTML page of a run's, a comparison's or a sweep's folder: figures, tables, and what is missing."""
    print(write_report(given.directory, given.model))
