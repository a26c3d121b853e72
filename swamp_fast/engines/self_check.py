"""Functions for the engines' self-checks: float64 samples and weights, the results of a lane runner, a comparison."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.copying import copy_of
from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.data.store import Batch
from swamp_fast.engines.trainer import LaneRunner
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.problem.arguments import Loss, cross_entropy
from swamp_fast.problem.problem import Problem

MAX_SAMPLES = 11  # per lane; a prime, so that no kernel's block of samples divides it evenly
MIN_SCALE = 1e-3  # the smallest scale of the noise added to weights, for models whose weights are all 0
TOLERANCE = 1e-9  # for float64 results, relative to the largest number; rounding errors stay below 1e-12


def in_float64(problem: Problem) -> Problem:
    """The same problem with precision float64, and float64 copies of the model and of the loss."""
    return dataclasses.replace(
        problem,
        config=dataclasses.replace(problem.config, precision="float64"),
        template=copy_of(problem.template).double(),
        loss=_loss_in_float64(problem),
        transform=problem.transform and dataclasses.replace(problem.transform, dtype=torch.float64),
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
        loss = copy_of(loss).double()

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
    """A float64 batch with at most MAX_SAMPLES samples per lane of `keys` [L, 3]; lanes have different samples."""
    data, lanes = problem.train, len(keys)
    size = max(1, min(MAX_SAMPLES, problem.config.batch_size, data.length // lanes))
    order = torch.arange(data.length, device=problem.device)
    order = torch.stack([order.roll(-lane * size) for lane in range(lanes)])
    handle = next(iter(data.batches(order, keys, [(0, size)])))
    batch = data.fetch(handle, None)
    return Batch(_double(batch.inputs), _double(batch.targets), batch.stacked)


def different_weights(problem: Problem) -> Tensor:
    """The float64 weights of three lanes [3, P]: the model's weights, scaled and with added noise.

    No lane has exactly the model's weights. With these, a ReLU's input could be exactly 0 for some seeds only. There,
    two correct orders of summation can give different gradients. The outcome of a check must depend on the model, not
    on its seed.
    """
    weights = problem.layout.flat(dict(problem.template.named_parameters()), torch.float64, problem.device)
    weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
    noise = torch.randn(len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = weights.abs().mean().clamp_min(MIN_SCALE)
    noise = 0.3 * scale * noise.to(weights.device)
    return torch.stack([weights + noise / 3, 0.8 * weights + noise, 1.1 * weights - noise])


def results_of(runner: LaneRunner, grads: Tensor, batch: Batch, keys: Tensor) -> dict[str, Any]:
    """Run a forward and backward pass on a batch, then an evaluation; returns all results in a dict.

    The results are "losses", "gradients", "buffers" and "outputs", each with a leading lane axis.

    grads  [L, P]  zeros, to which the runner adds its gradients
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
    """Whether the tensors of `results` are finite and differ from those of `expected` by no more than rounding.

    A tensor may differ by `tolerance` * (`floor` + the largest absolute number of the expected tensor).
    """
    for a, b in zip(tensors(results), tensors(expected), strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a.double()).all()):
            return False
        if a.numel():
            scale = floor + float(b.double().abs().max())
            if float((a.double() - b.double()).abs().max()) > tolerance * scale:
                return False
    return True


def _double(tree: Any) -> Any:
    return tree_map(lambda leaf: _typed(leaf, torch.float64), tree)


def _typed(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
