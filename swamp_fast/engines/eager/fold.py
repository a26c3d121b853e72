"""Folding: lanes side by side in the batch axis, [L*B, ...], so that one call of an operation serves all of them.

Every parameter-free operation of the user's own forward works unchanged; modules with parameters are replaced by
stacked ones that see [L, B, ...]. Wrong for models that mix the batch axis, so engines/check.py proves it first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.data.store import Batch
from swamp_fast.engines.eager.lane_by_lane import channels_last as to_channels_last
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.layout import Layout
from swamp_fast.problem.problem import Problem

# The leaves are rows of a bank, apart by P: autograd need not tell every user that they aren't dense.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class CannotFold(Exception):
    """Why a model can't be folded, with the place in the model."""


class Folded:
    """One model whose modules are stacked, with weights [L, P] and their gradients of grads [L, P].

    grouped  convolutions and batch norms run as one call over [B, L*C, ...], else as a call a lane
    """

    def __init__(
        self, problem: Problem, weights: Tensor, grads: Tensor | None, channels_last: bool, grouped: bool
    ) -> None:
        self.problem, self.weights, self.channels_last, self.lanes = problem, weights, channels_last, len(weights)
        self.module = fold(problem.template, problem.layout, weights, grads, grouped)
        self.modules = [self.module]

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """As LaneByLane.backward."""
        inputs = self._transformed(batch, step_keys)
        with DropoutStream(step_keys, _rows(inputs)), self.problem.autocast():
            losses = self._losses(self.problem.forward(self.module, inputs), batch.targets)
        losses.sum().backward()
        return losses.detach()

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """As LaneByLane.outputs."""
        folded = tree_map(
            lambda leaf: leaf.repeat(self.lanes, *(1,) * (leaf.dim() - 1)) if isinstance(leaf, Tensor) else leaf,
            inputs,
        )
        with DropoutStream(keys, _rows(folded)), self.problem.autocast():
            outputs = self.problem.forward(self.module, self._formatted(folded))
        return [self._lane(outputs, lane) for lane in range(self.lanes)]

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """As LaneByLane.set_buffers; a buffer that all lanes share must be the same in each."""
        for name, buffer in self.module.named_buffers():
            if name in buffers:
                buffer.copy_(
                    buffers[name].view_as(buffer) if buffer.numel() == buffers[name].numel() else buffers[name][0]
                )

    def buffers(self) -> dict[str, Tensor]:
        """As LaneByLane.buffers."""
        stacked = dict(self.module.named_buffers())
        return {
            name: stacked[name].view(self.lanes, *buffer.shape)
            if stacked[name].numel() == self.lanes * buffer.numel()
            else stacked[name].expand(self.lanes, *buffer.shape)
            for name, buffer in self.problem.template.named_buffers()
        }

    def _transformed(self, batch: Batch, step_keys: Tensor) -> Any:
        if self.problem.transform is None:
            return self._formatted(tree_map(lambda leaf: leaf.flatten(0, 1), batch.inputs))
        each = [self.problem.transformed(batch.lane(lane)[0], step_keys[lane : lane + 1]) for lane in range(self.lanes)]
        return self._formatted(tree_map(lambda *leaves: torch.cat(leaves), *each))

    def _formatted(self, inputs: Any) -> Any:
        return to_channels_last(inputs) if self.channels_last else inputs

    def _lane(self, outputs: Any, lane: int) -> Any:
        return tree_map(
            lambda leaf: leaf.unflatten(0, (self.lanes, -1))[lane] if isinstance(leaf, Tensor) else leaf,
            outputs,
        )

    def _losses(self, outputs: Any, targets: Any) -> Tensor:
        lanes = [
            self.problem.losses(self._lane(outputs, lane), tree_map(lambda leaf, i=lane: leaf[i], targets)).mean()
            for lane in range(self.lanes)
        ]
        return torch.stack(lanes)


def _rows(inputs: Any) -> int | None:
    """L times the samples of a lane."""
    return next((len(leaf) for leaf in tensors(inputs) if leaf.dim()), None)


