"""The random numbers of a run: what a particle sees depends on nothing but its seed and its place in the method.

Every draw is a word of Philox-4x32-10 addressed by (seed, cycle, particle, time, purpose, place), where time is
the epoch, or the step within the training. So particle 3 of 8 draws what particle 3 draws alone, on any device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from swamp_fast import ops

# The purpose word of a draw.
ORDER = 0
CROP_FLIP = 1  # in csrc/cpu/kernels.cpp and kernels/gather_augment.py too
DROPOUT = 2  # the number of the call within the forward stands above the low byte
SPLIT = 3
LANE_SEED = 4  # for randomness in a model or transform that is not ours
SAMPLE_SEED = 5  # for randomness in a Dataset
MASK = 6  # for random masks


def stream_of(cycle: int | None, particle: int) -> int:
    """The stream word of one training; cycle None is the ticket's."""
    return (0 if cycle is None else cycle + 1) << 16 | particle


def lane_keys(seeds: list[int], streams: list[int], device: torch.device) -> Tensor:
    """The keys [L, 3] int64 of the lanes, with time 0."""
    keys = [[seed, stream, 0] for seed, stream in zip(seeds, streams, strict=True)]
    return torch.tensor(keys, dtype=torch.int64, device=device).view(len(keys), 3)


def at_time(keys: Tensor, time: int) -> Tensor:
    """The keys [L, 3] at an epoch or a step."""
    keys = keys.clone()
    keys[:, 2] = time
    return keys


def evaluation_time(which: int, batch: int) -> int:
    """The time of a draw outside training, which no step reaches: in re-estimation (0), on test (1), on val (2)."""
    return 1 << 31 | which << 24 | batch


def epoch_order(keys: Tensor, samples: int) -> Tensor:
    """Each lane's order of the samples in the epoch that the keys name: [L, samples] int64.

    A stable sort of 64-bit keys: 32 bits would collide once in four epochs of 50,000 samples.
    """
    words = ops.philox(keys, ORDER, 2 * samples)
    return words.view(torch.int64).argsort(dim=1, stable=True)


def split_order(samples: int) -> Tensor:
    """A fixed order [samples] int64, to take a part of a data set; the same for every run and seed."""
    words = ops.philox(torch.zeros(1, 3, dtype=torch.int64), SPLIT, 2 * samples)
    return words.view(torch.int64).argsort(dim=1, stable=True)[0]


def layer_order(seed: int, cycle: int, layer: int, weights: int, device: torch.device) -> Tensor:
    """A random order [weights] int64 of a layer's weights, by which a cycle's random mask takes them."""
    words = ops.philox(at_time(lane_keys([seed], [stream_of(cycle, 0)], device), layer), MASK, 2 * weights)
    return words.view(torch.int64).argsort(dim=1, stable=True)[0]


def seeds_for(keys: Tensor, purpose: int, count: int = 1) -> Tensor:
    """Seeds [L, count] int64 for generators that are not ours, non-negative."""
    words = ops.philox(keys.cpu(), purpose, 2 * count)
    return words.view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy, for code of the user's that draws from them."""
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # the same, without the stack trace that torch formats for each kind of device it lacks, 400 us a call
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  the legacy generator is what such code uses


@contextmanager
def generators_left_alone() -> Iterator[None]:
    """Give the user's global generators back as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    seed = torch.initial_seed()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        else:
            torch.cuda.manual_seed_all(seed)  # what a CUDA that was not yet in use would have begun with


def generators_state() -> tuple[object, ...]:
    """A comparable picture of the global generators: did a call draw from them?"""
    cuda = (
        tuple(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
        if (torch.cuda.is_available() and torch.cuda.is_initialized())
        else ()
    )
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(legacy), cuda
