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
    shares = [cycle_training(config, 7).average_weight(step) for step in range(7 * epochs)]
    assert shares[6::7] == [0.0] * first + [1 / (i + 1) for i in range(epochs - first)]
    assert not any(share for step, share in enumerate(shares) if step % 7 != 6)


def test_the_running_mean_is_the_mean_of_the_samples():
    samples = torch.randn(9, 5, dtype=torch.float64)
    training = cycle_training(SwampConfig(epochs=12, swa_start=0.25), 1)
    mean = torch.zeros(5, dtype=torch.float64)
    for epoch in range(3, 12):
        mean += (samples[epoch - 3] - mean) * training.average_weight(epoch)
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


def rates_of(steps_per_epoch, **settings):
    config = SwampConfig(**settings)
    return [cycle_training(config, steps_per_epoch).lr(step) for step in range(config.epochs * steps_per_epoch)]


def test_the_ticket_has_a_constant_rate_and_no_average():
    training = ticket_training(SwampConfig(ticket_epochs=3), 5)
    assert training.epochs == 3
    assert {training.lr(step) for step in range(50)} == {0.1}
    assert {training.average_weight(step) for step in range(15)} == {0.0}
    warm = ticket_training(SwampConfig(ticket_epochs=3, warmup_epochs=1, lr=0.5), 5)
    assert [warm.lr(step) for step in range(7)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])


def test_the_ticket_has_the_first_steps_of_a_recipes_schedule():
    training = ticket_training(SwampConfig(ticket_epochs=3, lr=0.5), 5, [1.0, 0.5, 0.25])
    assert [training.lr(step) for step in range(5)] == [0.5, 0.25, 0.125, 0.125, 0.125]
    assert [cycle_training(SwampConfig(lr=0.5), 5, [1.0, 0.5, 0.25]).lr(step) for step in range(3)] == [
        0.5,
        0.25,
        0.125,
    ]


def test_constant_linear_and_step():
    assert rates_of(3, schedule="constant", epochs=2, lr=0.3) == [0.3] * 6
    linear = rates_of(2, schedule="linear", epochs=2, lr=1.0)
    assert linear == [1.0, 0.75, 0.5, 0.25]
    falls = rates_of(2, schedule="step", epochs=5, lr=1.0, step_epochs=2, step_factor=0.5)
    assert falls == [1.0] * 4 + [0.5] * 4 + [0.25] * 2
    assert rates_of(2, schedule="step", epochs=5, lr=1.0, step_epochs=[1, 4], step_factor=0.5) == [1.0] * 2 + [
        *[0.5] * 6,
        *[0.25] * 2,
    ]


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=18)),
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=18)),
    ],
)
def test_after_the_warm_up_the_schedule_is_torchs(schedule, theirs):
    rates = rates_of(6, schedule=schedule, epochs=4, lr=0.1, warmup_epochs=1)
    assert rates[:6] == pytest.approx([0.1 * (i + 1) / 6 for i in range(6)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = theirs(optimizer)
    for rate in rates[6:]:
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_warm_up_before_swas_schedule():
    rates = rates_of(4, epochs=8, lr=0.1, swa_lr=0.05, warmup_epochs=0.5)
    assert rates[:2] == pytest.approx([0.05, 0.1])
    assert rates[2] == 0.1
    assert rates[24:] == [0.05] * 8
    assert all(a > b for a, b in pairwise(rates[2:25]))


def average_of(samples, **settings):
    """Average the samples of 3 epochs of 4 steps by the weights of the schedule."""
    training = cycle_training(SwampConfig(epochs=3, **settings), 4)
    mean = torch.zeros_like(samples[0])
    for step, sample in enumerate(samples):
        mean += (sample - mean) * training.average_weight(step)
    return mean


def test_averages_of_samples_every_few_steps():
    samples = torch.randn(12, 5, dtype=torch.float64)
    assert torch.allclose(average_of(samples, swa_start=0.4, average_every=3), samples[[6, 9]].mean(0))
    assert torch.allclose(average_of(samples, swa_start=0.4), samples[[7, 11]].mean(0))
    assert torch.allclose(average_of(samples, swa_start=0.0, average_every=1), samples.mean(0))


@pytest.mark.parametrize("every", [1, 4])
def test_an_exponential_moving_average_is_torchs(every):
    samples = torch.randn(12, 5, dtype=torch.float64)
    module = torch.nn.Linear(5, 1, bias=False).double()
    theirs = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7))
    for sample in samples[every - 1 :: every]:
        module.weight.data.copy_(sample[None])
        theirs.update_parameters(module)
    found = average_of(samples, average="ema", ema_decay=0.7, swa_start=0.0, average_every=every)
    assert torch.allclose(found, theirs.module.weight.detach()[0])


def test_cost():
    assert total_particle_epochs(SwampConfig()) == 15 * 4 * 150 + 10
    assert total_particle_epochs(SwampConfig(particles=(1, 2, 4), cycles=2, epochs=10)) == 80
    assert math.isclose(0.8**14, 0.044, abs_tol=2e-4)
