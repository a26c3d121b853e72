"""The methods that `compare` compares: SWAMP, its ablations and its neighbours, all settings of the one driver."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swamp_fast.config import SwampConfig

# What tells methods apart, so no comparison may set it for all of them.
DECIDED = {
    name: SwampConfig.__dataclass_fields__[name].default
    for name in ("swa", "schedule", "rewind", "combine", "mask_from")
}
SWAMP = "Choi et al., ICLR 2024, arXiv 2305.14852"
IMP = "Frankle et al., ICML 2020, arXiv 1912.05671"


@dataclass(frozen=True)
class Method:
    """One way to prune.

    settings  of a base with N particles: what the method changes of it
    source    who describes it
    departs   how this departs from that
    every     of a base: so many prunings of the method stand for one of the base; their densities are compared
    runs      of a base: so many runs a seed, of which the mean of the softmax is the model
    layers_of the method whose run under the same seed tells how many weights each layer keeps in each cycle
    """

    settings: Callable[[SwampConfig], dict[str, Any]]
    source: str
    departs: str
    every: Callable[[SwampConfig], int] = lambda base: 1
    runs: Callable[[SwampConfig], int] = lambda base: 1
    layers_of: str | None = None


def particles_of(base: SwampConfig) -> int:
    """N of a base. Raises ValueError for a schedule."""
    if not isinstance(base.particles, int):
        raise ValueError(
            f"`particles` must be one number N for a comparison, got {list(base.particles)}; the method swamp+ has a "
            "schedule of its own."
        )
    return base.particles


def seeds_of(method: Method, base: SwampConfig, seed: int) -> list[int]:
    """The seeds of a method's runs: the first is `seed` itself, others are hashed from it and their number."""
    others = range(1, method.runs(base))
    hashes = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in others]
    return [seed, *(int.from_bytes(each, "little") >> 1 for each in hashes)]


def _imp(**changes: Any) -> dict[str, Any]:
    """One particle, SGD; of one particle every score ranks as |w| does, and has no spread."""
    return {"particles": 1, "swa": False, "mask_score": "abs-mean", **changes}


def _early_alone(base: SwampConfig) -> list[int]:
    """One particle in the first half of the trainings, the dense one among them, N after."""
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
        "where to switch to N particles is not known: after the first half of the trainings, ours",
    ),
    "imp": Method(
        lambda base: _imp(),
        IMP,
        "the schedule is a cosine to 0 where they have steps, and the ticket is trained at the constant rate lr",
    ),
    "imp+swa": Method(
        lambda base: {"particles": 1, "mask_score": "abs-mean"},
        f"a control of {SWAMP}; SWA: Izmailov et al., UAI 2018, arXiv 1803.05407",
        "the rate in the window is constant, where they have cycles too",
    ),
    "swamp-sgd": Method(
        lambda base: {"swa": False},
        f"a control of {SWAMP}, asked for by its reviewers",
        "the rate falls to 0, as SGD's is used to, so the schedule differs from swamp's too",
    ),
    "imp-swa-schedule": Method(
        lambda base: _imp(schedule="swa"),
        "ours: it parts what SWA's average gains from what its schedule does",
        "from imp in the schedule, from imp+swa in that the last iterate counts",
    ),
    "imp-long": Method(
        lambda base: _imp(epochs=particles_of(base) * base.epochs),
        f"a control of {SWAMP}, asked for by its reviewers: the compute of N particles",
        "the schedule is stretched to N times the epochs; the ticket's length is not",
    ),
    "imp-fine": Method(
        lambda base: _imp(
            prune=1 - (1 - base.prune) ** (1 / particles_of(base)), cycles=particles_of(base) * base.cycles
        ),
        "ours: the compute of N particles, spent on N prunings for each of the others'",
        "kept weights are rounded in each of the prunings, so densities differ from the others' by a few weights",
        every=particles_of,
    ),
    "best-particle": Method(
        lambda base: {"combine": "best", "mask_score": "abs-mean"},
        f"a control of {SWAMP}, asked for by its reviewers",
        "the best on validation data also gives the next mask",
    ),
    "ensemble": Method(
        lambda base: _imp(),
        f"{SWAMP}, which compares with ensembles of IMP; deep ensembles: Lakshminarayanan et al., NeurIPS 2017, "
        "arXiv 1612.01474",
        "as many runs as SWAMP has particles, each from an initialisation and ticket of its own",
        runs=particles_of,
    ),
    "sms": Method(
        lambda base: {"rewind": "average"},
        "Zimmer, Spiegel, Pokutta, ICLR 2024, arXiv 2306.16788",
        "they retrain from a pretrained model with a short schedule, and vary seeds or settings of the particles; "
        "here each is SWAMP's full training with SWA, and masks are global",
    ),
    "one-shot": Method(
        lambda base: _imp(mask_from="dense"),
        "global magnitude pruning of the trained network at once: Frankle & Carbin, ICLR 2019, arXiv 1803.03635",
        "retrained from the ticket as the others, not from the initialisation",
    ),
    "random": Method(
        lambda base: _imp(mask_score="random"),
        "a random mask with the same density by layer: Frankle et al., ICLR 2021, arXiv 2009.08576",
        "they shuffle a finished mask; here masks are drawn cycle by cycle, each among what the last one keeps, with "
        "the density by layer of imp under the same seed",
        layers_of="imp",
    ),
}
