"""The execution mode "lane by lane": the user's module runs once per lane, with parameters that are views of the bank.

This is correct for every model, so the other execution modes are checked against it.

Each lane has a deep copy of the module. The copies are bound to the bank once, so no parameters are swapped at each
step. On a CPU, each lane's inputs are first copied to a new address. Otherwise a particle's bits would depend on its
place in the bank, because libraries sum in an order that depends on the address of a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.copying import copy_of
from swamp_fast.common.tree import tree_clone, tree_map
from swamp_fast.data.store import Batch
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.layout import Layout
from swamp_fast.problem.problem import Problem


class LaneByLane:
    """L copies of the model. Their parameters are views of weights [L, P], their gradients are views of grads [L, P].

    templates  the modules to copy, one per lane; None to copy the problem's module for every lane
    """

    def __init__(
        self,
        problem: Problem,
        weights: Tensor,
        grads: Tensor | None,
        channels_last: bool,
        templates: list[nn.Module] | None = None,
    ) -> None:
        self.problem, self.weights, self.channels_last = problem, weights, channels_last
        templates = templates or [problem.template] * len(weights)
        self.modules: list[nn.Module] = [copy_of(template) for template in templates]
        self.bound = [
            Bound(module, problem.layout, weights[lane], None if grads is None else grads[lane])
            for lane, module in enumerate(self.modules)
        ]

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """As LaneRunner.backward."""
        losses = [self.backward_of_lane(lane, batch, step_keys[lane : lane + 1]) for lane in range(len(self.modules))]
        return torch.stack(losses)

    def backward_of_lane(self, lane: int, batch: Batch, key: Tensor) -> Tensor:
        """Add the gradient of one lane's mean loss to its row of the gradients; returns the loss. Its key is [1, 3]."""
        bound = self.bound[lane]
        bound.hold()
        inputs, targets = self.problem.particle_batch(*batch.lane(lane), key)
        inputs = self._formatted(inputs)
        self.problem.seeded(key)
        with DropoutStream(key), self.problem.autocast():
            loss = self.problem.losses(self.problem.forward(self.modules[lane], inputs), targets).mean()
        self.problem.backward(loss, bound.leaves)
        bound.take_back()
        return loss.detach()

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """As LaneRunner.outputs."""
        outputs = []
        for lane, module in enumerate(self.modules):
            lane_inputs = self._formatted(tree_clone(inputs))
            key, bound = keys[lane : lane + 1], self.bound[lane]
            bound.hold()
            self.problem.seeded(key)
            with DropoutStream(key), self.problem.autocast():
                outputs.append(self.problem.forward(module, lane_inputs))
            bound.take_back()
        return outputs

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """As LaneRunner.set_buffers."""
        for bound in self.bound:  # what is computed from the weights outside of a forward pass needs them too
            bound.hold()
        write_buffers(self.modules, buffers)

    def buffers(self) -> dict[str, Tensor]:
        """As LaneRunner.buffers."""
        return read_buffers(self.modules)

    def _formatted(self, inputs: Any) -> Any:
        if self.problem.device.type == "cpu":
            return tree_map(partial(_at_a_new_address, last=self.channels_last), inputs)
        return channels_last(inputs) if self.channels_last else inputs


def write_buffers(modules: list[nn.Module], buffers: dict[str, Tensor]) -> None:
    """Write buffers [L, ...] into L modules."""
    for lane, module in enumerate(modules):
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name][lane])


def read_buffers(modules: list[nn.Module]) -> dict[str, Tensor]:
    """The buffers [L, ...] of L modules."""
    by_module = [dict(module.named_buffers()) for module in modules]
    return {name: torch.stack([buffers[name].detach() for buffers in by_module]) for name in by_module[0]}


def _at_a_new_address(leaf: Any, last: bool) -> Any:
    """A copy of a lane's inputs in new memory.

    CPU libraries sum in an order that depends on addresses and strides. In the bank's batch, a lane's inputs follow
    those of other lanes, so without the copy a particle's bits would depend on its place in the bank.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone(memory_format=torch.channels_last if last and leaf.dim() == 4 else torch.contiguous_format)


class Bound:
    """Binds a module to one lane.

    The module's trained parameters become views of a vector [P], and their gradients become views of grads [P].
    """

    def __init__(self, module: nn.Module, layout: Layout, vector: Tensor, grads: Tensor | None) -> None:
        views = layout.views(vector)
        grad_views = {} if grads is None else layout.views(grads)
        named = [(name, parameter) for name, parameter in module.named_parameters() if name in views]
        self.parameters = [(parameter, views[name], grad_views.get(name)) for name, parameter in named]
        self.leaves: list[Tensor] = [parameter for _, parameter in named]

    def hold(self) -> None:
        """Make the parameters and gradients views of the lane, even if an earlier forward has replaced them."""
        for parameter, view, grad in self.parameters:
            parameter.data, parameter.grad = view, grad

    def take_back(self) -> None:
        """Where the forward has replaced a view (weight.data = … or zero_grad()), copy the new values into the view."""
        for parameter, view, grad in self.parameters:
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.data)
            if grad is not None and parameter.grad is not grad:
                grad.zero_() if parameter.grad is None else grad.copy_(parameter.grad)


def channels_last(inputs: Any) -> Any:
    """The inputs with every tensor [B, C, H, W] in channels-last memory format; all else is unchanged."""
    return tree_map(
        lambda leaf: (
            leaf.contiguous(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf
        ),
        inputs,
    )