def fold(template: nn.Module, layout: Layout, weights: Tensor, grads: Tensor | None, grouped: bool) -> nn.Module:
    """A copy of the model with stacked modules on views of weights [L, P]. Raises CannotFold."""
    model = copy.deepcopy(template)
    lanes = len(weights)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    views = layout.views(weights)
    grad_views = {} if grads is None else layout.views(grads)
    stacked: dict[int, Tensor] = {}
    done: dict[nn.Module, nn.Module] = {}

    def stack(parameter: nn.Parameter | None) -> Tensor | None:
        """The leaf [L, *shape] for a parameter, one for all places that share it."""
        if parameter is None:
            return None
        if id(parameter) not in stacked:
            name = names[id(parameter)]
            if name in views:
                leaf = nn.Parameter(views[name])
                leaf.grad = grad_views.get(name)
                stacked[id(parameter)] = leaf
            else:  # frozen
                stacked[id(parameter)] = parameter.detach().expand(lanes, *parameter.shape)
        return stacked[id(parameter)]

    def replaced(path: str, module: nn.Module) -> nn.Module:
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks):
            raise CannotFold(f"{path or 'the model'} has hooks")
        make = _STACKED.get(type(module))
        if make is not None:
            return make(module, lanes, grouped, stack)
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            raise CannotFold(
                f"{path or 'the model'} ({type(module).__name__}) has parameters of its own: {', '.join(own)}"
            )
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise CannotFold(f"{path} ({type(module).__name__}) has no stacked form")
        for name, child in module._modules.items():  # named_children would leave out one that stands at two places
            if child is not None:
                if child not in done:
                    done[child] = replaced(f"{path}.{name}" if path else name, child)
                setattr(module, name, done[child])
        return module

    return replaced("", model)


Stack = Callable[[nn.Parameter | None], Tensor | None]


