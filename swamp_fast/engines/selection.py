"""Selection: which engines run a run's cycles. A name gives one; for engine="auto" a rule chooses, never a stopwatch.

    "fused"                                 the fused engine in every cycle
    "eager:lanes"                           the eager engine, lane by lane, images channels first
    "eager:lanes:channels_last"             the same with images channels last
    "eager:fold", "eager:fold_grouped"      the eager engine with the lanes folded into the batch axis, by batched
                                            products or by grouped convolutions; ":channels_last" may follow
    "fused@0.52,eager:lanes:channels_last"  the fused engine in cycles whose mask has at most this FLOP density, the
                                            eager one in the others

A name determines everything on which a run's bits depend. So the rule reads only the model's plan, the precision, the
processor's capability and each cycle's mask; never the number of cycles or particles, other runs, free memory or time.
Therefore a seed has one result, whether alone, in a sweep, in a longer run, or on several processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.config import ENGINE_NAME
from swamp_fast.engines.eager.check import why_not_channels_last
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.fused.plan import Convolution, Plan
from swamp_fast.ops.backends import has_amx
from swamp_fast.problem.problem import Problem

NARROW, WIDE, LINEAR = "narrow convolutions", "wide convolutions", "linear layers"
WIDE_INPUTS = 64  # input channels from which on a convolution counts as wide
# On a CPU, the largest FLOP density at which the fused engine is no slower than the eager one. Measured with AVX-512
# and 2 threads by `python -m benchmarks.engine_rule`; tests/engines/test_selection.py compares each with those tables.
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
# An estimate, not a measurement: on a processor that multiplies bfloat16 in tiles (AMX) the eager engine is about twice
# as fast, so the fused one pays off at about this fraction of the density.
AMX_SHARE = 0.5


@dataclass(frozen=True)
class Selection:
    """The engines of a run: the fused one under masks up to a FLOP density, the eager one under denser masks.

    fused_up_to  0: always the eager engine; 1: always the fused engine; between them, at most 6 decimal places
    eager        how the eager engine runs the lanes; None if it never runs
    """

    fused_up_to: float
    eager: Choice | None
    why: str

    @property
    def name(self) -> str:
        """The value of the setting `engine` that selects this."""
        if self.eager is None:
            return "fused"
        up_to = f"{self.fused_up_to:.6f}".rstrip("0")
        return f"fused@{up_to},{self.eager.name}" if self.fused_up_to > 0 else self.eager.name


def named(name: object, why: str) -> Selection | None:
    """The selection that has this name; None if it isn't the name of one."""
    match = ENGINE_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return None
    if match["way"] is None:
        return Selection(1.0, None, why)
    return Selection(float(match["up_to"] or 0), Choice(match["way"], match["last"] is not None, why, {}), why)


def by_rule(problem: Problem, plan: Plan | str) -> Selection:
    """The selection of engine="auto".

    plan  the fused engine's, or why it can't run the model
    """
    if isinstance(plan, str):
        return Selection(0.0, eager_by_rule(problem), "by rule")
    if problem.device.type != "cpu":
        return Selection(1.0, None, "by rule: it covers the model. On GPUs the rule has not been measured yet")
    kind, precision = kind_of(problem, plan), problem.config.precision
    density = CROSSOVER[precision, kind]
    why = f"by rule, for a model whose work is mostly {kind} in {precision}"
    if precision == "bfloat16" and has_amx():
        density *= AMX_SHARE
        why += " on a processor with AMX, where the rule has not been measured yet"
    if density >= 1:
        return Selection(1.0, None, f"{why}: the fused engine at every density")
    return Selection(density, eager_by_rule(problem), f"{why}: the fused engine up to a FLOP density of {density:g}")


def eager_by_rule(problem: Problem) -> Choice:
    """Lane by lane, which is correct for every model, with channels last if a convolution reads images."""
    if not problem.probe.convolves:
        return Choice("lanes", False, "by rule", {})
    reason = why_not_channels_last(problem)
    return Choice("lanes", reason is None, "by rule" if reason is None else f"by rule; {reason}", {})


def kind_of(problem: Problem, plan: Plan) -> str:
    """The kind of operation with most of the dense model's multiply-adds: NARROW, WIDE or LINEAR."""
    parameters = dict(problem.template.named_parameters())
    multiply_adds = dict.fromkeys((NARROW, WIDE, LINEAR), 0)
    for op in plan.ops:
        if isinstance(op, Convolution):
            weight, shape = parameters[op.weight], plan.shapes[op.output]
            convolution = WIDE if weight.shape[1] >= WIDE_INPUTS else NARROW
            multiply_adds[LINEAR if len(shape) == 1 else convolution] += weight.numel() * math.prod(shape[1:])
    return max(multiply_adds, key=lambda kind: multiply_adds[kind])


def flop_density(problem: Problem, mask: Tensor) -> float:
    """FLOPs of a forward pass under a mask [Q], as a fraction of the dense model's."""
    dense = problem.flops(torch.ones_like(mask))
    return problem.flops(mask) / dense if dense else 1.0
