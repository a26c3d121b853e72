"""Which engine runs a run's cycles: named by a string; for engine="auto" chosen by a rule, never by a stopwatch.

    "fused"                                 the fused engine in every cycle
    "eager:lanes"                           the eager engine, lane by lane, pictures channels first
    "eager:lanes:channels_last"             likewise, pictures channels last
    "eager:fold", "eager:fold_grouped"      the lanes folded into the batch axis, with batched products or with grouped
                                            convolutions; channels last likewise
    "fused@0.52,eager:lanes:channels_last"  the fused engine in the cycles whose mask has at most this FLOP density,
                                            the eager one in the others

A name says everything that a run's bits depend on, so the rule reads the model's plan, the precision and the
processor's capability, and each cycle's mask; never the number of cycles or particles, other runs, free memory or
time. So a seed has one result: alone, in a sweep, in a longer run, or on several processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.config import ENGINE_NAME
from swamp_fast.engines.eager.check import why_not_channels_last
from swamp_fast.engines.fused.plan import Convolution, Plan
from swamp_fast.ops.backends import has_amx
from swamp_fast.problem.problem import Problem

WAYS = {"lanes": "lane by lane", "fold": "folded", "fold_grouped": "folded with grouped convolutions"}

NARROW, WIDE, LINEAR = "narrow convolutions", "wide convolutions", "linear layers"
WIDE_INPUTS = 64  # channels that a wide convolution reads, at least
# On a CPU, the largest FLOP density at which the fused engine is no slower than the eager one. Measured with AVX-512
# and 2 threads by `python -m benchmarks.engine_rule`; tests/test_engine_rule.py holds each number against its tables.
CROSSOVER = {
    ("float32", NARROW): 1.0,
    ("float32", WIDE): 0.52,
    ("float32", LINEAR): 0.35,
    ("bfloat16", NARROW): 0.24,
    ("bfloat16", WIDE): 0.17,
    ("bfloat16", LINEAR): 0.25,
    ("float64", NARROW): 0.33,
    ("float64", WIDE): 0.33,
    ("float64", LINEAR): 0.2,
}
# Not measured by this project: a processor that multiplies bfloat16 in tiles (AMX) runs the eager engine about twice as
# fast, so that the fused one is worth its while at about half the density.
AMX_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """How the eager engine runs the lanes.

    way           one of WAYS
    milliseconds  what engine="fastest" measured, by way: of a step of one particle
    """

    way: str
    channels_last: bool
    why: str
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        memory = "channels last" if self.channels_last else "channels first"
        return f"{WAYS[self.way]}, {memory}: {self.why}"

    @property
    def name(self) -> str:
        """As in the setting `engine`."""
        return f"eager:{self.way}" + ":channels_last" * self.channels_last


@dataclass(frozen=True)
class Selection:
    """The engines of a run: the fused one under masks up to a FLOP density, the eager one under denser ones.

    fused_up_to  0: the eager engine always; 1: the fused engine always; between them, of at most 6 decimal places
    eager        None where the fused engine runs always
    """

    fused_up_to: float
    eager: Choice | None
    why: str

    @property
    def name(self) -> str:
        """As in the setting `engine`."""
        if self.eager is None:
            return "fused"
        up_to = f"{self.fused_up_to:.6f}".rstrip("0")
        return f"fused@{up_to},{self.eager.name}" if self.fused_up_to > 0 else self.eager.name


def named(name: object, why: str) -> Selection | None:
    """What a name selects; None for what is no name of an engine."""
    found = ENGINE_NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return None
    if found["way"] is None:
        return Selection(1.0, None, why)
    return Selection(float(found["up_to"] or 0), Choice(found["way"], found["last"] is not None, why, {}), why)


def by_rule(problem: Problem, plan: Plan | str) -> Selection:
    """The engines that the rule selects.

    plan  of the fused engine, or why it doesn't run the model
    """
    if isinstance(plan, str):
        return Selection(0.0, eager_by_rule(problem), "by rule")
    if problem.device.type != "cpu":
        return Selection(1.0, None, "by rule: it covers the model. On GPUs the rule is not measured yet")
    kind, precision = kind_of(problem, plan), problem.config.precision
    density = CROSSOVER[precision, kind]
    about = f"by rule, for a model whose work is mostly {kind} in {precision}"
    if precision == "bfloat16" and has_amx():
        density *= AMX_SHARE
        about += " on a processor with AMX, where the rule is not measured yet"
    if density >= 1:
        return Selection(1.0, None, f"{about}: the fused engine at every density")
    return Selection(density, eager_by_rule(problem), f"{about}: the fused engine up to a FLOP density of {density:g}")


def eager_by_rule(problem: Problem) -> Choice:
    """Lane by lane, which is right for every model; pictures channels last where a convolution reads them."""
    if not problem.probe.convolves:
        return Choice("lanes", False, "by rule", {})
    reason = why_not_channels_last(problem)
    return Choice("lanes", reason is None, "by rule" if reason is None else f"by rule; {reason}", {})


def kind_of(problem: Problem, plan: Plan) -> str:
    """The kind of operation that has most of the dense model's multiply-adds."""
    parameters = dict(problem.template.named_parameters())
    multiply_adds = dict.fromkeys((NARROW, WIDE, LINEAR), 0)
    for op in plan.ops:
        if isinstance(op, Convolution):
            weight, shape = parameters[op.weight], plan.shapes[op.output]
            convolution = WIDE if weight.shape[1] >= WIDE_INPUTS else NARROW
            multiply_adds[LINEAR if len(shape) == 1 else convolution] += weight.numel() * math.prod(shape[1:])
    return max(multiply_adds, key=lambda kind: multiply_adds[kind])


def flop_density(problem: Problem, mask: Tensor) -> float:
    """FLOPs of a forward under a mask [Q], relative to the dense model's."""
    dense = problem.flops(torch.ones_like(mask))
    return problem.flops(mask) / dense if dense else 1.0