class _Stacked(nn.Module):
    """A module with a leading lane axis in its parameters; weight and bias are leaves [L, ...] or None."""

    def __init__(self, module: Any, lanes: int, grouped: bool, stack: Stack) -> None:
        super().__init__()
        self.lanes, self.grouped = lanes, grouped
        self.weight, self.bias = stack(module.weight), stack(getattr(module, "bias", None))
        self.plain = [module]  # in a list: not a child

    def __getattr__(self, name: str) -> Any:
        """What the user's forward asks of the module it was (in_features and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:
                raise
            return getattr(self.plain[0], name)

    def split(self, x: Tensor) -> Tensor:
        """[L*B, ...] -> [L, B, ...]."""
        return x.unflatten(0, (self.lanes, -1))

    def affine(self, x: Tensor, axes: int) -> Tensor:
        """[L, B, ...] times weight plus bias, whose `axes` axes stand last."""
        if self.weight is not None:
            x = x * self._spread(self.weight, x.dim(), axes)
        if self.bias is not None:
            x = x + self._spread(self.bias, x.dim(), axes)
        return x

    def _spread(self, parameter: Tensor, dims: int, axes: int) -> Tensor:
        """[L, *shape] with ones between, so that `shape` stands at the last `axes` axes of `dims`."""
        shape = parameter.shape[1:]
        ones = (1,) * (dims - 1 - axes)
        return parameter.reshape(self.lanes, *ones, *shape, *(1,) * (axes - len(shape)))


class _StackedLinear(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        rows = self.split(x).flatten(1, -2)
        if self.bias is None:
            out = torch.bmm(rows, self.weight.transpose(1, 2))
        else:
            out = torch.baddbmm(self.bias[:, None], rows, self.weight.transpose(1, 2))
        return out.view(*x.shape[:-1], -1)


class _StackedConv(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        module: _ConvNd = self.plain[0]
        assert self.weight is not None
        if not self.grouped:
            biases = self.bias.unbind() if self.bias is not None else [None] * self.lanes
            lanes = zip(self.split(x).unbind(), self.weight.unbind(), biases, strict=True)
            return torch.cat([module._conv_forward(each, weight, bias) for each, weight, bias in lanes])
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        wide = self.split(x).transpose(0, 1).flatten(1, 2)  # [B, L*C, ...]
        if module.padding_mode != "zeros":
            wide = F.pad(wide, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding: Any = 0
        else:
            padding = module.padding
        out = conv(
            wide,
            self.weight.flatten(0, 1),
            self.bias.flatten() if self.bias is not None else None,
            module.stride,
            padding,
            module.dilation,
            module.groups * self.lanes,
        )
        return out.unflatten(1, (self.lanes, -1)).transpose(0, 1).flatten(0, 1)


class _StackedBatchNorm(_BatchNorm):
    """Running statistics [L*C]; the attributes are those of nn.BatchNorm, so re-estimation needs nothing else."""

    def __init__(self, module: _BatchNorm, lanes: int, grouped: bool, stack: Stack) -> None:
        super().__init__(
            lanes * module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            affine=False,
            track_running_stats=module.track_running_stats,
        )
        reference = module.running_mean if module.running_mean is not None else module.weight
        if reference is not None:
            self.to(reference.device, reference.dtype)
        self.lanes, self.grouped, self.kind = lanes, grouped, type(module)
        self.stacked_weight, self.stacked_bias = stack(module.weight), stack(module.bias)
        self.train(module.training)

    def _check_input_dim(self, input: Tensor) -> None:
        self.kind._check_input_dim(self, input)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        weight, bias = self.stacked_weight, self.stacked_bias
        use_batch = self.training or self.running_mean is None
        mean, var = self.running_mean, self.running_var
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        split = x.unflatten(0, (self.lanes, -1))
        if self.grouped:
            wide = split.transpose(0, 1).flatten(1, 2)
            weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
            out = F.batch_norm(wide, mean, var, weight, bias, use_batch, momentum or 0.0, self.eps)
            return out.unflatten(1, (self.lanes, -1)).transpose(0, 1).flatten(0, 1)
        nothing = [None] * self.lanes
        parts = zip(
            split.unbind(),
            mean.view(self.lanes, -1).unbind() if mean is not None else nothing,
            var.view(self.lanes, -1).unbind() if var is not None else nothing,
            weight.unbind() if weight is not None else nothing,
            bias.unbind() if bias is not None else nothing,
            strict=True,
        )
        return torch.cat([F.batch_norm(*part, use_batch, momentum or 0.0, self.eps) for part in parts])


class _StackedLayerNorm(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        module: nn.LayerNorm = self.plain[0]
        normal = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        return self.affine(self.split(normal), len(module.normalized_shape)).flatten(0, 1)


class _StackedGroupNorm(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        module: nn.GroupNorm = self.plain[0]
        normal = F.group_norm(x, module.num_groups, None, None, module.eps)
        return self.affine(self.split(normal), x.dim() - 1).flatten(0, 1)


class _StackedPReLU(_Stacked):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        slope = self._spread(self.weight, x.dim() + 1, max(x.dim() - 1, 1))
        split = self.split(x)
        return torch.where(split > 0, split, split * slope).flatten(0, 1)


class _StackedEmbedding(_Stacked):
    def forward(self, ids: Tensor) -> Tensor:
        module: nn.Embedding = self.plain[0]
        assert self.weight is not None
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise CannotFold("an Embedding with max_norm, scale_grad_by_freq or sparse gradients")
        lanes = zip(self.split(ids).unbind(), self.weight.unbind(), strict=True)
        return torch.cat([F.embedding(each, weight, module.padding_idx) for each, weight in lanes])


_STACKED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: _StackedLinear,
    nn.Conv1d: _StackedConv,
    nn.Conv2d: _StackedConv,
    nn.Conv3d: _StackedConv,
    nn.BatchNorm1d: _StackedBatchNorm,
    nn.BatchNorm2d: _StackedBatchNorm,
    nn.BatchNorm3d: _StackedBatchNorm,
    nn.LayerNorm: _StackedLayerNorm,
    nn.GroupNorm: _StackedGroupNorm,
    nn.PReLU: _StackedPReLU,
    nn.Embedding: _StackedEmbedding,
}
