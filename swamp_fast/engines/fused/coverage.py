"""Decides whether the fused engine can run a problem, and returns the problem's Plan or the reason why it can't."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.copying import copy_of
from swamp_fast.common.tree import tree_clone
from swamp_fast.engines.fused.plan import Convolution, Plan
from swamp_fast.engines.fused.trace import NotCovered, plan_of
from swamp_fast.engines.lane_optimizers import why_not_without_closure
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.problem.problem import Problem


def fused_plan(problem: Problem) -> Plan | str:
    """Return the plan that the fused engine runs the model by, or the reason why it can't run it."""
    reason = _why_not_here(problem) or _why_not_this_forward(problem)
    if reason is not None:
        return reason
    inputs, targets = _first_batch(problem)
    if _transform_reshapes(problem, inputs, targets):
        return "the transform changes the shape of its inputs"
    try:
        plan = plan_of(problem.template, problem.forward, inputs)
    except NotCovered as not_covered:
        return str(not_covered)
    return _why_not_these_parameters(problem, plan) or _why_not_these_norms(problem, plan) or plan


def _why_not_here(problem: Problem) -> str | None:
    """Return the reason why the engine can't run on this device or with this data, or None."""
    if problem.device.type not in ("cpu", "cuda"):
        return f"it has no kernels for {problem.device.type}"
    if torch.version.hip is not None:
        # On AMD, a block that counts its arrival would need a memory fence in each of its wavefronts.
        return "its kernels have not been tried on AMD GPUs"
    if not problem.train.stacked:
        return "the batches come from a user-defined collate function"
    return why_not_without_closure(problem)


def _why_not_this_forward(problem: Problem) -> str | None:
    """Return a side effect of the model's forward that a plan can't express, or None."""
    probe = problem.probe
    if probe.draws_elsewhere:
        return "its forward draws random numbers besides dropout"
    if probe.keeps_state:
        return "its forward keeps state in plain attributes of the model, or differs from call to call"
    if probe.changed:
        return f"its forward changes {probe.changed[0]}"
    if probe.reads_values is not None:
        return f"its forward looks at values ({probe.reads_values})"
    return None


def _first_batch(problem: Problem) -> tuple[Any, Any]:
    """The inputs and targets [B, ...] of one lane's first batch."""
    keys = torch.zeros(1, 3, dtype=torch.int64, device=problem.device)
    order = torch.arange(problem.train.length, device=problem.device)[None]
    handle = next(iter(problem.train.batches(order, keys, [problem.bounds[0]])))
    return problem.train.fetch(handle, None).lane(0)


def _transform_reshapes(problem: Problem, inputs: Any, targets: Any) -> bool:
    if problem.transform is None or not isinstance(inputs, Tensor):
        return False
    with generators_left_alone():
        return bool(problem.transform(tree_clone(inputs), tree_clone(targets))[0].shape != inputs.shape)


def _why_not_these_parameters(problem: Problem, plan: Plan) -> str | None:
    """Return which parameter is pruned or frozen although the kernels don't support that, or None."""
    weights = {op.weight for op in plan.ops if isinstance(op, Convolution)}
    for entry in problem.layout.prunable:
        if entry.name not in weights:
            return (
                f"{entry.name} is pruned, but its forward doesn't use it as the weight of a convolution or linear layer"
            )
    for name, parameter in problem.template.named_parameters():
        if not parameter.requires_grad:
            return f"{name} is frozen"
    return None


def _why_not_these_norms(problem: Problem, plan: Plan) -> str | None:
    """Return which norm's running statistics the engine would update otherwise than its module does, or None."""
    template = copy_of(problem.template).train()
    norms = norms_of([template])
    for path, module in template.named_modules():
        if module in norms and not module.training:
            return f"{path} ({type(module).__name__}) stays in evaluation mode"
        if module in norms and module.momentum != norms[0].momentum:
            return f"{path} ({type(module).__name__}) has a different momentum from the first norm"
    if len(norms) != len(plan.norms):
        return "it has norms that its forward doesn't use"
    return None
