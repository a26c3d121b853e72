"""A Plan under a mask on CUDA: forward and backward pass of L lanes, a launch or two for each operation.

Values are maps [L, B, H, W, C], channels last; features are [L, B, 1, 1, C]. Convolutions, norms and pools are this
project's Triton kernels; what only moves or maps numbers is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swamp_fast import ops
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cuda.dense import DenseWeights, Gradients
from swamp_fast.engines.fused.cuda.halo import Halo, Prologue, Statistics
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.plan import (
    Add,
    Concatenate,
    Convolution,
    Dropout,
    Flatten,
    Norm,
    Op,
    Plan,
    Pointwise,
    Pool,
)
from swamp_fast.ops.contracts import triton_kernels
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


class Program:
    """What is made once for a mask: the index of dense weights, tables, where the norms' channels stand.

    plan            without dead channels; `channels` of each value are left, by its number
    dtype, storage  of weights and sums, and of maps
    tf32            whether products of float32 may be rounded to it: in linear layers, and in convolutions
    launch          runs the kernels of csrc/cuda, if they can be had
    halos           the convolutions that they run, by their output's number
    recomputed       the outputs of norms that those alone read, and make for themselves at the load
    first_channel   where a norm's channels begin among all norms', by its output's number
    norm_behind     a norm that reads a convolution's output, by the latter's number: where its statistics go
    """

    def __init__(
        self,
        plan: Plan,
        channels: Sequence[Tensor],
        compacts: Sequence[Compact],
        dtype: torch.dtype,
        storage: torch.dtype,
        tf32: dict[bool, bool],
        launch: Launch | None = None,
    ) -> None:
        self.plan, self.dtype, self.storage = plan, dtype, storage
        self.dense = DenseWeights(plan, compacts, channels)
        compact = compacts[0]  # what isn't pruned stands at the same place in all
        self.launch = launch
        self.halos = self._halos() if launch is not None and storage == torch.bfloat16 else {}
        self.recomputed = self._recomputed()
        self.precision = {linear: "tf32" if allowed else "ieee" for linear, allowed in tf32.items()}
        self.begins = {
            entry.name: int(compact.where[entry.begin : entry.end].min()) for entry in compact.layout.entries
        }
        self.first_channel: dict[int, int] = {}
        count = 0
        for op in plan.ops:
            if isinstance(op, Norm):
                self.first_channel[op.output] = count
                count += plan.shapes[op.output][0]
        convolved = {op.output for op in plan.ops if isinstance(op, Convolution)}
        self.norm_behind = {op.inputs[0]: op for op in plan.ops if isinstance(op, Norm) and op.inputs[0] in convolved}
        self.needed = plan.needs_gradient()
        self.gradients: dict[int, Gradients] = {}
        self.counts: dict[int, Tensor] = {}
        self.windows = {op.output: self._windows(op) for op in plan.ops if isinstance(op, Pool)}
        self.last_reader = {number: place for place, op in enumerate(plan.ops) for number in op.inputs}

    def map_of(self, value: int, lanes: int, samples: int) -> Tensor:
        """An empty map for a value."""
        return torch.empty(lanes, samples, *picture(self.plan.shapes[value]), dtype=self.storage, device=self._device)

    def unbiased(self, samples: int) -> Tensor:
        """The factor n / (n - 1) for every channel of the norms, n numbers in a batch's statistics."""
        if samples not in self.counts:
            factors = []
            for op in self.plan.ops:
                if isinstance(op, Norm):
                    height, width, channels = picture(self.plan.shapes[op.output])
                    count = samples * height * width
                    factors += [count / max(1, count - 1)] * channels
            self.counts[samples] = torch.tensor(factors, dtype=self.dtype, device=self._device)
        return self.counts[samples]

    def gradients_of(self, samples: int) -> Gradients:
        """The tables of weight gradients over batches of so many samples."""
        if samples not in self.gradients:
            splits = {
                op.output: self.halos[op.output].parts(samples)
                if op.output in self.halos
                else self.kernels("convolution").weight_grad_splits(
                    samples * math.prod(picture(self.plan.shapes[op.output])[:2]), self.dense.places[op.output].size
                )
                for op in self.plan.ops
                if isinstance(op, Convolution)
            }
            self.gradients[samples] = Gradients(self.dense, splits)
        return self.gradients[samples]

    def bytes_of_lane(self, samples: int) -> int:
        """What a step of one lane holds at most, besides the bank: its maps, as many of gradients, dense weights."""
        numbers = sum(math.prod(shape) for shape in self.plan.shapes) * samples
        largest = max(math.prod(shape) for shape in self.plan.shapes) * samples
        dense = self.dense.index.shape[1] * self.storage.itemsize
        return (numbers + 4 * largest) * self.storage.itemsize + dense + 4 * self.gradients_of(samples).length

    @staticmethod
    def kernels(name: str) -> ModuleType:
        """A module of Triton kernels."""
        return triton_kernels(name)

    @property
    def _device(self) -> torch.device:
        return self.dense.index.device

    def _halos(self) -> dict[int, Halo]:
        found = {
            op.output: Halo.of(
                *(op, self.dense.places[op.output].kernel),
                *(self.plan.shapes[op.inputs[0]], self.plan.shapes[op.output]),
            )
            for op in self.plan.ops
            if isinstance(op, Convolution)
        }
        return {output: halo for output, halo in found.items() if halo is not None}

    def _recomputed(self) -> set[int]:
        readers: dict[int, list[Op]] = {self.plan.output: []}
        for op in self.plan.ops:
            for number in op.inputs:
                readers.setdefault(number, []).append(op)
        return {
            op.output
            for op in self.plan.ops
            if isinstance(op, Norm) and op.relu and len(op.inputs) == 1 and op.output != self.plan.output
            if all(reader.output in self.halos for reader in readers.get(op.output, [])) and self.halos
        }

    def _windows(self, op: Pool) -> Any:
        height, width = self.plan.shapes[op.inputs[0]][1:]
        return self.kernels("pool").windows_of(op.rows, op.columns, op.divisors, height, width, self._device)


