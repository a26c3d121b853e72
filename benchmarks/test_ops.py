"""Times each op alone, by pytest-benchmark: python -m pytest benchmarks --benchmark-only."""

from __future__ import annotations

import pytest
import torch

from swamp_fast import ops

MILLION = 1_000_000


@pytest.mark.parametrize("swa", [False, True], ids=["plain", "with SWA"])
def test_masked_sgd(benchmark, swa):
    lanes, parameters = 4, 5 * MILLION
    weights, grads, momentum, mean = torch.randn(4, lanes, parameters).unbind()
    masks, run_of_lane = torch.rand(1, parameters) < 0.3, torch.zeros(lanes, dtype=torch.int64)
    rate = torch.full((lanes,), 1e-3, dtype=torch.float64)
    average = {"swa": mean, "swa_weight": rate} if swa else {}
    arguments = (weights, grads, momentum, masks, run_of_lane)
    benchmark(lambda: ops.masked_sgd_(*arguments, lr=rate, momentum=rate, weight_decay=rate, **average))


@pytest.mark.parametrize("swa", [False, True], ids=["plain", "with SWA"])
def test_masked_adamw(benchmark, swa):
    lanes, parameters = 4, 5 * MILLION
    weights, grads, first, mean = torch.randn(4, lanes, parameters).unbind()
    second = torch.rand(lanes, parameters)
    masks, run_of_lane = torch.rand(1, parameters) < 0.3, torch.zeros(lanes, dtype=torch.int64)
    rate = torch.full((lanes,), 1e-3, dtype=torch.float64)
    rates = dict.fromkeys(("lr", "beta1", "beta2", "eps", "weight_decay", "step"), rate)
    average = {"swa": mean, "swa_weight": rate} if swa else {}
    arguments = (weights, grads, first, second, masks, run_of_lane)
    benchmark(lambda: ops.masked_adamw_(*arguments, **rates, **average))


def test_clip_scale(benchmark):
    lanes, parameters = 4, 5 * MILLION
    grads, masks = torch.randn(lanes, parameters), torch.rand(1, parameters) < 0.3
    run_of_lane, bound = torch.zeros(lanes, dtype=torch.int64), torch.ones(lanes, dtype=torch.float64)
    benchmark(ops.clip_scale, grads, masks, run_of_lane, bound)


def test_particle_mean(benchmark):
    weights, run_of_lane = torch.randn(4, 5 * MILLION), torch.zeros(4, dtype=torch.int64)
    benchmark(ops.particle_mean, weights, run_of_lane, 1)


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_global_threshold(benchmark, density):
    weights, masks = torch.randn(1, 20 * MILLION), torch.rand(1, 20 * MILLION) < density
    benchmark(ops.global_threshold, weights, masks, [int(0.8 * int(masks.sum()))])


def test_philox(benchmark):
    benchmark(ops.philox, torch.tensor([[1, 2, 3]]), 0, 10 * MILLION)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
def test_gather_augment(benchmark, channels_last):
    images, table = torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8), torch.randn(3, 256)
    index, keys = torch.randint(0, 50_000, (4, 128)), torch.tensor([[0, lane, 0] for lane in range(4)])
    benchmark(ops.gather_augment, images, table, index, keys, pad=4, flip=True, channels_last=channels_last)
