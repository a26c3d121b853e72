"""The self-check before the first step: does folding give what the lanes give alone, and keep them apart?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from swamp_fast.data.store import Batch
from swamp_fast.data.streams import generators_left_alone, lane_keys, stream_of
from swamp_fast.engines.fold import CannotFold, Folded
from swamp_fast.engines.lanes import LaneByLane
from swamp_fast.problem import Problem
from swamp_fast.tree import tensors, tree_map

LANES = 2
MOST_SAMPLES = 8
TOLERANCE = 1e-9  # of float64 results, relative to the largest; rounding stays below 1e-12
READS = {
    *(torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.nonzero, torch.nonzero),
    *(torch.equal, torch.Tensor.equal, torch.allclose, torch.Tensor.allclose),
}


class _Reads(TorchFunctionMode):
    """Refuses to fold a forward that looks at values: lanes would share one decision."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise CannotFold(f"its forward looks at values ({func.__name__}), so lanes would share one decision")
        return func(*args, **(kwargs or {}))


def why_not_fold(problem: Problem, grouped: bool) -> str | None:
    """Why the model can't be folded; None if it can. Two lanes of different weights and samples, in float64."""
    if problem.probe.draws_elsewhere:
        return "it draws random numbers besides dropout"
    if problem.probe.changed_buffers:
        return f"its forward changes buffers: {', '.join(problem.probe.changed_buffers)}"
    if not problem.train.stacked:
        return "the batches come from a collate function of the user's, and need not stack"
    problem = _in_float64(problem)
    try:
        with generators_left_alone():
            return _difference(problem, grouped)
    except CannotFold as reason:
        return str(reason)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"folded it raises {type(error).__name__}: {str(error).splitlines()[0]}"


def _difference(problem: Problem, grouped: bool) -> str | None:
    keys = lane_keys([problem.config.seed] * LANES, [stream_of(None, lane) for lane in range(LANES)], problem.device)
    batch = _batch(problem, keys)
    weights = _different_weights(problem)
    alone = _run(problem, lambda w, g: LaneByLane(problem, w, g, False), weights, batch, keys)
    folded = _run(problem, lambda w, g: Folded(problem, w, g, False, grouped), weights, batch, keys)
    for what, expected in alone.items():
        if not _close(folded[what], expected):
            return f"folded, the {what} of the lanes differ from theirs alone: it mixes samples of a batch"
    poisoned = weights.clone()
    poisoned[1] = torch.nan
    # BatchNorm's and the like are finite in the lane that is sound.
    sound = _run(problem, lambda w, g: Folded(problem, w, g, False, grouped), poisoned, batch, keys)
    for what, expected in alone.items():
        if not _close(_lane(sound[what], 0), _lane(expected, 0)):
            return f"folded, NaN in one lane reaches the {what} of the other"
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
    with _Reads() if isinstance(way, Folded) else generators_left_alone():
        losses = way.backward(batch, keys)
    buffers = {name: buffer.clone() for name, buffer in way.buffers().items()}
    for module in way.modules:
        module.eval()
    with torch.no_grad(), _Reads() if isinstance(way, Folded) else generators_left_alone():
        outputs = way.outputs(batch.lane(0)[0])
    return {
        "losses": losses,
        "gradients": grads,
        "buffers": buffers,
        "outputs": [torch.stack(each) for each in zip(*(tensors(lane) for lane in outputs), strict=True)],
    }


def _batch(problem: Problem, keys: Tensor) -> Batch:
    data = problem.train
    size = max(1, min(MOST_SAMPLES, problem.config.batch_size, data.length // LANES))
    order = torch.arange(data.length, device=problem.device)
    order = torch.stack([order.roll(-lane * size) for lane in range(LANES)])
    handle = next(iter(data.batches(order, keys, [(0, size)])))
    batch = data.fetch(handle, None)
    return Batch(_double(batch.inputs), _double(batch.targets))


def _different_weights(problem: Problem) -> Tensor:
    weights = problem.layout.flat(dict(problem.template.named_parameters()), torch.float64, problem.device)
    noise = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = weights.abs().mean()
    return torch.stack([weights, 0.8 * weights + 0.3 * scale * noise.to(weights.device)])


def _in_float64(problem: Problem) -> Problem:
    config = dataclasses.replace(problem.config, precision="float64")
    return dataclasses.replace(problem, config=config, template=copy.deepcopy(problem.template).double())


def _double(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def _lane(tree: Any, lane: int) -> Any:
    return tree_map(lambda leaf: leaf[lane], tree)


def _close(found: Any, expected: Any) -> bool:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a.double()).all()):
            return False
        if a.numel() and float((a.double() - b.double()).abs().max()) > TOLERANCE * (1 + float(b.double().abs().max())):
            return False
    return True
