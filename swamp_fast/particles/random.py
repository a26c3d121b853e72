"""All random numbers of a run come from a counter-based generator, so that they don't depend on the order of the draws.

Every draw is a word of Philox-4x32-10. Its address is (seed, cycle, particle, time, purpose, place), where time is the
number of the epoch or step in the training. Particle 3 of 8 therefore draws the same numbers as particle 3 of 4, on any
device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from swamp_fast import ops

# The purposes of draws. The purpose is the word of a draw's address that separates different kinds of draws.
ORDER = 0
CROP_FLIP = 1  # the same number is in csrc/cpu/kernels.cpp and kernels/gather_augment.py
DROPOUT = 2  # the low byte of the purpose; the bytes above it hold the number of the dropout call in the forward pass
SPLIT = 3
LANE_SEED = 4  # for seeding torch's, Python's and NumPy's generators before a model or a transform draws from them
SAMPLE_SEED = 5  # for seeding the same generators before a Dataset reads a sample
MASK = 6
MIX = 7  # for seeding the generator from which a batch's mixup or CutMix is drawn
SAMPLE_DRAWS = 8  # of an epoch whose samples are drawn by weights

PARTICLE_BITS = 16  # of the number of a stream, for the number of the particle


def stream_of(cycle: int | None, particle: int) -> int:
    """Return the number of a particle's random stream: cycle and particle in one word. Cycle None is the ticket."""
    return (0 if cycle is None else cycle + 1) << PARTICLE_BITS | particle


def lane_keys(seeds: list[int], streams: list[int], device: torch.device) -> Tensor:
    """Return the keys [L, 3] int64 of lanes: seed, stream, and time 0."""
    keys = [[seed, stream, 0] for seed, stream in zip(seeds, streams, strict=True)]
    return torch.tensor(keys, dtype=torch.int64, device=device).view(len(keys), 3)


def at_time(keys: Tensor, time: int) -> Tensor:
    """Return a copy of keys [L, 3] with the given time, the number of an epoch or a step."""
    keys = keys.clone()
    keys[:, 2] = time
    return keys


def later(keys: Tensor, by: int) -> Tensor:
    """Return keys [L, 3] with a time that is later by a number of epochs or batches."""
    return keys if by == 0 else keys + keys.new_tensor([0, 0, by])


def of_first_particle(keys: Tensor) -> Tensor:
    """Return for each of some keys [L, 3] the key of the first particle, at the same cycle and time."""
    keys = keys.clone()
    keys[:, 1] = keys[:, 1] >> PARTICLE_BITS << PARTICLE_BITS
    return keys


def evaluation_time(which: int, batch: int) -> int:
    """Return the time of draws outside training, which is larger than that of any step.

    which  0 for the re-estimation of BatchNorm statistics, 1 for evaluation on test data, 2 on validation data
    """
    return 1 << 31 | which << 24 | batch


def epoch_order(keys: Tensor, samples: int) -> Tensor:
    """Return each lane's order [L, samples] int64 of the samples in an epoch; the epoch is the time in `keys`."""
    return _permutations(keys, ORDER, samples)


def drawn_samples(keys: Tensor, distribution: Tensor) -> Tensor:
    """Return the samples [L, n] int64 of an epoch of each lane, which are drawn with replacement.

    distribution  [n] float64: the probability that a draw gives this sample or one before it; the last one is 1
    """
    words = ops.philox(keys, SAMPLE_DRAWS, 2 * len(distribution))
    uniform = (words.view(torch.int64) >> 11 & (1 << 53) - 1).double() * 2.0**-53  # in [0, 1)
    return torch.searchsorted(distribution, uniform, right=True)


def split_order(samples: int) -> Tensor:
    """Return the order [samples] int64 in which samples are held out. It is the same for every run and seed."""
    return _permutations(torch.zeros(1, 3, dtype=torch.int64), SPLIT, samples)[0]


def layer_order(seed: int, cycle: int, layer: int, weights: int, device: torch.device) -> Tensor:
    """Return the order [weights] int64 in which a cycle's random mask picks the weights of a layer."""
    keys = at_time(lane_keys([seed], [stream_of(cycle, 0)], device), layer)
    return _permutations(keys, MASK, weights)[0]


def _permutations(keys: Tensor, purpose: int, count: int) -> Tensor:
    """Return a random permutation [L, count] int64 for each key, by a stable sort of random 64-bit words.

    With 32-bit words, about one permutation in four of 50,000 samples would have a tie.
    """
    words = ops.philox(keys, purpose, 2 * count)
    return words.view(torch.int64).argsort(dim=1, stable=True)


def seeds_for(keys: Tensor, purpose: int, count: int = 1) -> Tensor:
    """Return non-negative seeds [L, count] int64 for other random generators."""
    words = ops.philox(keys.cpu(), purpose, 2 * count)
    return words.view(torch.int64) & 0x7FFF_FFFF_FFFF_FFFF


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy, from which the user's code may draw."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same, but without the 400 us that torch takes to format a stack trace for each missing kind of device
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  the user's code draws from the legacy generator


@contextmanager
def generators_left_alone() -> Iterator[None]:
    """A context that restores the global generators to their state before it."""
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
            torch.cuda.manual_seed_all(seed)  # if CUDA is initialised later, it begins with this seed


def generators_state() -> tuple[object, ...]:
    """Return the state of the global generators. If it differs after a call, the call drew random numbers."""
    cuda = (
        tuple(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
        if (torch.cuda.is_available() and torch.cuda.is_initialized())
        else ()
    )
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(legacy), cuda
