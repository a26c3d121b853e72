"""A test run that skips too many tests fails, and prints how many it skipped for which reason."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT

# Replaces torch by a stub without a GPU, which is much faster to import.
CONFTEST = f"""
import sys
from types import SimpleNamespace
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
from skips import pytest_sessionfinish, pytest_terminal_summary
"""
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(7))
def test_browser(number):
    pytest.skip("needs chromium: apt-get install chromium")

@pytest.mark.skip(reason="needs a CUDA device")
def test_gpu(): pass

@pytest.mark.skipif(True, reason="needs another NumPy")
def test_numpy(): pass

def test_passes(): pass
"""


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a selection of TESTS with these hooks and returns the exit status and the output."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_few.py").write_text(TESTS)

    def selected(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, *options, tmp_path]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout

    return selected


@pytest.mark.parametrize("options", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "two processes"])
def test_a_skip_that_no_gpu_explains_fails_the_run(run, options):
    status, printed = run(*options)
    assert status == 1
    assert "1 passed, 9 skipped" in printed
    assert "not run: 9 tests" in printed
    for line in ("     7  needs chromium: apt-get install chromium", "     1  needs a CUDA device"):
        assert line in printed.splitlines()
    assert "FAILED: 7 tests were skipped because: needs chromium; at most 5 may be" in printed
    assert "FAILED: 1 tests were skipped because: needs another NumPy; at most 0 may be" in printed


def test_skips_that_are_allowed_fail_nothing(run):
    status, printed = run("-k", "gpu or passes")
    assert status == 0
    assert "FAILED" not in printed
    assert run("-k", "(browser and 1) or passes")[0] == 0
    assert run("-k", "numpy")[0] == 1
    assert run("-k", "nothing")[0] == 5  # pytest's exit status if no tests were collected
