"""Child processes one after the other, each with a limit of its own inside a budget; what came of them is packed.

A child that fails, hangs or comes too late is a row, and the next one starts. Only the standard library is imported.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 3.0  # seconds between asking a child to end and ending it
LEAST = 10.0  # seconds that must be left for a child to begin
RESERVE = 5.0  # seconds of the budget that are kept for packing
LINES = 15  # of a log, that are shown
NEEDS_GPU = "needs a GPU"  # in the last line of a child that had something, or all, to do on one


@dataclass(frozen=True)
class Child:
    """A command and the seconds that it may take; "{minutes}" in it stands for those that it has.

    tests   whether it is pytest's: then a run in which no test passes has failed
    leaves  seconds of the budget for what comes behind
    """

    name: str
    seconds: float
    command: Sequence[str]
    tests: bool = False
    leaves: float = 0.0


@dataclass(frozen=True)
class Row:
    """What came of a child. `result` begins with passed, needs a GPU, failed, killed, skipped or stopped."""

    name: str
    result: str
    seconds: float
    said: str

    @property
    def bad(self) -> bool:
        """Whether it is to be mended; one that came too late is not."""
        return self.result.startswith(("failed", "killed"))


class Visit:
    """Runs children within a budget of seconds.

    out    at the end holds results.tgz (all of `work`, each child's log as NAME.log) and steps.md
    title  of steps.md
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
    def left(self) -> float:
        """Seconds."""
        return self.seconds - RESERVE - (time.monotonic() - self.began)

    def run(self, children: Sequence[Child]) -> None:
        """All of them, in order; results are packed after each."""
        for child in children:
            try:
                self._run(child)
            finally:
                self.pack()

    def _run(self, child: Child) -> None:
        if self.left - child.leaves < LEAST:
            self._add(Row(child.name, "skipped, too late", 0.0, ""))
            return
        limit = min(child.seconds, self.left - child.leaves)
        began, log = time.monotonic(), self.log(child.name)
        command = [part.replace("{minutes}", f"{0.9 * limit / 60:.2f}") for part in child.command]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=self.cwd, env=dict(self.environment),
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
                result = "passed" if code == 0 else f"failed, exit code {code}"
            except subprocess.TimeoutExpired:
                result = f"killed after {limit:.0f} s"
            except BaseException:
                self._add(Row(child.name, "stopped by a signal", time.monotonic() - began, self.last(child.name, 1)))
                raise
            finally:
                _end(process)
        said = self.last(child.name, 1)
        if result == "passed" and child.tests and not re.search(r"\d+ passed", said):
            result = NEEDS_GPU if "skipped" in said else "failed, no test ran"
        elif result == "passed" and NEEDS_GPU in said:
            result = NEEDS_GPU
        self._add(Row(child.name, result, time.monotonic() - began, said))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"\n== {row.name}: {row.result}, {row.seconds:.0f} s", flush=True)
        if row.seconds:
            print(self.last(row.name, LINES), flush=True)

    def log(self, name: str) -> Path:
        """Where a child's output is."""
        return self.work / f"{name}.log"

    def last(self, name: str, count: int) -> str:
        """The last lines of a child's output that aren't empty."""
        lines = self.log(name).read_text(errors="replace").splitlines() if self.log(name).exists() else []
        return "\n".join(line[:200] for line in [line for line in lines if line.strip()][-count:])

    def pack(self) -> None:
        """Write results.tgz and steps.md anew, each whole or not at all."""
        lines = [f"# {self.title}", "", "| step | result | s | last line |", "|---|---|--:|---|"]
        for row in self.rows:
            said = row.said.replace("|", "\\|")
            lines.append(f"| {row.name} | {row.result} | {row.seconds:.0f} | {said} |")
        lines += ["", self.verdict(), ""]
        for row in self.rows:
            if row.bad:
                lines += [f"## {row.name}", "", "```", self.last(row.name, 4 * LINES), "```", ""]
        part = self.out / "part"
        part.write_text("\n".join(lines))
        part.replace(self.out / "steps.md")
        with tarfile.open(part, "w:gz", compresslevel=6) as archive:
            archive.add(self.work, "results")
        part.replace(self.out / "results.tgz")

    def verdict(self) -> str:
        """What to mend first."""
        bad = [row for row in self.rows if row.bad]
        late = [row.name for row in self.rows if row.result.startswith("skipped")]
        count = f"{len(self.rows) - len(bad) - len(late)} of {len(self.rows)} steps went well"
        count += f"; too late for {', '.join(late)}" if late else ""
        if not bad:
            return f"{count}. Nothing to mend."
        others = f"; after it {', '.join(row.name for row in bad[1:])}" if bad[1:] else ""
        return f"{count}. To mend first: {bad[0].name} ({bad[0].result}){others}."

    def conclude(self) -> bool:
        """Print the verdict and the first failing child's last lines; returns whether all went well."""
        first = next((row for row in self.rows if row.bad), None)
        print(f"\n{self.verdict()}", flush=True)
        if first is not None:
            print(self.last(first.name, LINES), flush=True)
        return first is None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child and what it started: first by asking."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def pytest_command(*options: str) -> list[str]:
    """In several processes, where pytest-xdist is there: most of a test on a GPU is compiling."""
    processes = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", *processes, "-p", "no:cacheprovider", "--durations=10", *options]
