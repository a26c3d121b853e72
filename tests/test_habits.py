"""Habits of the code, checked in its text: short functions, nothing written twice, one clock, plain errors."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from paths import ROOT

CLOCKS = re.compile(r"perf_counter|time\.monotonic|time\.time\(|process_time")
MAX_LINES = 70  # of a function, without its docstring
MAX_REPEATED_LINES = 11  # of code that stands in two places


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def code_of(path: Path) -> list[tuple[int, str]]:
    """The numbered lines of a file without imports, docstrings, comments and signatures."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            skipped.update(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in skipped]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def test_nothing_is_written_twice():
    places: dict[tuple[str, ...], str] = {}
    for path in python_files("swamp_fast", "benchmarks", "tests"):
        lines = code_of(path)
        for begin in range(len(lines) - MAX_REPEATED_LINES):
            window = tuple(line for _, line in lines[begin : begin + MAX_REPEATED_LINES + 1])
            place = f"{path.relative_to(ROOT)}:{lines[begin][0]}"
            assert window not in places, f"{place} and {places[window]} have the same lines"
            places[window] = place


def test_functions_are_short():
    for path in python_files("swamp_fast", "benchmarks", "tests"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node) is not None
                first = node.body[0].end_lineno + 1 if documented else node.lineno
                assert node.end_lineno - first < MAX_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize("pattern", [r"\bassert\b.*,\s*[\"']", r"except( Exception)?:\s*pass", r"(?<!\w)print\("])
def test_habits(pattern):
    """User errors are never asserts, nothing is swallowed, and only the console and the command line print."""
    for path in python_files("swamp_fast"):
        if "print" in pattern and (path.name == "console.py" or path.parent.name == "cli"):
            continue
        assert not re.search(pattern, path.read_text()), path


def test_one_stopwatch_reads_the_clock():
    """Six timers used to measure differently: some waited for the device, some did not."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in python_files("swamp_fast", "benchmarks")
        if CLOCKS.search(path.read_text())
    }
    # children.py must start where torch, and so swamp_fast, can't be imported.
    assert readers == {"swamp_fast/common/timing.py", "benchmarks/children.py"}
