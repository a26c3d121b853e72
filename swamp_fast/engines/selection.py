"""Selection: the engines that run the cycles of a run.

The setting `engine` may name a selection:

    "fused"                                 the fused engine in every cycle
    "eager:lanes"                           the eager engine, lane by lane, with channels-first images
    "eager:lanes:channels_last"             the same with channels-last images
    "eager:fold", "eager:fold_grouped"      the eager engine with the lanes folded into the batch axis, computed by
                                            batched products or by grouped convolutions; ":channels_last" may follow
    "fused@0.52,eager:lanes:channels_last"  the fused engine in cycles whose mask has a FLOP density of at most 0.52,
                                            the eager engine in the others

For engine="auto" a rule makes the selection. It never measures time.

The selection's name determines everything on which a run's bits depend. So the rule reads only the model's plan, the
precision, the processor's capabilities and each cycle's mask. It does not read the number of cycles or particles, other
runs, free memory or the time. Therefore a seed has the same result alone, in a sweep, in a longer run, and on several
processes.
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
WIDE_INPUTS = 64  # a convolution with at least this many input channels counts as wide
# The largest FLOP density at which the fused engine is no slower than the eager engine on a CPU.
# `python -m benchmarks.engine_rule` measured these densities with AVX-512 and 2 threads.
# tests/engines/test_selection.py compares each with the measured tables.
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
# The factor for a bfloat16 density in CROSSOVER on a processor with AMX. It is an estimate, not a measurement: AMX
# makes the eager engine about twice as fast.
AMX_CROSSOVER_FACTOR = 0.5


@dataclass(frozen=True)
class Selection:
    """The engines of a run: the fused engine under masks up to a FLOP density, the eager engine under denser masks.

    fused_up_to  this density, with at most 6 decimal places; 0 for the eager engine alone, 1 for the fused engine alone
    eager        how the eager engine runs the lanes; None if it never runs
    why          the reason for this selection
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
    """The selection with this name; None if no selection has it."""
    match = ENGINE_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return None
    if match["mode"] is None:
        return Selection(1.0, None, why)
    return Selection(float(match["up_to"] or 0), Choice(match["mode"], match["last"] is not None, why, {}), why)


def by_rule(problem: Problem, plan: Plan | str) -> Selection:
    """The selection for engine="auto".

    plan  the fused engine's plan for the model, or the reason why this engine can't run the model
    """
    if isinstance(plan, str):
        return Selection(0.0, eager_by_rule(problem), "by rule")
    if problem.device.type != "cpu":
        return Selection(
            1.0, None, "by rule: the fused engine covers the model. On GPUs the rule has not been measured yet"
        )
    kind, precision = kind_of(problem, plan), problem.config.precision
    density = CROSSOVER[precision, kind]
    why = f"by rule, for a model whose work is mostly {kind} in {precision}"
    if precision == "bfloat16" and has_amx():
        density *= AMX_CROSSOVER_FACTOR
        why += " on a processor with AMX, where the rule has not been measured yet"
    if density >= 1:
        return Selection(1.0, None, f"{why}: the fused engine at every density")
    return Selection(density, eager_by_rule(problem), f"{why}: the fused engine up to a FLOP density of {density:g}")


def eager_by_rule(problem: Problem) -> Choice:
    """How the rule runs lanes on the eager engine: lane by lane, with channels last if the model convolves images.

    Lane by lane is correct for every model. Channels last is left out if the model does not run with it.
    """
    if not problem.probe.convolves:
        return Choice("lanes", False, "by rule", {})
    reason = why_not_channels_last(problem)
    return Choice("lanes", reason is None, "by rule" if reason is None else f"by rule; {reason}", {})


def kind_of(problem: Problem, plan: Plan) -> str:
    """The kind of layer that has the most multiply-adds in the dense model: NARROW, WIDE or LINEAR."""
    parameters = dict(problem.template.named_parameters())
    multiply_adds = dict.fromkeys((NARROW, WIDE, LINEAR), 0)
    for op in plan.ops:
        if isinstance(op, Convolution):
            weight, shape = parameters[op.weight], plan.shapes[op.output]
            convolution = WIDE if weight.shape[1] >= WIDE_INPUTS else NARROW
            multiply_adds[LINEAR if len(shape) == 1 else convolution] += weight.numel() * math.prod(shape[1:])
    return max(multiply_adds, key=lambda kind: multiply_adds[kind])


def flop_density(problem: Problem, mask: Tensor) -> float:
    """The FLOPs of a forward pass under a mask [Q], divided by those of the dense model."""
    dense = problem.flops(torch.ones_like(mask))
    return problem.flops(mask) / dense if dense else 1.0
