"""The self-check before the first step: does folding give what the lanes give alone, and keep them apart?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.data.store import Batch
from swamp_fast.engines.eager.fold import CannotFold, Folded
from swamp_fast.engines.eager.lane_by_lane import LaneByLane
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.problem.problem import Problem

LANES = 3
MOST_SAMPLES = 11  # a prime, so that nothing that goes by blocks of samples fits by chance
GROSS = {"float64": 1e-6, "float32": 2e-2, "bfloat16": 0.2}  # of a step in the run's own precision
LEAST_SCALE = 1e-3  # of a model whose weights are all 0
TOLERANCE = 1e-9  # of float64 results, relative to the largest; rounding stays below 1e-12


def why_not_fold(problem: Problem, grouped: bool) -> str | None:
    """Why the model can't be folded; None if it can. Two lanes of different weights and samples, in float64."""
    if problem.probe.draws_elsewhere:
        return "it draws random numbers besides dropout (reproducible on one kind of device only)"
    if problem.probe.keeps_state:
        return "its forward changes plain attributes of the model, or has a generator of its own"
    if problem.probe.reads_values is not None:
        return f"its forward looks at values ({problem.probe.reads_values}), so lanes would share one decision"
    if problem.probe.changed:
        return f"its forward changes buffers or weights: {', '.join(problem.probe.changed)}"
    if not problem.train.stacked:
        return "the batches come from a collate function of the user's, and need not stack"
    problem = in_float64(problem)
    try:
        with generators_left_alone():
            return _difference(problem, grouped)
    except CannotFold as reason:
        return str(reason)
    except Exception as error:
        return f"folded it raises {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def why_not_channels_last(problem: Problem) -> str | None:
    """Why pictures can't have their channels last; None if they can. A few samples of one lane, in float64."""
    problem = in_float64(problem)
    keys = lane_keys([problem.config.seed], [stream_of(None, 0)], problem.device)
    weights = different_weights(problem)[:1]
    found = []
    with generators_left_alone():
        batch = few_samples(problem, keys)
        for last in (False, True):
            try:
                found.append(_run(problem, partial(LaneByLane, problem, channels_last=last), weights, batch, keys))
            except Exception as error:  # of a view that channels last doesn't have, for one
                where = f"channels {'last' if last else 'first'}, in float64, in which that is checked,"
                return (
                    f"{where} it raises {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
                )
    first, after = found
    for what, expected in first.items():
        if not close(after[what], expected):
            return f"channels last, its {what} differ from those with channels first"
    return None


def _difference(problem: Problem, grouped: bool) -> str | None:
    keys = lane_keys([problem.config.seed] * LANES, [stream_of(None, lane) for lane in range(LANES)], problem.device)
    batch = few_samples(problem, keys)
    weights = different_weights(problem)
    alone = _run(problem, lambda w, g: LaneByLane(problem, w, g, False), weights, batch, keys)
    folded = _run(problem, lambda w, g: Folded(problem, w, g, False, grouped), weights, batch, keys)
    for what, expected in alone.items():
        if not close(folded[what], expected):
            return f"folded, the {what} of the lanes differ from theirs alone: it mixes samples of a batch"
    for poison, name in ((torch.nan, "NaN"), (1e30, "a weight of 1e30"), (-1e30, "a weight of -1e30")):
        poisoned = weights.clone()
        poisoned[1:] = poison
        sound = _run(problem, lambda w, g: Folded(problem, w, g, False, grouped), poisoned, batch, keys)
        for what, expected in alone.items():
            if not close(_lane(sound[what], 0), _lane(expected, 0)):
                return f"folded, {name} in one lane reaches the {what} of another"
    return None


