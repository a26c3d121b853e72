"""The methods that `compare` knows: SWAMP, its ablations and related methods, each given by the driver's settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swamp_fast.config import SwampConfig, default_of

# Settings that the methods themselves decide, with their defaults. A comparison's base settings may not change them.
DECIDED = {name: default_of(name) for name in ("average", "schedule", "rewind", "combine", "mask_from")}
LAST_ITERATE: dict[str, Any] = {"average": "none", "average_every": 0}
SWAMP = "Choi et al., ICLR 2024, arXiv 2305.14852"
IMP = "Frankle et al., ICML 2020, arXiv 1912.05671"


@dataclass(frozen=True)
class Method:
    """One method of pruning.

    settings   (base settings with N particles) -> the settings that the method changes
    source     the publication that describes the method
    departs    how this implementation departs from its source
    every      (base settings) -> the number of prunings by which the method reaches the density that the base settings
               reach with one
    runs       (base settings) -> the number of runs per seed; the mean of their softmax is evaluated
    layers_of  another method: its run under the same seed decides how many weights each layer keeps in each cycle
    """

    settings: Callable[[SwampConfig], dict[str, Any]]
    source: str
    departs: str
    every: Callable[[SwampConfig], int] = lambda base: 1
    runs: Callable[[SwampConfig], int] = lambda base: 1
    layers_of: str | None = None


def particles_of(base: SwampConfig) -> int:
    """Return N of the base settings. Raises ValueError if `particles` is a list."""
    if not isinstance(base.particles, int):
        raise ValueError(
            f"`particles` must be one number for a comparison, got {list(base.particles)}; the method swamp+ makes its "
            "list from that number."
        )
    return base.particles


def seeds_of(method: Method, base: SwampConfig, seed: int) -> list[int]:
    """Return the seeds of a method's runs: first `seed`, then for each further run a hash of `seed` and its number."""
    others = range(1, method.runs(base))
    hashes = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in others]
    return [seed, *(int.from_bytes(digest, "little") >> 1 for digest in hashes)]


def _imp(**changes: Any) -> dict[str, Any]:
    """Return IMP's settings: one particle, its last iterate, ranked by |w|.

    The other scores are pointless for one particle: they rank as |w| does, or need a spread.
    """
    return {"particles": 1, **LAST_ITERATE, "mask_score": "abs-mean", **changes}


def _early_alone(base: SwampConfig) -> list[int]:
    """Return the particles per training: 1 in the first half, which includes the dense training, then N."""
    alone = (base.cycles + 1) // 2
    return [1] * alone + [particles_of(base)] * (base.cycles + 1 - alone)


METHODS: dict[str, Method] = {
    "swamp": Method(
        lambda base: {},
        SWAMP,
        "our choices, marked in SwampConfig: N, T0 and the cosine before the SWA window; and BatchNorm statistics from "
        "a full pass",
    ),
    "swamp+": Method(
        lambda base: {"particles": _early_alone(base)},
        SWAMP,
        "it is not known in which cycle the paper switches to N particles; here it is after half of the trainings",
    ),
    "imp": Method(
        lambda base: _imp(),
        IMP,
        "the learning rate follows a cosine to 0 instead of steps, and the ticket is trained at the constant rate lr",
    ),
    "imp+swa": Method(
        lambda base: {"particles": 1, "mask_score": "abs-mean"},
        f"a control of {SWAMP}; SWA: Izmailov et al., UAI 2018, arXiv 1803.05407",
        "the rate in the SWA window is constant; the source also has cyclic rates",
    ),
    "swamp-sgd": Method(
        lambda base: LAST_ITERATE,
        f"a control of {SWAMP}, requested by its reviewers",
        "the rate falls to 0, as is usual with SGD, so the schedule also differs from swamp's",
    ),
    "imp-swa-schedule": Method(
        lambda base: _imp(schedule="swa"),
        "ours: it separates the gain of SWA's averaging from the gain of its schedule",
        "it differs from imp in the schedule, and from imp+swa in taking the last iterate",
    ),
    "imp-long": Method(
        lambda base: _imp(epochs=particles_of(base) * base.epochs),
        f"a control of {SWAMP}, requested by its reviewers: one particle with the compute of N",
        "the schedule is stretched to N times the epochs; the ticket's training is not longer",
    ),
    "imp-fine": Method(
        lambda base: _imp(
            prune=1 - (1 - base.prune) ** (1 / particles_of(base)), cycles=particles_of(base) * base.cycles
        ),
        "ours: the compute of N particles is spent on N prunings for each pruning of the other methods",
        "each pruning rounds the number of kept weights, so densities differ from the other methods' by a few weights",
        every=particles_of,
    ),
    "best-particle": Method(
        lambda base: {"combine": "best", "mask_score": "abs-mean"},
        f"a control of {SWAMP}, requested by its reviewers",
        "the particle that is best on validation data also gives the next mask",
    ),
    "ensemble": Method(
        lambda base: _imp(),
        f"{SWAMP}, which compares with ensembles of IMP; deep ensembles: Lakshminarayanan et al., NeurIPS 2017, "
        "arXiv 1612.01474",
        "there are as many runs as SWAMP has particles, each with its own initialisation and ticket",
        runs=particles_of,
    ),
    "sms": Method(
        lambda base: {"rewind": "average"},
        "Zimmer, Spiegel, Pokutta, ICLR 2024, arXiv 2306.16788",
        "the source retrains a pretrained model with a short schedule, and varies the particles' seeds or settings; "
        "here each retraining is SWAMP's full training with SWA, and the pruning threshold is global",
    ),
    "one-shot": Method(
        lambda base: _imp(mask_from="dense"),
        "global magnitude pruning of the trained network at once: Frankle & Carbin, ICLR 2019, arXiv 1803.03635",
        "the network is retrained from the ticket, like the other methods, not from the initialisation",
    ),
    "random": Method(
        lambda base: _imp(mask_score="random"),
        "a random mask with the same density per layer: Frankle et al., ICLR 2021, arXiv 2009.08576",
        "the source shuffles a finished mask; here each cycle's mask is drawn from the weights that the previous mask "
        "keeps, with the density per layer of imp under the same seed",
        layers_of="imp",
    ),
}
