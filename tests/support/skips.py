"""What may be skipped: hooks that count skipped tests by reason, and fail a run that skips more than that."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
GPU = "needs a CUDA device"
HAS_A_GPU = "there is a GPU"  # with which what stands for one isn't tried
SLOW = "slow tier: run with --slow"
UNBOUNDED = (GPU, HAS_A_GPU, SLOW)
# Beginnings of what else a machine may lack, and how many tests at most may be skipped for it.
AT_MOST = {
    "this processor has no avx": 500,  # of the ops, which run without it too: two times about 200
    "needs chromium": 5,
    "minutes without vector instructions": 1,
}


def by_reason(reports: list[pytest.CollectReport | pytest.TestReport]) -> Counter[str]:
    """How many tests were skipped for each reason."""
    return Counter(re.sub(r"^Skipped: ", "", str(report.longrepr[2])) for report in reports if report.longrepr)


def too_many(reasons: Counter[str]) -> list[str]:
    """What may not be skipped so often, a line each."""
    of_kind: Counter[str] = Counter()
    for reason, count in reasons.items():
        of_kind[next((kind for kind in (*UNBOUNDED, *AT_MOST) if reason.startswith(kind)), reason)] += count
    return [
        f"{count} tests were skipped since: {kind}; at most {AT_MOST.get(kind, 0)} may be. Install what is missing."
        for kind, count in of_kind.items()
        if kind not in UNBOUNDED and count > AT_MOST.get(kind, 0)
    ]


def _skipped(config: pytest.Config) -> Counter[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return by_reason(reporter.stats.get("skipped", []) if reporter else [])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under xdist the process that hands out tests has all reports; a worker's own status counts for nothing."""
    if exitstatus == pytest.ExitCode.OK and too_many(_skipped(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = by_reason(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(f"not run: {reasons.total()} tests")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:6d}  {reason}")
    for line in too_many(reasons):
        terminalreporter.write_line(f"FAILED: {line}", red=True)
