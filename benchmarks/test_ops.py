"""Times each op alone, by pytest-benchmark: python -m pytest benchmarks --benchmark-only."""

from __future__ import annotations

import pytest
import torch

from swamp_fast import ops

MILLION = 1_000_000


def rates_of(lanes: int, parameters: int, prunable: int, segments: int) -> dict[str, object]:
    """Rates of a bank with S segments: the prunable parameters and the others, or ranges of about equal length."""
    rates = torch.full((lanes, segments), 1e-3, dtype=torch.float64)
    if segments == 1:
        return {"lr": rates, "weight_decay": rates}
    inner = torch.arange(1, segments) * (parameters // segments) if segments > 2 else torch.tensor([prunable])
    ends = torch.cat([inner, torch.tensor([parameters])])[None]
    return {"lr": rates, "weight_decay": rates, "segment_ends": ends}


# The number of parameters of ResNet-20, whose bank fits a processor's cache, and of a larger network.
SIZES = pytest.mark.parametrize("parameters", [272_474, 5 * MILLION], ids=["in the cache", "in memory"])
SEGMENTS = pytest.mark.parametrize("segments", [1, 2, 20, 65])


@SIZES
@SEGMENTS
@pytest.mark.parametrize("swa", [False, True], ids=["plain", "with SWA"])
def test_masked_sgd(benchmark, swa, segments, parameters):
    lanes, prunable = 4, parameters - parameters // 100
    weights, grads, momentum, mean = torch.randn(4, lanes, parameters).unbind()
    masks, run_of_lane = torch.rand(1, prunable) < 0.3, torch.zeros(lanes, dtype=torch.int64)
    rate = torch.full((lanes,), 1e-3, dtype=torch.float64)
    average = {"swa": mean, "swa_weight": rate} if swa else {}
    arguments = (weights, grads, momentum, masks, run_of_lane)
    rates = rates_of(lanes, parameters, prunable, segments)
    benchmark(lambda: ops.masked_sgd_(*arguments, momentum=rate, **rates, **average))


@SIZES
@SEGMENTS
@pytest.mark.parametrize("swa", [False, True], ids=["plain", "with SWA"])
def test_masked_adamw(benchmark, swa, segments, parameters):
    lanes, prunable = 4, parameters - parameters // 100
    weights, grads, first, mean = torch.randn(4, lanes, parameters).unbind()
    second = torch.rand(lanes, parameters)
    masks, run_of_lane = torch.rand(1, prunable) < 0.3, torch.zeros(lanes, dtype=torch.int64)
    rate = torch.full((lanes,), 1e-3, dtype=torch.float64)
    rates = {
        **dict.fromkeys(("beta1", "beta2", "eps", "step"), rate),
        **rates_of(lanes, parameters, prunable, segments),
    }
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
