"""Interleaved timings, and results files that state where, when and with which versions they were measured."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import markdown_table
from swamp_fast import __version__, backends
from swamp_fast.common.timing import seconds_in_turn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time the contenders in turns. Return median, p20 and p80 of each in seconds over the rounds after a warm-up."""
    for run in contenders.values():
        run()
    taken = seconds_in_turn(list(contenders.values()), torch.device("cpu"), rounds)
    return {name: summary(seconds) for name, seconds in zip(contenders, taken, strict=True)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quantiles at 20 and 80 %."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def header(rounds: int) -> dict[str, Any]:
    """Return the circumstances of a measurement, without which its figures mean nothing."""
    return {
        "date": date.today().isoformat(),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": backends()["cpp"].get("instruction_set", "none"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "swamp_fast": __version__,
        "commit": commit(),
        "rounds": rounds,
    }


def commit() -> str:
    """Return the measured commit, and whether there are uncommitted changes; "unknown" if neither can be found.

    A copy of the tree without git has a file `.commit`, which `benchmarks.machine_code --fill` writes.
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if (
            Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT.resolve()
        ):  # else it is a repository around the copy
            changed = git("status", "--porcelain", "swamp_fast", "csrc", "kernels")
            return git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass
    written = ROOT / ".commit"
    return written.read_text().strip() if written.exists() else "unknown"


def processor() -> str:
    """Return the processor's name and the number of available cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def write(
    name: str, command: str, about: dict[str, Any], table: list[dict[str, Any]], folder: Path | None = None
) -> None:
    """Write one benchmark's table as JSON and Markdown, by default under benchmarks/results, and print it."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**about, "table": table}, indent=1) + "\n")
    circumstances = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n".join([f"`{command}`: {circumstances}", "", *markdown_table(table), ""])
    (folder / f"{name}.md").write_text(text)
    print(f"\n{name}\n{text}", flush=True)
