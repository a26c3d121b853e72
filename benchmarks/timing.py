"""Interleaved timing, and reports that say where, with what and when they were measured."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from swamp_fast import __version__, backends

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each contender: median, p20, p80 over rounds in which all take turns, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for round in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if round:
                taken[name].append(time.perf_counter() - began)
    return {name: summary(seconds) for name, seconds in taken.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and the quantiles at 20 and 80 %."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def header(rounds: int) -> dict[str, Any]:
    """What a figure means nothing without."""
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
    """The commit that is measured, and whether it was changed.

    A copy without git has it in a file `.commit`, which `benchmarks.machine_code --fill` writes; else it is "unknown".
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT.resolve():  # not the copy's surroundings
            changed = git("status", "--porcelain", "swamp_fast", "csrc", "kernels")
            return git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass
    beside = ROOT / ".commit"
    return beside.read_text().strip() if beside.exists() else "unknown"


def processor() -> str:
    """The processor's name and how many of its cores are ours."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def write(
    name: str, command: str, about: dict[str, Any], table: list[dict[str, Any]], folder: Path | None = None
) -> None:
    """Write one benchmark as JSON and Markdown under benchmarks/results, or another folder, and print it."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**about, "table": table}, indent=1) + "\n")
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in table]
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    text = "\n".join([f"`{command}`: {told}", "", *lines, ""])
    (folder / f"{name}.md").write_text(text)
    print(f"\n{name}\n{text}", flush=True)
