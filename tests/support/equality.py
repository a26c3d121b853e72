"""Compares the results of two runs."""

from __future__ import annotations

import pytest
import torch

MEASURED_KEYS = ("train_seconds", "seconds", "peak_memory")  # keys of a history row that differ from run to run


def same(a, b, tolerance: float = 1e-8) -> None:
    """Assert that masks are identical, and that weights, history and particles agree within a tolerance."""
    assert len(a.history) == len(b.history)
    for cycle, row in enumerate(b.history):
        (model, masks), (expected, expected_masks) = a.at(cycle), b.at(cycle)
        assert all(torch.equal(masks[name], mask) for name, mask in expected_masks.items()), cycle
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=tolerance)
        for name, value in row.items():
            if name not in MEASURED_KEYS:
                assert a.history[cycle][name] == pytest.approx(value, abs=tolerance), (cycle, name)
    for name, tensor in (b.particles or {}).items():
        torch.testing.assert_close(a.particles[name], tensor, rtol=0, atol=tolerance)