class Pass:
    """One forward pass of L lanes, and the backward one behind it.

    weights          [L, P']  compact
    mean, variance   [L, channels of all norms]: of the batch, written, or given where `by_batch` is off
    keys             [L, 3]   that dropout draws with; None leaves it off
    arrivals         [L, ...] zeros, as Statistics has it
    run_of_lane      [L]      int64
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
        self.prologues: dict[int, tuple[Tensor, Prologue]] = {}  # what stands for a value that is not written
        self.dense = torch.empty(self.lanes, program.dense.index.shape[1], dtype=program.storage, device=weights.device)

    def forward(self, inputs: Tensor, keep: bool) -> Tensor:
        """Inputs [L, B, ...] -> outputs [L, B, ...]; with `keep`, values stay for the backward pass."""
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
        """Add the gradients of the weights to grads [L, P'], from that of the outputs [L, B, ...]."""
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
        """An operation's output from torch, as the kernels take it."""
        self.values[op.output] = value.contiguous()

    def _grad(self, value: int) -> tuple[Tensor, bool]:
        """The gradient of a value, and whether something is in it already."""
        there = value in self.grads
        if not there:
            self.grads[value] = self.program.map_of(value, self.lanes, self.samples)
        return self.grads[value], there

    def _grad_if_needed(self, value: int) -> tuple[Tensor | None, bool]:
        """As `_grad`; None for a value that needs no gradient."""
        return self._grad(value) if value in self.program.needed else (None, False)

    def _add_grad(self, value: int, grad: Tensor) -> None:
        """Add to the gradient of a value, if any is needed."""
        if value not in self.program.needed:
            return
        own, there = self._grad(value)
        own.add_(grad) if there else own.copy_(grad)

    def _window(self, op: Convolution) -> tuple[Any, ...]:
        return self.program.dense.places[op.output].kernel, op.stride, op.padding, op.dilation, op.groups

    def _precision(self, op: Convolution) -> str:
        return self.program.precision[len(self.plan.shapes[op.output]) == 1]

    def _source(self, value: int) -> tuple[Tensor, Prologue | None]:
        """A value, or what it is made of at the load."""
        return self.prologues[value] if value in self.prologues else (self.values[value], None)

    def _convolution(self, op: Convolution) -> None:
        kernels, halo = self.program.kernels("convolution"), self.program.halos.get(op.output)
        source, prologue = self._source(op.inputs[0])
        out, norm = self._out(op), self.program.norm_behind.get(op.output)
        to = self._statistics(norm) if norm is not None and self.by_batch else None
        first = self.program.dense.places[op.output].forward
        if halo is not None:
            assert self.program.launch is not None
            bias = None if op.bias is None else (self.weights, self.program.begins[op.bias])
            halo.convolve(self.program.launch, source, prologue, self.dense, first, bias, out, False, False, to)
            return
        kernels.convolve(
            *(source, self.dense, first),
            *((None, 0) if op.bias is None else (self.weights, self.program.begins[op.bias])),
            *(out, self._window(op), False, False, to, self._precision(op)),
        )

    def _convolution_backward(self, op: Convolution) -> None:
        kernels, tables = self.program.kernels("convolution"), self.program.gradients_of(self.samples)
        (source, prologue), out_grad = self._source(op.inputs[0]), self.grads[op.output]
        window, precision = self._window(op), self._precision(op)
        halo, launch, first = self.program.halos.get(op.output), self.program.launch, tables.first[op.output]
        if halo is not None and launch is not None:
            halo.weight_grad(launch, source, prologue, out_grad, self.partial, first)
        else:
            kernels.weight_grad(source, out_grad, self.partial, first, tables.splits[op.output], window, precision)
        if op.bias is not None:
            kernels.bias_grad(out_grad, self.weight_grads, self.program.begins[op.bias], self.arrivals)
        if op.inputs[0] in self.program.needed:
            in_grad, accumulate = self._grad(op.inputs[0])
            place = self.program.dense.places[op.output].by_input
            if halo is not None and launch is not None:
                halo.convolve(launch, out_grad, None, self.dense, place, None, in_grad, True, accumulate, None)
            else:
                kernels.convolve(
                    *(out_grad, self.dense, place, None, 0, in_grad, window, True, accumulate, None, precision)
                )

    def _statistics(self, op: Norm) -> Statistics:
        """Where a norm's statistics, weight and bias stand."""
        weight, bias = (-1 if name is None else self.program.begins[name] for name in (op.weight, op.bias))
        return Statistics(
            *(self.mean, self.variance, self.scale, self.offset, self.program.first_channel[op.output]),
            *(self.weights, weight, bias, op.eps, self.arrivals),
        )

    def _norm(self, op: Norm) -> None:
        kernels, source, statistics = self.program.kernels("norm"), self.values[op.inputs[0]], self._statistics(op)
        if not self.by_batch:
            kernels.scale_offset(statistics, source.shape[-1])
        elif self.program.norm_behind.get(op.inputs[0]) is not op:
            kernels.statistics(source, statistics)
        if op.output in self.program.recomputed:
            self.prologues[op.output] = source, Prologue(self.scale, self.offset, statistics.first)
            return
        side = self.values[op.inputs[1]] if len(op.inputs) > 1 else None
        kernels.norm(source, side, self._out(op), statistics, op.relu)

    def _norm_backward(self, op: Norm) -> None:
        # The residual's gradient first, because the kernel writes it first: this matters if both inputs are one value.
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
        flat = (each.flatten(0, 1) for each in maps)
        self.program.kernels("pool").pool_grad(*flat, self.program.windows[op.output], accumulate)

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
        """By the draws of swamp_fast/dropout.py."""
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


def picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A value's shape as a map's: height, width, channels."""
    channels, height, width = picture_first(shape)
    return height, width, channels


def picture_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A value's channels, height and width."""
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])


def _into_map(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """[L, B, C, H, W] or [L, B, C] as a map."""
    moved = tensor.movedim(2, -1) if tensor.dim() == 5 else tensor[:, :, None, None]
    return moved.to(dtype).contiguous()


def _out_of_map(values: Tensor, flat: bool) -> Tensor:
    return values[:, :, 0, 0] if flat else values.movedim(-1, 2)


# What an operation does, forward and backward.
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
