"""Folding: the batches of all lanes form one batch [L*B, ...], so that one call of an operation serves all lanes.

Operations without parameters work unchanged in the user's own forward. Modules with parameters are replaced by stacked
modules (stacked.py), which split the batch into [L, B, ...]. Folding is wrong for models that mix samples of a batch,
so check.py first compares folded lanes with lanes that run alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.copying import copy_of
from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.data.store import Batch
from swamp_fast.engines.eager.stacked import STACKED, CannotFold
from swamp_fast.engines.lane_by_lane import channels_last as to_channels_last
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.layout import Layout
from swamp_fast.problem.problem import Problem

# Autograd warns that the stacked parameters are not dense. This is intended: they are columns of a bank, whose rows
# have a stride of P.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class Folded:
    """Runs all lanes by one model of stacked modules, with weights [L, P] and gradients in grads [L, P].

    grouped  whether convolutions and batch norms run as one call on [B, L*C, ...] instead of one call per lane
    """

    def __init__(
        self, problem: Problem, weights: Tensor, grads: Tensor | None, channels_last: bool, grouped: bool
    ) -> None:
        self.problem, self.weights, self.channels_last, self.lanes = problem, weights, channels_last, len(weights)
        self.module = fold(problem.template, problem.layout, weights, grads, grouped)
        self.modules = [self.module]
        self.leaves: list[Tensor] = [leaf for leaf in self.module.parameters() if leaf.requires_grad]

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """As LaneRunner.backward."""
        inputs, targets = self._batch(batch, step_keys)
        with DropoutStream(step_keys, _rows(inputs)), self.problem.autocast():
            losses = self._losses(self.problem.forward(self.module, inputs), targets)
        self.problem.backward(losses.sum(), self.leaves)
        return losses.detach()

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """As LaneRunner.outputs."""
        folded = tree_map(
            lambda leaf: leaf.repeat(self.lanes, *(1,) * (leaf.dim() - 1)) if isinstance(leaf, Tensor) else leaf,
            inputs,
        )
        with DropoutStream(keys, _rows(folded)), self.problem.autocast():
            outputs = self.problem.forward(self.module, self._formatted(folded))
        return [self._lane(outputs, lane) for lane in range(self.lanes)]

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """As LaneRunner.set_buffers. A buffer that the folded lanes share must have the same value in every lane."""
        for name, buffer in self.module.named_buffers():
            if name in buffers:
                buffer.copy_(
                    buffers[name].view_as(buffer) if buffer.numel() == buffers[name].numel() else buffers[name][0]
                )

    def buffers(self) -> dict[str, Tensor]:
        """As LaneRunner.buffers."""
        stacked = dict(self.module.named_buffers())
        return {
            name: stacked[name].view(self.lanes, *buffer.shape)
            if stacked[name].numel() == self.lanes * buffer.numel()
            else stacked[name].expand(self.lanes, *buffer.shape)
            for name, buffer in self.problem.template.named_buffers()
        }

    def _batch(self, batch: Batch, step_keys: Tensor) -> tuple[Any, list[Any]]:
        """The inputs [L*B, ...] of all lanes, and the targets of each lane."""
        lanes = [batch.lane(lane) for lane in range(self.lanes)]
        if self.problem.batches_as_stored:
            inputs = tree_map(lambda leaf: leaf.flatten(0, 1), batch.inputs)
        else:
            keys = step_keys.split(1)
            lanes = [self.problem.particle_batch(*pair, key) for pair, key in zip(lanes, keys, strict=True)]
            inputs = tree_map(lambda *leaves: torch.cat(leaves), *(inputs for inputs, _ in lanes))
        return self._formatted(inputs), [targets for _, targets in lanes]

    def _formatted(self, inputs: Any) -> Any:
        return to_channels_last(inputs) if self.channels_last else inputs

    def _lane(self, outputs: Any, lane: int) -> Any:
        return tree_map(
            lambda leaf: leaf.unflatten(0, (self.lanes, -1))[lane] if isinstance(leaf, Tensor) else leaf,
            outputs,
        )

    def _losses(self, outputs: Any, targets: list[Any]) -> Tensor:
        lanes = [
            self.problem.losses(self._lane(outputs, lane), lane_targets).mean()
            for lane, lane_targets in enumerate(targets)
        ]
        return torch.stack(lanes)


def _rows(inputs: Any) -> int | None:
    """The length L*B of the inputs' batch axis; None if no input has a batch axis."""
    return next((len(leaf) for leaf in tensors(inputs) if leaf.dim()), None)


def fold(template: nn.Module, layout: Layout, weights: Tensor, grads: Tensor | None, grouped: bool) -> nn.Module:
    """A copy of the model in which stacked modules replace those with parameters.

    The stacked parameters are views of weights [L, P]. Raises CannotFold if a module has no stacked form.
    """
    model = copy_of(template)
    leaves = _Leaves(model, layout, weights, grads)
    replacements: dict[nn.Module, nn.Module] = {}

    def replaced(path: str, module: nn.Module) -> nn.Module:
        make = STACKED.get(type(module))
        _refuse(path or "the model", module, has_stacked_form=make is not None)
        if make is not None:
            return make(module, len(weights), grouped, leaves.of)
        for name, child in module._modules.items():  # named_children would list a shared module only once
            if child is not None:
                if child not in replacements:
                    replacements[child] = replaced(f"{path}.{name}" if path else name, child)
                setattr(module, name, replacements[child])
        return module

    return replaced("", model)


class _Leaves:
    """Makes the stacked parameters [L, *shape] of a model: views of weights [L, P], with gradients in grads [L, P]."""

    def __init__(self, model: nn.Module, layout: Layout, weights: Tensor, grads: Tensor | None) -> None:
        self.lanes = len(weights)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.views = layout.views(weights)
        self.grad_views = {} if grads is None else layout.views(grads)
        self.made: dict[int, Tensor] = {}

    def of(self, parameter: nn.Parameter | None) -> Tensor | None:
        """The stacked parameter for a parameter of the model. A shared parameter gives the same tensor every time."""
        if parameter is None:
            return None
        if id(parameter) not in self.made:
            name = self.names[id(parameter)]
            if name in self.views:
                leaf = nn.Parameter(self.views[name])
                leaf.grad = self.grad_views.get(name)
                self.made[id(parameter)] = leaf
            else:  # a frozen parameter, which all lanes share
                self.made[id(parameter)] = parameter.detach().expand(self.lanes, *parameter.shape)
        return self.made[id(parameter)]


def _refuse(place: str, module: nn.Module, has_stacked_form: bool) -> None:
    """Raise CannotFold for a module that can be neither replaced by a stacked module nor kept as it is."""
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        raise CannotFold(f"{place} has hooks")
    if has_stacked_form:
        return
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    if parameters:
        raise CannotFold(f"{place} ({type(module).__name__}) has parameters of its own: {', '.join(parameters)}")
    if isinstance(module, nn.modules.batchnorm._NormBase):
        raise CannotFold(f"{place} ({type(module).__name__}) has no stacked form")
