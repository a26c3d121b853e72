"""A particle depends only on its seed and its number, not on the number of particles, its lane, or the engine."""

from __future__ import annotations

import networks
import pytest
import torch
from networks import EAGER_MODES as MODES
from torch import nn

from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.random import CROP_FLIP, ORDER, epoch_order, lane_keys, stream_of
from swamp_fast.particles.schedule import cycle_training
from swamp_fast.problem.prepare import prepare


def trained(name: str, digits, precision: str, choice: Choice, particles: list[int]) -> torch.Tensor:
    """Train the given particles of cycle 0 together, as L lanes; returns their SWA means [L, P]."""
    settings = {"particles": 8, "epochs": 3, "batch_size": 32, "precision": precision, "progress": False}
    problem = prepare(networks.build(name), *digits, settings=settings)
    return trained_by(EagerEngine(problem, choice), problem, particles)


def trained_by(engine, problem, particles: list[int]) -> torch.Tensor:
    """As `trained`, on a given engine."""
    parameters, buffers = problem.template.named_parameters(), problem.template.named_buffers()
    start = Solution(problem.layout.flat(dict(parameters), problem.dtype, problem.device), dict(buffers))
    bank = engine.spawn(start, problem.mask, particles, 0)
    engine.train(bank, cycle_training(problem.config, len(problem.bounds)), lambda *_: None, lambda *_: None)
    return bank.swa.clone()


@pytest.mark.parametrize(("mode", "channels_last"), MODES)
def test_a_particle_among_others_and_alone_float64(mode, channels_last, digits):
    choice = Choice(mode, channels_last, "forced", {})
    eight = trained("dropout", digits, "float64", choice, list(range(8)))
    two = trained("dropout", digits, "float64", choice, [0, 1])
    assert (eight[:2] - two).abs().max() <= 1e-10
    for particle in (0, 5):
        alone = trained("dropout", digits, "float64", choice, [particle])
        assert (eight[particle] - alone[0]).abs().max() <= 1e-10
    assert (eight[0] - eight[1]).abs().max() > 1e-3  # two particles differ


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["dropout", "vit_dropout", "depthwise"])
def test_lane_by_lane_bit_for_bit(name, channels_last, digits):
    choice = Choice("lanes", channels_last, "forced", {})
    eight = trained(name, digits, "float32", choice, list(range(8)))
    assert torch.equal(trained(name, digits, "float32", choice, [0, 1]), eight[:2])
    assert torch.equal(trained(name, digits, "float32", choice, [6, 3])[1], eight[3])
    assert torch.equal(trained(name, digits, "float32", choice, [3])[0], eight[3])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("shape", "batch"), [((5,), 7), ((13,), 33), ((301,), 33), ((3, 7, 7), 5), ((1, 9, 9), 3)])
def test_bit_for_bit_where_a_lane_s_batch_starts_at_any_address(shape, batch, fused):
    """A lane's bits must not depend on the address of its batch, on which CPU libraries' order of summation depends."""
    inputs, targets = 0.3 * torch.randn(100, *shape), torch.arange(100) % 3
    side = shape[-1] - 4
    layers = [nn.Linear(shape[0], 37), nn.ReLU(), nn.Linear(37, 19), nn.ReLU(), nn.Linear(19, 3)]
    if len(shape) == 3:
        layers = [nn.Conv2d(shape[0], 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(7 * side**2, 3)]
    settings = {"particles": 8, "epochs": 2, "batch_size": batch, "device": "cpu", "progress": False}
    problem = prepare(nn.Sequential(*layers), (inputs, targets), settings=settings)
    plan = fused_plan(problem)
    assert isinstance(plan, Plan), plan
    eight, one = (
        trained_by(FusedEngine(problem, plan, "", {}) if fused else EagerEngine(problem, eager_by_rule(problem)), *own)
        for own in ((problem, list(range(8))), (problem, [3]))
    )
    assert bool(eight.isfinite().all())
    assert torch.equal(eight[3], one[0])


def test_orders_are_permutations_that_differ_by_seed_cycle_particle_and_epoch():
    places = [(0, stream_of(None, 0)), (0, stream_of(0, 0)), (0, stream_of(0, 1)), (1, stream_of(0, 0))]
    keys = lane_keys([seed for seed, _ in places], [stream for _, stream in places], torch.device("cpu"))
    orders = [epoch_order(keys + torch.tensor([0, 0, epoch]), 500) for epoch in (0, 1)]
    rows = torch.cat(orders)
    assert torch.equal(rows.sort(1).values, torch.arange(500).expand(8, -1))
    assert len({tuple(row.tolist()) for row in rows}) == 8


def test_streams_never_meet():
    """The ticket, each cycle, each particle and each purpose draw different random numbers."""
    words = {stream_of(cycle, particle) for cycle in (None, 0, 1, 500) for particle in (0, 1, 65535)}
    assert len(words) == 12
    assert max(words) < 1 << 32
    assert ORDER != CROP_FLIP
    from swamp_fast.particles import random

    purposes = [
        random.ORDER,
        random.CROP_FLIP,
        random.DROPOUT,
        random.SPLIT,
        random.LANE_SEED,
        random.SAMPLE_SEED,
    ]
    assert len(set(purposes)) == len(purposes)
    assert max(purposes) < 256
