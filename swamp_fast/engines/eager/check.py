"""The eager engine's self-checks, which run before the first step.

They compare folded lanes with lanes that run alone: the results must agree, and no lane may influence another. They
also compare channels last with channels first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.format import described
from swamp_fast.common.tree import tree_map
from swamp_fast.data.store import Batch
from swamp_fast.engines.eager.fold import Folded
from swamp_fast.engines.eager.stacked import CannotFold
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.engines.lane_optimizers import why_not_without_closure
from swamp_fast.engines.self_check import (
    check_keys,
    close,
    different_weights,
    few_samples,
    in_float64,
    results_of,
)
from swamp_fast.engines.trainer import LaneRunner
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.problem.problem import Problem

MakeRunner = Callable[[Tensor, Tensor], LaneRunner]  # makes a runner for weights [L, P] and gradients [L, P]

CHECKED_LANES = 3  # as many as different_weights returns
ROUGH_TOLERANCE = {"float64": 1e-6, "float32": 2e-2, "bfloat16": 0.2}  # for a step in the run's precision


def why_not_fold(problem: Problem, grouped: bool) -> str | None:
    """The reason why the model can't be folded; None if it can.

    Compares folded lanes with the same lanes alone, in float64. The lanes have different weights and samples.
    """
    if problem.probe.draws_elsewhere:
        return "it draws random numbers besides dropout (reproducible on one kind of device only)"
    if problem.probe.keeps_state:
        return "its forward keeps state in plain attributes of the model, or differs from call to call"
    if problem.probe.reads_values is not None:
        return f"its forward looks at values ({problem.probe.reads_values}), so lanes would share one decision"
    if problem.probe.changed:
        return f"its forward changes buffers or weights: {', '.join(problem.probe.changed)}"
    if not problem.train.stacked:
        return "the batches come from a user-defined collate function, so the lanes' batches may not stack"
    if (reason := why_not_without_closure(problem)) is not None:
        return reason
    problem = in_float64(problem)
    try:
        with generators_left_alone():
            return _difference(problem, grouped)
    except CannotFold as reason:
        return str(reason)
    except Exception as error:
        return f"when folded, it raises {described(error)}"


def why_not_channels_last(problem: Problem) -> str | None:
    """The reason why the model can't run with channels last; None if it can.

    Compares channels last with channels first on a few samples of one lane, in float64.
    """
    problem = in_float64(problem)
    keys = check_keys(problem, 1)
    weights = different_weights(problem)[:1]
    results = []
    with generators_left_alone():
        batch = few_samples(problem, keys)
        for last in (False, True):
            try:
                results.append(_results(partial(LaneByLane, problem, channels_last=last), weights, batch, keys))
            except Exception as error:  # for example from a view that is impossible with channels last
                return f"in the float64 check with channels {'last' if last else 'first'}, it raises {described(error)}"
    channels_first, channels_last = results
    for name, expected in channels_first.items():
        if not close(channels_last[name], expected):
            return f"with channels last, its {name} differ from those with channels first"
    return None


def differs_at_full_size(problem: Problem, make: MakeRunner, lanes: int) -> str | None:
    """How an execution mode differs from lane by lane at the run's batch sizes and number of lanes; None if it doesn't.

    The checks with a few samples are not enough, because a forward may branch on the size of its batch, which folding
    changes. This comparison runs in the run's precision, so it finds only large differences.
    """
    last = problem.bounds[-1]
    sizes = {(problem.bounds[0], lanes), (last, lanes), (problem.bounds[0], lanes + 1)}
    start = problem.layout.flat(dict(problem.template.named_parameters()), problem.dtype, problem.device)
    for (begin, end), count in sorted(sizes):
        keys = check_keys(problem, count)
        order = torch.arange(problem.train.length, device=problem.device).expand(count, -1)
        batch = problem.train.fetch(next(iter(problem.train.batches(order, keys, [(begin, end)]))), None)
        weights = start * torch.linspace(0.9, 1.1, count, dtype=start.dtype, device=start.device)[:, None]
        with generators_left_alone():
            try:
                results = _results(make, weights, batch, keys)
                expected = _results(_lane_by_lane(problem), weights, batch, keys)
            except Exception as error:
                return f"with {end - begin} samples it raises {type(error).__name__}"
        compared = ("losses", "gradients", "outputs")
        if not all(roughly_close(problem, results[name], expected[name]) for name in compared):
            return f"with {end - begin} samples its results differ from those of the lanes alone"
    return None


def roughly_close(problem: Problem, results: Any, expected: Any) -> bool:
    """Whether two results in the run's precision agree up to rounding errors."""
    return close(results, expected, ROUGH_TOLERANCE[problem.config.precision], floor=0.0)


def _difference(problem: Problem, grouped: bool) -> str | None:
    """How folded lanes differ from the same lanes alone, or influence each other; None if they do neither."""
    keys = check_keys(problem, CHECKED_LANES)
    batch = few_samples(problem, keys)
    weights = different_weights(problem)

    def folded(weights: Tensor) -> dict[str, Any]:
        return _results(lambda w, g: Folded(problem, w, g, False, grouped), weights, batch, keys)

    alone = _results(_lane_by_lane(problem), weights, batch, keys)
    together = folded(weights)
    for name, expected in alone.items():
        if not close(together[name], expected):
            return f"the {name} differ from those of the same lanes alone, as if it mixed samples of a batch"
    for poison, poison_name in ((torch.nan, "NaN"), (1e30, "a weight of 1e30"), (-1e30, "a weight of -1e30")):
        poisoned = weights.clone()
        poisoned[1:] = poison
        results = folded(poisoned)
        for name, expected in alone.items():
            if not close(_first_lane(results[name]), _first_lane(expected)):
                return f"when folded, {poison_name} in one lane reaches the {name} of another lane"
    return None


def _results(make: MakeRunner, weights: Tensor, batch: Batch, keys: Tensor) -> dict[str, Any]:
    """The `results_of` a runner that `make` creates for a copy of the weights [L, P]."""
    weights = weights.clone()
    grads = torch.zeros_like(weights)
    return results_of(make(weights, grads), grads, batch, keys)


def _lane_by_lane(problem: Problem) -> MakeRunner:
    return partial(LaneByLane, problem, channels_last=False)


def _first_lane(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf[0], tree)
