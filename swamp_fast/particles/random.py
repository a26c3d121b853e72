"""All random numbers of a run, from a counter-based generator: they depend on what is drawn, not on when or where.

Every draw is a word of Philox-4x32-10 with the address (seed, cycle, particle, time, purpose, place); time is the epoch
or the step within the training. So particle 3 of 8 draws what particle 3 draws alone, on any device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from swamp_fast import ops

# Purposes: the word of the address that keeps different kinds of draws apart.
ORDER = 0
CROP_FLIP = 1  # repeated in csrc/cpu/kernels.cpp and kernels/gather_augment.py
DROPOUT = 2  # above its low byte stands the number of the call within the forward
SPLIT = 3
LANE_SEED = 4  # seeds torch's, Python's and NumPy's generators for a model or a transform that draws from them
SAMPLE_SEED = 5  # the same for a Dataset
MASK = 6


def stream_of(cycle: int | None, particle: int) -> int:
    """The stream of one particle's training: cycle and particle in one word; cycle None is the ticket."""
    return (0 if cycle is None else cycle + 1) << 16 | particle


def lane_keys(seeds: list[int], streams: list[int], device: torch.device) -> Tensor:
    """The keys [L, 3] int64 of lanes: seed, stream, and time 0."""
    keys = [[seed, stream, 0] for seed, stream in zip(seeds, streams, strict=True)]
    return torch.tensor(keys, dtype=torch.int64, device=device).view(len(keys), 3)


def at_time(keys: Tensor, time: int) -> Tensor:
    """A copy of keys [L, 3] with the time of an epoch or a step."""
    keys = keys.clone()
    keys[:, 2] = time
    return keys


def evaluation_time(which: int, batch: int) -> int:
    """The time of a draw outside training, beyond every step: in re-estimation (0), on test (1) or val (2)."""
    return 1 << 31 | which << 24 | batch


def epoch_order(keys: Tensor, samples: int) -> Tensor:
    """Each lane's order [L, samples] int64 of the samples in the epoch that its key names."""
    return _permutations(keys, ORDER, samples)


def split_order(samples: int) -> Tensor:
    """The order [samples] int64 in which a part of a data set is taken; the same for every run and seed."""
    return _permutations(torch.zeros(1, 3, dtype=torch.int64), SPLIT, samples)[0]


def layer_order(seed: int, cycle: int, layer: int, weights: int, device: torch.device) -> Tensor:
    """The order [weights] int64 in which a cycle's random mask takes the weights of a layer."""
    keys = at_time(lane_keys([seed], [stream_of(cycle, 0)], device), layer)
    return _permutations(keys, MASK, weights)[0]


def _permutations(keys: Tensor, purpose: int, count: int) -> Tensor:
    """A random permutation [L, count] int64 for each key.

    A stable sort of 64-bit words. With 32-bit words, about one epoch in four, of 50,000 samples each, would have a tie.
    """
    words = ops.philox(keys, purpose, 2 * count)
    return words.view(torch.int64).argsort(dim=1, stable=True)


def seeds_for(keys: Tensor, purpose: int, count: int = 1) -> Tensor:
    """Non-negative seeds [L, count] int64 for other generators."""
    words = ops.philox(keys.cpu(), purpose, 2 * count)
    return words.view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy, from which the user's code may draw."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, without the stack trace of 400 us that torch formats for each kind of device that is missing
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  such code uses the legacy generator


@contextmanager
def generators_left_alone() -> Iterator[None]:
    """A context that leaves the global generators as they were before it."""
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
            torch.cuda.manual_seed_all(seed)  # CUDA, if it comes into use, begins with this seed


def generators_state() -> tuple[object, ...]:
    """The state of the global generators, to compare: if it differs after a call, that drew from them."""
    cuda = (
        tuple(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
        if (torch.cuda.is_available() and torch.cuda.is_initialized())
        else ()
    )
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(legacy), cuda
