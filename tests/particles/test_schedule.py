"""The learning rates and SWA samples of a training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from swamp_fast import SwampConfig
from swamp_fast.particles.schedule import cycle_training, swa_first_epoch, ticket_training, total_particle_epochs


@pytest.mark.parametrize(
    ("epochs", "start", "first"),
    [(150, 0.75, 112), (4, 0.75, 3), (1, 0.75, 0), (10, 0.0, 0), (3, 0.99, 2), (2, 0.5, 1)],
)
def test_the_window(epochs, start, first):
    config = SwampConfig(epochs=epochs, swa_start=start)
    assert swa_first_epoch(config) == first
    shares = [cycle_training(config, 7).swa_weight(epoch) for epoch in range(epochs)]
    assert shares == [0.0] * first + [1 / (i + 1) for i in range(epochs - first)]


def test_the_running_mean_is_the_mean_of_the_samples():
    samples = torch.randn(9, 5, dtype=torch.float64)
    training = cycle_training(SwampConfig(epochs=12, swa_start=0.25), 1)
    mean = torch.zeros(5, dtype=torch.float64)
    for epoch in range(3, 12):
        mean += (samples[epoch - 3] - mean) * training.swa_weight(epoch)
    assert torch.allclose(mean, samples.mean(0))


def test_the_rate_with_swa():
    config, steps = SwampConfig(epochs=8, lr=0.1, swa_lr=0.05), 5
    rates = [cycle_training(config, steps).lr(step) for step in range(8 * steps)]
    assert rates[0] == 0.1
    assert all(a > b for a, b in pairwise(rates[:31]))  # the rate falls at every step
    assert rates[15] == pytest.approx(0.075)  # halfway to the start of the SWA window
    assert rates[30:] == [0.05] * 10


def test_the_rate_without_swa_is_a_cosine_to_zero():
    config = SwampConfig(epochs=4, average="none")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.initial_lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 6)
    for step in range(24):
        assert cycle_training(config, 6).lr(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_the_ticket_has_a_constant_rate_and_no_swa():
    training = ticket_training(SwampConfig(ticket_epochs=3))
    assert training.epochs == 3
    assert {training.lr(step) for step in range(50)} == {0.1}
    assert {training.swa_weight(epoch) for epoch in range(3)} == {0.0}


def test_cost():
    assert total_particle_epochs(SwampConfig()) == 15 * 4 * 150 + 10
    assert total_particle_epochs(SwampConfig(particles=(1, 2, 4), cycles=2, epochs=10)) == 80
    assert math.isclose(0.8**14, 0.044, abs_tol=2e-4)
