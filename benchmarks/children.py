"""Runs commands one after the other as child processes, each with a time limit, and all within one budget.

If a child fails or hangs, or if no time is left for it, the report says so, and the next child starts. After each
child, the report and all files that children wrote are packed. This module imports only the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table

GRACE_SECONDS = 3.0  # from SIGTERM to SIGKILL
MIN_SECONDS = 10.0  # a child is skipped if less time than this is left for it
PACKING_SECONDS = 5.0  # reserved from the budget for packing the results
SHOWN_LINES = 15  # last lines of a log that are printed after its child; the report shows four times as many
NEEDS_GPU = "needs a GPU"  # a child's last line contains this if parts of its work need a GPU that is missing


@dataclass(frozen=True)
class Child:
    """A command to run for at most `seconds`. "{minutes}" in the command stands for 90 % of the time it gets.

    tests   whether the command runs pytest; a run in which no test passed then counts as failed
    leaves  seconds of the budget that this child must leave for the children after it
    """

    name: str
    seconds: float
    command: Sequence[str]
    tests: bool = False
    leaves: float = 0.0


@dataclass(frozen=True)
class Row:
    """How a child ended. `result` starts with "passed", "needs a GPU", "failed", "killed", "skipped" or "stopped"."""

    name: str
    result: str
    seconds: float
    last_line: str

    @property
    def broken(self) -> bool:
        """Whether the child failed or was killed. A child that was skipped for lack of time is not broken."""
        return self.result.startswith(("failed", "killed"))


class Visit:
    """Runs children within a budget of seconds.

    out    folder for steps.md and for results.tgz, which holds all of `work`, with a log NAME.log per child
    title  the heading of steps.md
    """

    def __init__(
        self, out: Path, work: Path, seconds: float, environment: Mapping[str, str], cwd: Path, title: str
    ) -> None:
        self.out, self.work, self.seconds = out, work, seconds
        self.environment, self.cwd, self.title = environment, cwd, title
        self.began = time.monotonic()
        self.rows: list[Row] = []
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        """The seconds of the budget that children may still use."""
        return self.seconds - PACKING_SECONDS - (time.monotonic() - self.began)

    def run(self, children: Sequence[Child]) -> None:
        """Run the children in order, and pack the results after each child."""
        for child in children:
            try:
                self._run(child)
            finally:
                try:
                    self.pack()
                except (
                    OSError
                ) as error:  # if the disk is full, for example, the next children still print their results
                    print(f"results were not packed: {error}", flush=True)

    def _run(self, child: Child) -> None:
        if self.seconds_left - child.leaves < MIN_SECONDS:
            self._add(Row(child.name, "skipped, too late", 0.0, ""))
            return
        limit = min(child.seconds, self.seconds_left - child.leaves)
        began = time.monotonic()
        command = [part.replace("{minutes}", f"{0.9 * limit / 60:.2f}") for part in child.command]
        options = {"stderr": subprocess.STDOUT, "cwd": self.cwd, "env": dict(self.environment)}
        try:
            with self.log(child.name).open("wb") as file, child_process(command, stdout=file, **options) as process:
                code = process.wait(limit)
                result = "passed" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"killed after {limit:.0f} s"
        except OSError as error:
            self._add(Row(child.name, f"failed to start: {error}", time.monotonic() - began, ""))
            return
        except BaseException:
            seconds = time.monotonic() - began
            self._add(Row(child.name, "stopped by a signal", seconds, self.last_lines(child.name, 1)))
            raise
        last_line = self.last_lines(child.name, 1)
        end = self.last_lines(child.name, SHOWN_LINES)  # several lines, as others may follow pytest's summary
        if result == "passed" and child.tests and not re.search(r"\d+ passed", end):
            result = NEEDS_GPU if "skipped" in end else "failed, no test ran"
        elif result == "passed" and NEEDS_GPU in last_line:
            result = NEEDS_GPU
        self._add(Row(child.name, result, time.monotonic() - began, last_line))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"\n== {row.name}: {row.result}, {row.seconds:.0f} s", flush=True)
        if row.seconds:
            print(self.last_lines(row.name, SHOWN_LINES), flush=True)

    def log(self, name: str) -> Path:
        """Return the path of a child's log."""
        return self.work / f"{name}.log"

    def last_lines(self, name: str, count: int) -> str:
        """Return the last `count` lines of a child's log that are not empty."""
        lines = self.log(name).read_text(errors="replace").splitlines() if self.log(name).exists() else []
        return "\n".join(line[:200] for line in [line for line in lines if line.strip()][-count:])

    def pack(self) -> None:
        """Replace results.tgz and steps.md, each of them atomically."""
        rows = [
            {"step": row.name, "result": row.result, "s": f"{row.seconds:.0f}", "last line": row.last_line}
            for row in self.rows
        ]
        lines = [f"# {self.title}", "", *markdown_table(rows), "", self.verdict(), ""]
        for row in self.rows:
            if row.broken:
                lines += [f"## {row.name}", "", "```", self.last_lines(row.name, 4 * SHOWN_LINES), "```", ""]
        part = self.out / "part"
        part.write_text("\n".join(lines))
        part.replace(self.out / "steps.md")
        with tarfile.open(part, "w:gz", compresslevel=6) as archive:
            archive.add(self.work, "results")
        part.replace(self.out / "results.tgz")

    def verdict(self) -> str:
        """Say in one line how many children succeeded, and which broken one to fix first."""
        broken = [row for row in self.rows if row.broken]
        late = [row.name for row in self.rows if row.result.startswith("skipped")]
        count = f"{len(self.rows) - len(broken) - len(late)} of {len(self.rows)} steps went well"
        count += f"; no time was left for {', '.join(late)}" if late else ""
        if not broken:
            return f"{count}. Nothing to fix."
        others = f"; then {', '.join(row.name for row in broken[1:])}" if broken[1:] else ""
        return f"{count}. To fix first: {broken[0].name} ({broken[0].result}){others}."

    def conclude(self) -> bool:
        """Print the verdict and the last lines of the first broken child. Return whether no child is broken."""
        first = next((row for row in self.rows if row.broken), None)
        print(f"\n{self.verdict()}", flush=True)
        if first is not None:
            print(self.last_lines(first.name, SHOWN_LINES), flush=True)
        return first is None


@contextmanager
def child_process(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A context in which a process runs in a new session. On exit, the process and all that it started are ended."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)


def pytest_command(*options: str) -> list[str]:
    """Return a pytest command. If pytest-xdist is installed it uses several processes, as GPU tests mostly compile."""
    processes = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *processes,
        "-p",
        "no:cacheprovider",
        "--durations=10",
        "--continue-on-collection-errors",
        *options,
    ]
