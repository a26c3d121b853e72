"""The command line, `swamp-fast`: one file per group of commands, with each command's flags beside its handler."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from swamp_fast import distributed
from swamp_fast.cli.analyze_ticket import add_analyze, add_ticket
from swamp_fast.cli.demo_run_show import add_demo, add_run, add_show
from swamp_fast.cli.plan_backends import add_backends, add_plan
from swamp_fast.cli.report import add_report
from swamp_fast.cli.sweep_compare import add_compare, add_sweep
from swamp_fast.version import __version__

# The order is that of `swamp-fast --help`.
COMMANDS = (
    *(add_demo, add_run, add_sweep, add_compare, add_show),
    *(add_analyze, add_ticket, add_report, add_plan, add_backends),
)
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, FloatingPointError)


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns 0 for success, 2 for an error that it reports in one line, 130 if interrupted."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    try:
        with distributed.start(getattr(given, "device", None) or "auto"):
            given.command(given)
    except USER_ERRORS as error:
        print(f"swamp-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "swamp-fast: interrupted; with --out, the same command continues from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser, also of each command, that takes no abbreviated flags and reports a usage error in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}. Run {self.prog} --help for its arguments.\n")


def _parser() -> argparse.ArgumentParser:
    description = "SWAMP: prune with averaged particles, fast."
    parser: argparse.ArgumentParser = _Parser(prog="swamp-fast", description=description)
    parser.set_defaults(command=None)
    parser.add_argument("--version", action="version", version=f"swamp_fast {__version__}")
    commands = parser.add_subparsers()
    for add in COMMANDS:
        add(commands)
    commands.metavar = " | ".join(commands.choices)
    return parser
