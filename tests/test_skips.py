"""A suite that skips what it should have run fails, and says how many tests it skipped for which reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

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
    """Runs a selection of TESTS under the hooks alone: the exit status and what was printed."""
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n"
        "from skips import pytest_sessionfinish, pytest_terminal_summary\n"
    )
    (tmp_path / "test_few.py").write_text(TESTS)

    def selected(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, *options, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout

    return selected


@pytest.mark.parametrize("processes", ["0", "2"])
def test_what_no_gpu_explains_fails_the_suite(run, processes):
    status, printed = run("-n", processes)
    assert status == 1
    assert "1 passed, 9 skipped" in printed
    assert "not run: 9 tests" in printed
    for line in ("     7  needs chromium: apt-get install chromium", "     1  needs a CUDA device"):
        assert line in printed.splitlines()
    assert "FAILED: 7 tests were skipped since: needs chromium; at most 5 may be" in printed
    assert "FAILED: 1 tests were skipped since: needs another NumPy; at most 0 may be" in printed


def test_what_may_be_skipped_fails_nothing(run):
    status, printed = run("-k", "gpu or passes")
    assert status == 0
    assert "FAILED" not in printed
    assert run("-k", "(browser and 1) or passes")[0] == 0
    assert run("-k", "numpy")[0] == 1
    assert run("-k", "nothing")[0] == 5  # as ever
