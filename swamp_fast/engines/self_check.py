"""What the engines' self-checks share: samples and weights in float64, a lane runner's results, a comparison."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.data.store import Batch
from swamp_fast.engines.trainer import LaneRunner
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.problem.arguments import Loss, cross_entropy
from swamp_fast.problem.problem import Problem

MAX_SAMPLES = 11  # per lane; a prime, so that it doesn't divide into blocks of samples by chance
MIN_SCALE = 1e-3  # of the noise on weights: for a model whose weights are all 0
TOLERANCE = 1e-9  # for float64 results, relative to the largest; rounding stays below 1e-12


def in_float64(problem: Problem) -> Problem:
    """The same problem, computed in float64."""
    return dataclasses.replace(
        problem,
        config=dataclasses.replace(problem.config, precision="float64"),
        template=copy.deepcopy(problem.template).double(),
        loss=_loss_in_float64(problem),
    )


def _loss_in_float64(problem: Problem) -> Loss:
    """The loss for outputs in float64.

    The tensors of a module, such as class weights, are converted. Those that a function keeps can't be; if they make it
    fail, it gets outputs and targets in the run's own type.
    """
    loss = problem.loss
    if loss is cross_entropy:
        return loss  # the engines recognise it
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).double()

    def in_either(outputs: Any, targets: Any) -> Tensor:
        try:
            return loss(outputs, targets)
        except RuntimeError:
            own = (tree_map(lambda leaf: _typed(leaf, problem.dtype), tree) for tree in (outputs, targets))
            return loss(*own).double()

    return in_either


def check_keys(problem: Problem, lanes: int) -> Tensor:
    """Keys [lanes, 3] for the random draws of a self-check."""
    return lane_keys([0] * lanes, [stream_of(None, i) for i in range(lanes)], problem.device)


def few_samples(problem: Problem, keys: Tensor) -> Batch:
    """A batch of at most MAX_SAMPLES samples for each key's lane, different ones for each lane, in float64."""
    data, lanes = problem.train, len(keys)
    size = max(1, min(MAX_SAMPLES, problem.config.batch_size, data.length // lanes))
    order = torch.arange(data.length, device=problem.device)
    order = torch.stack([order.roll(-lane * size) for lane in range(lanes)])
    handle = next(iter(data.batches(order, keys, [(0, size)])))
    batch = data.fetch(handle, None)
    return Batch(_double(batch.inputs), _double(batch.targets), batch.stacked)


def different_weights(problem: Problem) -> Tensor:
    """The weights of three lanes [3, P] in float64, scattered around the model's.

    No lane has exactly the model's weights. With those of one seed an input could fall exactly on a kink, such as a
    ReLU's at 0, where two correct ways to sum differ, and with those of another seed not. The outcome of a check must
    depend on the model alone, whatever its seed.
    """
    weights = problem.layout.flat(dict(problem.template.named_parameters()), torch.float64, problem.device)
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
    noise = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = weights.abs().mean().clamp_min(MIN_SCALE)
    noise = 0.3 * scale * noise.to(weights.device)
    return torch.stack([weights + noise / 3, 0.8 * weights + noise, 1.1 * weights - noise])


def results_of(runner: LaneRunner, grads: Tensor, batch: Batch, keys: Tensor) -> dict[str, Any]:
    """Losses, gradients, buffers and evaluated outputs of a runner's lanes on a batch, each with a leading lane axis.

    grads  [L, P]  the zeroed tensor to which the runner adds its gradients
    """
    for module in runner.modules:
        module.train()
    with generators_left_alone():
        losses = runner.backward(batch, keys)
    buffers = {name: buffer.clone() for name, buffer in runner.buffers().items()}
    for module in runner.modules:
        module.eval()
    with torch.no_grad(), generators_left_alone():
        outputs = runner.outputs(batch.lane(0)[0], keys)
    return {
        "losses": losses,
        "gradients": grads,
        "buffers": buffers,
        "outputs": [torch.stack(leaves) for leaves in zip(*(tensors(lane) for lane in outputs), strict=True)],
    }


def close(results: Any, expected: Any, tolerance: float = TOLERANCE, floor: float = 1.0) -> bool:
    """Whether trees of tensors are finite and agree within `tolerance` * (`floor` + each tensor's largest number)."""
    for a, b in zip(tensors(results), tensors(expected), strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a.double()).all()):
            return False
        if a.numel():
            scale = floor + float(b.double().abs().max())
            if float((a.double() - b.double()).abs().max()) > tolerance * scale:
                return False
    return True


def raised(error: Exception) -> str:
    """An error's type and the first line of its message, for a sentence that ends with it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _double(tree: Any) -> Any:
    return tree_map(lambda leaf: _typed(leaf, torch.float64), tree)


def _typed(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
