"""The methods that `compare` knows: SWAMP, its ablations and related methods, each as settings of the one driver."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swamp_fast.config import SwampConfig, default_of

# The settings in which methods differ, and their defaults: a comparison may not set them for all of its methods.
DECIDED = {name: default_of(name) for name in ("swa", "schedule", "rewind", "combine", "mask_from")}
SWAMP = "Choi et al., ICLR 2024, arXiv 2305.14852"
IMP = "Frankle et al., ICML 2020, arXiv 1912.05671"


@dataclass(frozen=True)
class Method:
    """One method of pruning.

    settings   (base settings with N particles) -> the settings that the method changes
    source     the publication that describes it
    departs    how this implementation departs from its source
    every      (base settings) -> how many prunings of the method have the density of one pruning of the base
    runs       (base settings) -> the number of runs per seed; the mean of their softmax is evaluated
    layers_of  the method whose run under the same seed decides how many weights each layer keeps in each cycle
    """

    settings: Callable[[SwampConfig], dict[str, Any]]
    source: str
    departs: str
    every: Callable[[SwampConfig], int] = lambda base: 1
    runs: Callable[[SwampConfig], int] = lambda base: 1
    layers_of: str | None = None


def particles_of(base: SwampConfig) -> int:
    """N of the base settings. Raises ValueError for a list of numbers."""
    if not isinstance(base.particles, int):
        raise ValueError(
            f"`particles` must be one number N for a comparison, got {list(base.particles)}; the method swamp+ sets "
            "its own list."
        )
    return base.particles


def seeds_of(method: Method, base: SwampConfig, seed: int) -> list[int]:
    """The seeds of a method's runs: first `seed` itself, then hashes of it and the number of the run."""
    others = range(1, method.runs(base))
    hashes = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in others]
    return [seed, *(int.from_bytes(digest, "little") >> 1 for digest in hashes)]


def _imp(**changes: Any) -> dict[str, Any]:
    """One particle and its last iterate, ranked by |w|: other scores rank one particle alike, or need a spread."""
    return {"particles": 1, "swa": False, "mask_score": "abs-mean", **changes}


def _early_alone(base: SwampConfig) -> list[int]:
    """One particle in the first half of the trainings, which includes the dense one, and N in the second half."""
    alone = (base.cycles + 1) // 2
    return [1] * alone + [particles_of(base)] * (base.cycles + 1 - alone)


METHODS: dict[str, Method] = {
    "swamp": Method(
        lambda base: {},
        SWAMP,
        "what is ours is marked in SwampConfig: N, T0, the cosine before the SWA window, BatchNorm by a full pass",
    ),
    "swamp+": Method(
        lambda base: {"particles": _early_alone(base)},
        SWAMP,
        "the paper's cycle of the switch to N particles is not known: ours is after the first half of the trainings",
    ),
    "imp": Method(
        lambda base: _imp(),
        IMP,
        "the schedule is a cosine to 0 instead of steps, and the ticket is trained at the constant rate lr",
    ),
    "imp+swa": Method(
        lambda base: {"particles": 1, "mask_score": "abs-mean"},
        f"a control of {SWAMP}; SWA: Izmailov et al., UAI 2018, arXiv 1803.05407",
        "the rate in the window is constant; the source also has cyclic rates",
    ),
    "swamp-sgd": Method(
        lambda base: {"swa": False},
        f"a control of {SWAMP}, requested by its reviewers",
        "the rate falls to 0, as usual with SGD, so the schedule differs from swamp's too",
    ),
    "imp-swa-schedule": Method(
        lambda base: _imp(schedule="swa"),
        "ours: it separates the gain of SWA's averaging from that of its schedule",
        "from imp in the schedule, from imp+swa in that it takes the last iterate",
    ),
    "imp-long": Method(
        lambda base: _imp(epochs=particles_of(base) * base.epochs),
        f"a control of {SWAMP}, requested by its reviewers: the compute of N particles",
        "the schedule is stretched to N times the epochs; the ticket's length is not",
    ),
    "imp-fine": Method(
        lambda base: _imp(
            prune=1 - (1 - base.prune) ** (1 / particles_of(base)), cycles=particles_of(base) * base.cycles
        ),
        "ours: the compute of N particles, spent on N prunings for each pruning of the other methods",
        "the number of kept weights is rounded in each pruning, so densities differ from the others' by a few weights",
        every=particles_of,
    ),
    "best-particle": Method(
        lambda base: {"combine": "best", "mask_score": "abs-mean"},
        f"a control of {SWAMP}, requested by its reviewers",
        "the best on validation data also gives the next mask",
    ),
    "ensemble": Method(
        lambda base: _imp(),
        f"{SWAMP}, which compares with ensembles of IMP; deep ensembles: Lakshminarayanan et al., NeurIPS 2017, "
        "arXiv 1612.01474",
        "as many runs as SWAMP has particles, each with its own initialisation and ticket",
        runs=particles_of,
    ),
    "sms": Method(
        lambda base: {"rewind": "average"},
        "Zimmer, Spiegel, Pokutta, ICLR 2024, arXiv 2306.16788",
        "the source retrains a pretrained model with a short schedule, and varies seeds or settings of the particles; "
        "here each is SWAMP's full training with SWA, and masks are global",
    ),
    "one-shot": Method(
        lambda base: _imp(mask_from="dense"),
        "global magnitude pruning of the trained network at once: Frankle & Carbin, ICLR 2019, arXiv 1803.03635",
        "retrained from the ticket as the other methods, not from the initialisation",
    ),
    "random": Method(
        lambda base: _imp(mask_score="random"),
        "a random mask with the same density by layer: Frankle et al., ICLR 2021, arXiv 2009.08576",
        "the source shuffles a finished mask; here each cycle's mask is drawn from those that the last one keeps, "
        "with the density by layer of imp under the same seed",
        layers_of="imp",
    ),
}
