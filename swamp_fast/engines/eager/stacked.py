"""Stacked modules: their parameters have a leading lane axis, and they run all lanes on a folded batch [L*B, ...]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class CannotFold(Exception):
    """Raised if a model can't be folded; the message names the module and the reason."""


# Maps a module's parameter [*shape] to the stacked parameter [L, *shape] of all lanes.
Stack = Callable[[nn.Parameter | None], Tensor | None]


class _Stacked(nn.Module):
    """The base class of stacked modules. Weight and bias are stacked parameters [L, ...] or None."""

    def __init__(self, module: Any, lanes: int, grouped: bool, stack: Stack) -> None:
        super().__init__()
        self.lanes, self.grouped = lanes, grouped
        self.weight, self.bias = stack(module.weight), stack(getattr(module, "bias", None))
        self.plain = [module]  # in a list, so that torch does not register it as a child

    def __getattr__(self, name: str) -> Any:
        """Attributes that the stacked module lacks, such as in_features, come from the original module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:
                raise
            return getattr(self.plain[0], name)

    def split(self, x: Tensor) -> Tensor:
        """Reshape x [L*B, ...] to [L, B, ...]."""
        return _lanes_of_batch(x, self.lanes)

    def affine(self, x: Tensor, axes: int) -> Tensor:
        """Returns x [L, B, ...] times weight plus bias; both apply to the last `axes` axes of x."""
        if self.weight is not None:
            x = x * self._spread(self.weight, x.dim(), axes)
        if self.bias is not None:
            x = x + self._spread(self.bias, x.dim(), axes)
        return x

    def _spread(self, parameter: Tensor, dims: int, axes: int) -> Tensor:
        """Reshape a parameter [L, *shape] for broadcasting to [L, 1, ..., *shape, 1, ...].

        The result has `dims` axes, and `shape` begins at the axis -`axes`.
        """
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
            return torch.cat([module._conv_forward(inputs, weight, bias) for inputs, weight, bias in lanes])
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        wide = _lanes_to_channels(x, self.lanes)
        if module.padding_mode != "zeros":
            wide = F.pad(wide, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding: Any = 0
        else:
            padding = module.padding
        out: Tensor = conv(
            wide,
            self.weight.flatten(0, 1),
            self.bias.flatten() if self.bias is not None else None,
            module.stride,
            padding,
            module.dilation,
            module.groups * self.lanes,
        )
        return _lanes_from_channels(out, self.lanes)


class _StackedBatchNorm(_BatchNorm):
    """The stacked BatchNorm, with running statistics [L*C].

    It has the attributes of nn.BatchNorm, so the code that re-estimates the statistics can treat it like one.
    """

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
        for name, buffer in module.named_buffers():
            getattr(self, name).copy_(buffer.repeat(lanes) if buffer.dim() else buffer)
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
        if self.grouped:
            wide = _lanes_to_channels(x, self.lanes)
            weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
            out: Tensor = F.batch_norm(wide, mean, var, weight, bias, use_batch, momentum or 0.0, self.eps)
            return _lanes_from_channels(out, self.lanes)
        nothing = [None] * self.lanes
        parts = zip(
            _lanes_of_batch(x, self.lanes).unbind(),
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
            raise CannotFold("it has an Embedding with max_norm, scale_grad_by_freq or sparse gradients")
        lanes = zip(self.split(ids).unbind(), self.weight.unbind(), strict=True)
        return torch.cat([F.embedding(lane_ids, weight, module.padding_idx) for lane_ids, weight in lanes])


def _lanes_of_batch(x: Tensor, lanes: int) -> Tensor:
    """Reshape x [L*B, ...] to [L, B, ...]."""
    split: Tensor = x.unflatten(0, (lanes, -1))
    return split


def _lanes_to_channels(x: Tensor, lanes: int) -> Tensor:
    """Move the lanes of x [L*B, C, ...] to the channel axis: [B, L*C, ...]."""
    return _lanes_of_batch(x, lanes).transpose(0, 1).flatten(1, 2)


def _lanes_from_channels(x: Tensor, lanes: int) -> Tensor:
    """Move the lanes of x [B, L*C, ...] to the batch axis: [L*B, C, ...]."""
    folded: Tensor = x.unflatten(1, (lanes, -1)).transpose(0, 1).flatten(0, 1)
    return folded


STACKED: dict[type[nn.Module], Callable[..., nn.Module]] = {
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
