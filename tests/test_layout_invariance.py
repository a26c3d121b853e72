"""What a particle is depends on its seed and its number alone: not on N, on its lane, or on how lanes are run."""

from __future__ import annotations

import networks
import pytest
import torch
from test_equivalence import WAYS

from swamp_fast.bank import Solution
from swamp_fast.data.streams import CROP_FLIP, ORDER, epoch_order, lane_keys, stream_of
from swamp_fast.engines.eager import EagerEngine
from swamp_fast.engines.rule import Choice
from swamp_fast.problem import prepare
from swamp_fast.schedule import cycle_training


def trained(name: str, digits, precision: str, choice: Choice, particles: list[int]) -> torch.Tensor:
    """The SWA means [L, P] of the given particles of a run's cycle 0, trained together as L lanes."""
    settings = {"particles": 8, "epochs": 3, "batch_size": 32, "precision": precision, "progress": False}
    problem = prepare(networks.build(name), *digits, settings=settings)
    engine = EagerEngine(problem, choice)
    parameters, buffers = problem.template.named_parameters(), problem.template.named_buffers()
    start = Solution(problem.layout.flat(dict(parameters), problem.dtype, problem.device), dict(buffers))
    bank = engine.spawn(start, problem.mask, particles, 0)
    engine.train(bank, cycle_training(problem.config, len(problem.bounds)), lambda *_: None, lambda *_: None)
    return bank.swa.clone()


@pytest.mark.parametrize(("way", "channels_last"), WAYS)
def test_a_particle_among_others_and_alone_float64(way, channels_last, digits):
    choice = Choice(way, channels_last, "forced", {})
    eight = trained("dropout", digits, "float64", choice, list(range(8)))
    two = trained("dropout", digits, "float64", choice, [0, 1])
    assert (eight[:2] - two).abs().max() <= 1e-10
    for particle in (0, 5):
        alone = trained("dropout", digits, "float64", choice, [particle])
        assert (eight[particle] - alone[0]).abs().max() <= 1e-10
    assert (eight[0] - eight[1]).abs().max() > 1e-3  # they are different experiments


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["dropout", "vit_dropout", "depthwise"])
def test_lane_by_lane_bit_for_bit(name, channels_last, digits):
    choice = Choice("lanes", channels_last, "forced", {})
    eight = trained(name, digits, "float32", choice, list(range(8)))
    assert torch.equal(trained(name, digits, "float32", choice, [0, 1]), eight[:2])
    assert torch.equal(trained(name, digits, "float32", choice, [6, 3])[1], eight[3])
    assert torch.equal(trained(name, digits, "float32", choice, [3])[0], eight[3])


def test_orders_are_permutations_that_differ_by_seed_cycle_particle_and_epoch():
    places = [(0, stream_of(None, 0)), (0, stream_of(0, 0)), (0, stream_of(0, 1)), (1, stream_of(0, 0))]
    keys = lane_keys([seed for seed, _ in places], [stream for _, stream in places], torch.device("cpu"))
    orders = [epoch_order(keys + torch.tensor([0, 0, epoch]), 500) for epoch in (0, 1)]
    rows = torch.cat(orders)
    assert torch.equal(rows.sort(1).values, torch.arange(500).expand(8, -1))
    assert len({tuple(row.tolist()) for row in rows}) == 8


def test_streams_never_meet():
    """Ticket, cycles and particles have words of their own; purposes too."""
    words = {stream_of(cycle, particle) for cycle in (None, 0, 1, 500) for particle in (0, 1, 65535)}
    assert len(words) == 12
    assert max(words) < 1 << 32
    assert ORDER != CROP_FLIP
    from swamp_fast.data import streams

    purposes = [
        streams.ORDER,
        streams.CROP_FLIP,
        streams.DROPOUT,
        streams.SPLIT,
        streams.LANE_SEED,
        streams.SAMPLE_SEED,
    ]
    assert len(set(purposes)) == len(purposes)
    assert max(purposes) < 256
