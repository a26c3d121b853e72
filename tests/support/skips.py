"""Pytest hooks that count skipped tests by reason, and fail a test run that skips more of them than allowed."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
GPU = "needs a CUDA device"
HAS_A_GPU = "there is a GPU"  # the reason for not testing replacements for a GPU, such as Triton's interpreter
SLOW = "slow tier: run with --slow"
UNLIMITED = (GPU, HAS_A_GPU, SLOW)
# The beginning of a reason -> how many tests may be skipped for it. For other reasons, no test may be skipped.
MAX_SKIPS = {
    "this processor has no avx": 500,  # the tests of ops: about 200 for each of two instruction sets
    "needs chromium": 5,
    "needs torchvision": 1,
    "needs timm": 1,
    "needs transformers": 1,
    "needs the extra integrations": 6,
    "minutes without vector instructions": 1,
}


def by_reason(reports: list[pytest.CollectReport | pytest.TestReport]) -> Counter[str]:
    """Count the skipped tests by reason."""
    return Counter(re.sub(r"^Skipped: ", "", str(report.longrepr[2])) for report in reports if report.longrepr)


def too_many(reasons: Counter[str]) -> list[str]:
    """Return an error message for each reason for which too many tests were skipped."""
    of_kind: Counter[str] = Counter()
    for reason, count in reasons.items():
        of_kind[next((kind for kind in (*UNLIMITED, *MAX_SKIPS) if reason.startswith(kind)), reason)] += count
    return [
        f"{count} tests were skipped because: {kind}; at most {MAX_SKIPS.get(kind, 0)} may be. Install what is missing."
        for kind, count in of_kind.items()
        if kind not in UNLIMITED and count > MAX_SKIPS.get(kind, 0)
    ]


def _skipped(config: pytest.Config) -> Counter[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return by_reason(reporter.stats.get("skipped", []) if reporter else [])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the session if too many tests were skipped.

    Under xdist, the controller counts the skips of all workers, and the workers' exit statuses are ignored.
    """
    if exitstatus == pytest.ExitCode.OK and too_many(_skipped(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = by_reason(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"not run: {reasons.total()} tests")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:6d}  {reason}")
    for line in too_many(reasons):
        terminalreporter.write_line(f"FAILED: {line}", red=True)
