"""When two runs are the same."""

from __future__ import annotations

import pytest
import torch


def same(fast, naive) -> None:
    """Masks identical, everything else within 1e-8, the history's measures too."""
    for cycle, row in enumerate(naive.history):
        (model, masks), (expected, expected_masks) = fast.at(cycle), naive.at(cycle)
        assert all(torch.equal(masks[name], mask) for name, mask in expected_masks.items())
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-8)
        for name in ("accuracy", "loss", "particle_accuracy", "ensemble_accuracy", "train_loss"):
            assert fast.history[cycle][name] == pytest.approx(row[name], abs=1e-8)
    for name, tensor in naive.particles.items():
        torch.testing.assert_close(fast.particles[name], tensor, rtol=0, atol=1e-8)
