"""Runs the forward pass and the backward pass of L lanes through a Program.

Each operation takes one or two launches. Convolutions, norms and pools use this project's kernels. Elementwise
operations, and those that only move data, use PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamp_fast import ops
from swamp_fast.engines.fused.cuda.halo import Prologue, Statistics
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.cuda.program import Program, picture_first
from swamp_fast.engines.fused.plan import (
    Add,
    Concatenate,
    Convolution,
    Dropout,
    Flatten,
    Norm,
    Op,
    Pointwise,
    Pool,
)
from swamp_fast.particles.random import DROPOUT

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda x, _: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "silu": lambda x, _: F.silu(x),
    "tanh": lambda x, _: torch.tanh(x),
    "sigmoid": lambda x, _: torch.sigmoid(x),
    "softplus": lambda x, _: F.softplus(x),
    "hardswish": lambda x, _: F.hardswish(x),
    "mish": lambda x, _: F.mish(x),
}


class Pass:
    """One forward pass of L lanes and the backward pass that follows it.

    weights          [L, P']  compact
    mean, variance   [L, channels of all norms]  the batch's statistics are written here if by_batch is set; otherwise
                     the running statistics are read from here
    keys             [L, 3]   int64, the keys of dropout's random draws; None for no dropout
    arrivals         [L, ...] int32, zero before and after each launch (see Statistics)
    run_of_lane      [L]      int64

    values           the feature map of each value, by its number
    grads            the gradients that the backward pass has computed and still needs, by the value's number
    factors          the factors that each dropout multiplies by, by the number of its output
    prologues        for each value that its readers recompute: the map and the prologue to recompute it from
    """

    def __init__(
        self,
        program: Program,
        weights: Tensor,
        mean: Tensor,
        variance: Tensor,
        by_batch: bool,
        keys: Tensor | None,
        arrivals: Tensor,
        run_of_lane: Tensor,
    ) -> None:
        self.program, self.plan, self.weights, self.keys = program, program.plan, weights, keys
        self.arrivals, self.run_of_lane = arrivals, run_of_lane
        self.mean, self.variance, self.by_batch = mean, variance, by_batch
        self.lanes = len(weights)
        self.values: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}
        self.factors: dict[int, Tensor] = {}
        self.scale, self.offset = torch.empty_like(mean), torch.empty_like(mean)
        self.prologues: dict[int, tuple[Tensor, Prologue]] = {}
        self.dense = torch.empty(self.lanes, program.dense.index.shape[1], dtype=program.storage, device=weights.device)

    def forward(self, inputs: Tensor, keep: bool) -> Tensor:
        """Return the outputs [L, B, ...] for inputs [L, B, ...]; `keep` keeps all values for the backward pass."""
        self.samples = inputs.shape[1]
        self.values[self.plan.input] = _into_map(inputs, self.program.storage)
        self.program.dense.expand(self.weights, self.run_of_lane, self.dense)
        for place, op in enumerate(self.plan.ops):
            _FORWARD[type(op)](self, op)
            if not keep:
                for number in {*op.inputs} - {self.plan.output}:
                    if self.program.last_reader[number] == place:
                        self.values.pop(number, None)
        return _out_of_map(self.values[self.plan.output], len(self.plan.shapes[self.plan.output]) == 1)

    def backward(self, out_grad: Tensor, grads: Tensor) -> None:
        """Add the gradients of the weights to grads [L, P'], given the gradient of the outputs [L, B, ...]."""
        self.weight_grads = grads
        tables = self.program.gradients_of(self.samples)
        self.partial = torch.empty(self.lanes, tables.length, dtype=grads.dtype, device=grads.device)
        self.grads[self.plan.output] = _into_map(out_grad, self.program.storage)
        for op in reversed(self.plan.ops):
            if op.output in self.program.needed:
                _BACKWARD[type(op)](self, op)
                self.grads.pop(op.output, None)
        tables.collect(self.partial, self.run_of_lane, grads)

    def _out(self, op: Op) -> Tensor:
        self.values[op.output] = self.program.map_of(op.output, self.lanes, self.samples)
        return self.values[op.output]

    def _put(self, op: Op, value: Tensor) -> None:
        """Store an operation's output that PyTorch computed, in the memory layout that the kernels need."""
        self.values[op.output] = value.contiguous()

    def _grad(self, value: int) -> tuple[Tensor, bool]:
        """Return the map of a value's gradient, and whether it already holds a part that the next must be added to."""
        exists = value in self.grads
        if not exists:
            self.grads[value] = self.program.map_of(value, self.lanes, self.samples)
        return self.grads[value], exists

    def _grad_if_needed(self, value: int) -> tuple[Tensor | None, bool]:
        """Return what `_grad` returns, or (None, False) for a value that needs no gradient."""
        return self._grad(value) if value in self.program.needed else (None, False)

    def _add_grad(self, value: int, grad: Tensor) -> None:
        """Add `grad` to the gradient of a value, unless the value needs no gradient."""
        if value not in self.program.needed:
            return
        total, exists = self._grad(value)
        total.add_(grad) if exists else total.copy_(grad)

    def _window(self, op: Convolution) -> tuple[Any, ...]:
        return self.program.dense.places[op.output].kernel, op.stride, op.padding, op.dilation, op.groups

    def _precision(self, op: Convolution) -> str:
        return self.program.precision[len(self.plan.shapes[op.output]) == 1]

    def _source(self, value: int) -> tuple[Tensor, Prologue | None]:
        """The map that a kernel loads to read a value, and the prologue to apply to it (None if there is none)."""
        return self.prologues[value] if value in self.prologues else (self.values[value], None)

    def _convolution(self, op: Convolution) -> None:
        (source, prologue), out = self._source(op.inputs[0]), self._out(op)
        first, halo = self.program.dense.places[op.output].forward, self.program.halos.get(op.output)
        norm = self.program.norm_behind.get(op.output)
        statistics = self._statistics(norm) if norm is not None and self.by_batch else None
        first_bias = None if op.bias is None else self.program.begins[op.bias]
        if halo is not None:
            bias = None if first_bias is None else (self.weights, first_bias)
            halo.convolve(self._launch, source, prologue, self.dense, first, bias, out, False, False, statistics)
        else:
            bank = None if first_bias is None else self.weights
            self.program.kernels("convolution").convolve(
                *(source, self.dense, first, bank, first_bias, out, self._window(op)),
                *(False, False, statistics, self._precision(op)),
            )

    def _convolution_backward(self, op: Convolution) -> None:
        kernels, out_grad = self.program.kernels("convolution"), self.grads[op.output]
        self._weight_grad(op, out_grad)
        if op.bias is not None:
            kernels.bias_grad(out_grad, self.weight_grads, self.program.begins[op.bias], self.arrivals)
        if op.inputs[0] not in self.program.needed:
            return
        in_grad, accumulate = self._grad(op.inputs[0])
        first, halo = self.program.dense.places[op.output].by_input, self.program.halos.get(op.output)
        if halo is not None:
            halo.convolve(self._launch, out_grad, None, self.dense, first, None, in_grad, True, accumulate, None)
        else:
            kernels.convolve(
                *(out_grad, self.dense, first, None, None, in_grad, self._window(op)),
                *(True, accumulate, None, self._precision(op)),
            )

    def _weight_grad(self, op: Convolution, out_grad: Tensor) -> None:
        """Write the weight gradient of a convolution, in parts that are summed later."""
        (source, prologue), tables = self._source(op.inputs[0]), self.program.gradients_of(self.samples)
        first, halo = tables.first[op.output], self.program.halos.get(op.output)
        if halo is not None:
            halo.weight_grad(self._launch, source, prologue, out_grad, self.partial, first)
        else:
            self.program.kernels("convolution").weight_grad(
                *(source, out_grad, self.partial, first, tables.splits[op.output]),
                *(self._window(op), self._precision(op)),
            )

    @property
    def _launch(self) -> Launch:
        """The launcher of the CUDA kernels; it is never None if the program has halos."""
        assert self.program.launch is not None
        return self.program.launch

    def _statistics(self, op: Norm) -> Statistics:
        """The tensors that hold a norm's statistics, weight and bias, and where its channels begin in them."""
        weight, bias = (-1 if name is None else self.program.begins[name] for name in (op.weight, op.bias))
        return Statistics(
            *(self.mean, self.variance, self.scale, self.offset, self.program.first_channel[op.output]),
            *(self.weights, weight, bias, op.eps, self.arrivals),
        )

    def _norm(self, op: Norm) -> None:
        source, statistics = self.values[op.inputs[0]], self._statistics(op)
        kernels = self.program.kernels("batch_statistics")
        if not self.by_batch:
            kernels.scale_offset(statistics, source.shape[-1])
        elif self.program.norm_behind.get(op.inputs[0]) is not op:
            kernels.statistics(source, statistics)
        if op.output in self.program.recomputed:
            self.prologues[op.output] = source, Prologue(self.scale, self.offset, statistics.first)
            return
        side = self.values[op.inputs[1]] if len(op.inputs) > 1 else None
        self.program.kernels("norm").norm(source, side, self._out(op), statistics, op.relu)

    def _norm_backward(self, op: Norm) -> None:
        # Request the residual's gradient first, because the kernel writes it first. If both inputs are the same value,
        # the second request then returns accumulate=True.
        side_grad, accumulate_side = self._grad_if_needed(op.inputs[1]) if len(op.inputs) > 1 else (None, False)
        in_grad, accumulate = self._grad_if_needed(op.inputs[0])
        self.program.kernels("norm").norm_grad(
            self.values[op.inputs[0]],
            self.values.get(op.output),
            self.grads[op.output],
            in_grad,
            side_grad,
            accumulate,
            accumulate_side,
            self._statistics(op),
            self.weight_grads,
            op.relu,
            self.by_batch,
        )

    def _pool(self, op: Pool) -> None:
        source, out = self.values[op.inputs[0]], self._out(op)
        self.program.kernels("pool").pool(source.flatten(0, 1), out.flatten(0, 1), self.program.windows[op.output])

    def _pool_backward(self, op: Pool) -> None:
        if op.inputs[0] not in self.program.needed:
            return
        in_grad, accumulate = self._grad(op.inputs[0])
        maps = self.values[op.inputs[0]], self.values[op.output], in_grad, self.grads[op.output]
        pictures = (values.flatten(0, 1) for values in maps)
        self.program.kernels("pool").pool_grad(*pictures, self.program.windows[op.output], accumulate)

    def _pointwise(self, op: Pointwise) -> None:
        self._put(op, ACTIVATIONS[op.kind](self.values[op.inputs[0]], op.parameter))

    def _pointwise_backward(self, op: Pointwise) -> None:
        source = self.values[op.inputs[0]].detach().requires_grad_()
        with torch.enable_grad():
            out = ACTIVATIONS[op.kind](source, op.parameter)
        (grad,) = torch.autograd.grad(out, source, self.grads[op.output])
        self._add_grad(op.inputs[0], grad)

    def _add(self, op: Add) -> None:
        first, second = (self.values[number] for number in op.inputs)
        self._put(op, first + second)

    def _add_backward(self, op: Add) -> None:
        for number in op.inputs:
            self._add_grad(number, self.grads[op.output])

    def _concatenate(self, op: Concatenate) -> None:
        self._put(op, torch.cat([self.values[number] for number in op.inputs], -1))

    def _concatenate_backward(self, op: Concatenate) -> None:
        sizes = [self.plan.shapes[number][0] for number in op.inputs]
        for number, grad in zip(op.inputs, self.grads[op.output].split(sizes, -1), strict=True):
            self._add_grad(number, grad)

    def _flatten(self, op: Flatten) -> None:
        source = self.values[op.inputs[0]].movedim(-1, 2)
        self._put(op, source.reshape(self.lanes, self.samples, 1, 1, -1))

    def _flatten_backward(self, op: Flatten) -> None:
        channels, height, width = self.plan.shapes[op.inputs[0]]
        grad = self.grads[op.output].view(self.lanes, self.samples, channels, height, width)
        self._add_grad(op.inputs[0], grad.movedim(2, -1))

    def _dropout(self, op: Dropout) -> None:
        """Apply dropout with the same random draws as swamp_fast/particles/dropout.py."""
        source = self.values[op.inputs[0]]
        if self.keys is None:
            self.values[op.output] = source
            return
        channels, height, width = picture_first(self.plan.shapes[op.output])
        shape = (self.lanes, self.samples, channels, *((1, 1) if op.channels else (height, width)))
        number = len(self.factors)
        words = ops.philox(self.keys, DROPOUT + (number << 8), math.prod(shape[1:])).view(shape)
        kept = words >= round(op.p * 2**32) - 2**31 if op.p < 1 else torch.zeros_like(words)
        factor = (kept.to(self.weights.dtype) * (1 / (1 - op.p) if op.p < 1 else 0.0)).to(source.dtype)
        self.factors[op.output] = factor.movedim(2, -1)
        self._put(op, source * self.factors[op.output])

    def _dropout_backward(self, op: Dropout) -> None:
        self._add_grad(op.inputs[0], self.grads[op.output] * self.factors[op.output])


def _into_map(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor [L, B, C, H, W] or [L, B, C] to a map [L, B, H, W, C]."""
    moved = tensor.movedim(2, -1) if tensor.dim() == 5 else tensor[:, :, None, None]
    return moved.to(dtype).contiguous()


def _out_of_map(values: Tensor, flat: bool) -> Tensor:
    """Convert a map [L, B, H, W, C] to a tensor [L, B, C, H, W], or to [L, B, C] if `flat` is set."""
    return values[:, :, 0, 0] if flat else values.movedim(-1, 2)


# The methods that run the forward and the backward pass of each kind of operation.
_FORWARD: dict[type[Op], Callable[[Pass, Any], None]] = {
    Convolution: Pass._convolution,
    Norm: Pass._norm,
    Pointwise: Pass._pointwise,
    Add: Pass._add,
    Concatenate: Pass._concatenate,
    Pool: Pass._pool,
    Flatten: Pass._flatten,
    Dropout: Pass._dropout,
}
_BACKWARD: dict[type[Op], Callable[[Pass, Any], None]] = {
    Convolution: Pass._convolution_backward,
    Norm: Pass._norm_backward,
    Pointwise: Pass._pointwise_backward,
    Add: Pass._add_backward,
    Concatenate: Pass._concatenate_backward,
    Pool: Pass._pool_backward,
    Flatten: Pass._flatten_backward,
    Dropout: Pass._dropout_backward,
}