def differs_at_full_size(problem: Problem, make: Callable[[Tensor, Tensor], Any], lanes: int) -> str | None:
    """Where a way to run the lanes, proven on few samples, differs at the run's own sizes; None if nowhere.

    A forward may branch on the size of its batch, which folding changes. In the run's own precision, so only gross
    differences count.
    """
    last = problem.bounds[-1]
    sizes = {(problem.bounds[0], lanes), (last, lanes), (problem.bounds[0], lanes + 1)}
    start = problem.layout.flat(dict(problem.template.named_parameters()), problem.dtype, problem.device)
    for (begin, end), count in sorted(sizes):
        keys = lane_keys([problem.config.seed] * count, [stream_of(None, i) for i in range(count)], problem.device)
        order = torch.arange(problem.train.length, device=problem.device).expand(count, -1)
        batch = problem.train.fetch(next(iter(problem.train.batches(order, keys, [(begin, end)]))), None)
        weights = start * torch.linspace(0.9, 1.1, count, dtype=start.dtype, device=start.device)[:, None]
        with generators_left_alone():
            try:
                found = _run(problem, make, weights, batch, keys)
                expected = _run(problem, lambda w, g: LaneByLane(problem, w, g, False), weights, batch, keys)
            except Exception as error:
                return f"with {end - begin} samples it raises {type(error).__name__}"
        if not all(roughly(problem, found[what], expected[what]) for what in ("losses", "gradients", "outputs")):
            return f"with {end - begin} samples its results differ from those of the lanes alone"
    return None


def _run(
    problem: Problem, make: Callable[[Tensor, Tensor], Any], weights: Tensor, batch: Batch, keys: Tensor
) -> dict[str, Any]:
    """Losses, gradients, buffers and evaluated outputs of the lanes, each with a leading lane axis."""
    weights = weights.clone()
    grads = torch.zeros_like(weights)
    way = make(weights, grads)
    for module in way.modules:
        module.train()
    with generators_left_alone():
        losses = way.backward(batch, keys)
    buffers = {name: buffer.clone() for name, buffer in way.buffers().items()}
    for module in way.modules:
        module.eval()
    with torch.no_grad(), generators_left_alone():
        outputs = way.outputs(batch.lane(0)[0], keys)
    return {
        "losses": losses,
        "gradients": grads,
        "buffers": buffers,
        "outputs": [torch.stack(each) for each in zip(*(tensors(lane) for lane in outputs), strict=True)],
    }


def few_samples(problem: Problem, keys: Tensor) -> Batch:
    """A batch of few samples for as many lanes as there are keys, other ones for each, in float64."""
    data, lanes = problem.train, len(keys)
    size = max(1, min(MOST_SAMPLES, problem.config.batch_size, data.length // lanes))
    order = torch.arange(data.length, device=problem.device)
    order = torch.stack([order.roll(-lane * size) for lane in range(lanes)])
    handle = next(iter(data.batches(order, keys, [(0, size)])))
    batch = data.fetch(handle, None)
    return Batch(_double(batch.inputs), _double(batch.targets), batch.stacked)


def different_weights(problem: Problem) -> Tensor:
    """Three lanes' weights [3, P] in float64, about the model's own.

    None are the very ones: those of one seed may meet a kink exactly, as a ReLU at 0, where two right ways to sum
    differ, and those of another seed not. What a check finds must be the model's, whatever its seed.
    """
    weights = problem.layout.flat(dict(problem.template.named_parameters()), torch.float64, problem.device)
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
    noise = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = weights.abs().mean().clamp_min(LEAST_SCALE)
    noise = 0.3 * scale * noise.to(weights.device)
    return torch.stack([weights + noise / 3, 0.8 * weights + noise, 1.1 * weights - noise])


def in_float64(problem: Problem) -> Problem:
    """The same problem, computed in float64."""
    config = dataclasses.replace(problem.config, precision="float64")
    return dataclasses.replace(problem, config=config, template=copy.deepcopy(problem.template).double())


def _double(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def _lane(tree: Any, lane: int) -> Any:
    return tree_map(lambda leaf: leaf[lane], tree)


def roughly(problem: Problem, found: Any, expected: Any) -> bool:
    """Whether results in the run's own precision agree but for rounding."""
    return close(found, expected, GROSS[problem.config.precision], floor=0.0)


def close(found: Any, expected: Any, tolerance: float = TOLERANCE, floor: float = 1.0) -> bool:
    """Whether trees of tensors agree, finite, relative to each tensor's largest number plus `floor`."""
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a.double()).all()):
            return False
        if a.numel():
            scale = floor + float(b.double().abs().max())
            if float((a.double() - b.double()).abs().max()) > tolerance * scale:
                return False
    return True
