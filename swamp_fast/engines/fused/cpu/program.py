"""A Plan under a mask, for batches of one size: buffers planned once, and the kernel calls over them in order."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamp_fast import ops
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.taps import CHUNK, SAMPLES, ConvolutionMask, Geometry, Taps, pads
from swamp_fast.engines.fused.plan import (
    KINDS,
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
from swamp_fast.ops.contracts import native
from swamp_fast.particles.random import DROPOUT

Call = Callable[[], None]
Rows = dict[str, list[int]]  # by a convolution's weight: how many outputs share loads in each of its passes
FORWARD, BY_INPUT, BY_WEIGHTS = range(3)

MOST_WASTE = 2.5  # sharing loads is not tried where it makes so many products of one
TIMINGS = 3
HUGE_PAGE = 2 << 20  # bytes
TASKS = 16  # that a weight gradient is split into at least, if it can be


def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeroed memory [size], on huge pages where it is large and the system has them.

    A tile of a convolution touches a page a channel and row; with 4 KB pages they outnumber the processor's table.
    """
    length = size * dtype.itemsize
    if length < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, length + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE
    return whole[begin : begin + length].view(dtype)


@dataclass(frozen=True)
class Map:
    """A buffer of one value, or of its gradient; see csrc/cpu/fused/fused.h."""

    memory: Tensor
    blocks: int
    channels: int
    height: int
    width: int
    pad: int
    samples: int
    flat: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], samples: int, pad: int, dtype: torch.dtype) -> Map:
        """A zeroed map for values [B, *shape]."""
        blocks = -(-samples // SAMPLES)
        flat = len(shape) == 1
        channels, height, width = (shape[0], 1, blocks) if flat else shape
        blocks = 1 if flat else blocks
        size = blocks * channels * (height + 2 * pad) * (width + 2 * pad) * SAMPLES
        return cls(zeros(size, dtype), blocks, channels, height, width, pad, samples, flat)

    @property
    def geometry(self) -> Geometry:
        """Distances between rows and channels."""
        pitch = (self.width + 2 * self.pad) * SAMPLES
        return Geometry(pitch, (self.height + 2 * self.pad) * pitch)

    def handle(self, nothing: bool = False) -> Any:
        """For the kernels; `nothing` where they look for a map that there isn't."""
        return native().fused.Map(
            *(0 if nothing else self.memory.data_ptr(), self.blocks, self.channels, self.height, self.width, self.pad),
            *(self.samples, self.flat),
        )


class Program:
    """One lane's forward and backward pass on batches of B samples.

    weights, grads  [P']    compact; what the calls read and write
    mean, variance  [sum of the norms' channels]  of the batch, or given in evaluation
    rows            how the convolutions share loads; what it lacks is measured and put in
    """

    def __init__(
        self,
        plan: Plan,
        compact: Compact,
        samples: int,
        dtype: torch.dtype,
        storage: torch.dtype,
        rows: Rows,
        trains: bool,
    ) -> None:
        self.plan, self.compact, self.samples, self.dtype, self.rows = plan, compact, samples, dtype, rows
        self.kernels, self.threads = native().fused, torch.get_num_threads()
        self.storage, self.kind = storage, getattr(self.kernels.Storage, str(storage).removeprefix("torch."))
        self.entries = {entry.name: entry for entry in compact.layout.entries}
        self.weights = torch.zeros(compact.P, dtype=dtype)
        self.grads = torch.zeros_like(self.weights)
        self.masks = {op.output: self._mask(op) for op in plan.ops if isinstance(op, Convolution)}
        self.first_channel, channels = {}, 0
        for op in plan.ops:
            if isinstance(op, Norm):
                self.first_channel[op.output] = channels
                channels += plan.shapes[op.output][0]
        self.mean, self.variance = torch.zeros(2, channels, dtype=dtype)
        self.unbiased = torch.ones(channels, dtype=dtype)  # n / (n - 1), n numbers in a batch's statistics
        self.norms: dict[int, Any] = {}
        self.factors: list[tuple[Dropout, Map]] = []
        self.owned: list[Tensor] = []  # what calls point into
        self.scratch = self.partial = torch.zeros(0, dtype=dtype)
        self.gather_calls: list[Call] = []
        self.training_calls: list[Call] = []
        self.evaluation_calls: list[Call] = []  # without dropout
        self.backward_calls: list[Call] = []
        value_pads, self.grad_pads = self._pads()
        self.values = [Map.of(shape, samples, pad, storage) for shape, pad in zip(plan.shapes, value_pads, strict=True)]
        self.grad_maps: dict[int, Map] = {}
        self.free: dict[tuple[Any, ...], list[Map]] = {}
        for op in plan.ops:
            training, evaluation = _FORWARD[type(op)](self, op)
            self.training_calls += training
            self.evaluation_calls += evaluation
        if trains:
            self._take_grad(plan.output)
            self.needed = plan.needs_gradient()
            for op in reversed(plan.ops):
                if op.output not in self.needed:
                    continue
                self.backward_calls += _BACKWARD[type(op)](self, op)
                self._give_back(op.output)

    def run(self, inputs: Tensor, weights: Tensor, batch_statistics: bool, key: Tensor | None) -> Tensor:
        """Outputs [B, ...] of one lane with compact weights [P']; dropout draws with `key` [1, 3], or is off."""
        wanted = (self.samples, *self.plan.shapes[self.plan.input])
        if inputs.shape != wanted:
            raise ValueError(
                f"the fused engine was made for inputs {list(wanted)}, got {list(inputs.shape)}; a `transform` must "
                'keep the shape, or pass engine="eager".'
            )
        inputs = inputs.to(self.dtype)
        self.weights.copy_(weights)
        for norm in self.norms.values():
            norm.batch = batch_statistics
        self._repack("pack", inputs, self.values[self.plan.input])
        for call in self.gather_calls:
            call()
        if key is not None:
            self._draw(key)
        for call in self.evaluation_calls if key is None else self.training_calls:
            call()
        outputs = torch.empty(self.samples, *self.plan.shapes[self.plan.output], dtype=self.dtype)
        self._repack("unpack", outputs, self.values[self.plan.output])
        return outputs

    def backward(self, out_grad: Tensor) -> Tensor:
        """The gradient [P'] from that of the outputs of the last run, whose dropout was on."""
        self._repack("pack", out_grad, self.output_grad)
        for call in self.backward_calls:
            call()
        return self.grads

    def _repack(self, name: str, tensor: Tensor, target: Map) -> None:
        strides = (*tensor.stride(), 0, 0)[:4]
        self._call(name, self.kernels.Pack(tensor.data_ptr(), *strides, target.handle()))()

    def _draw(self, key: Tensor) -> None:
        """Dropout's factors, by the draws of swamp_fast/dropout.py."""
        for number, (op, factor) in enumerate(self.factors):
            shape = (self.samples, *self.plan.shapes[op.output])
            drawn = (*shape[:2], *(1 for _ in shape[2:])) if op.channels else shape
            words = ops.philox(key, DROPOUT + (number << 8), int(torch.Size(drawn).numel()))
            kept = (words >= round(op.p * 2**32) - 2**31).view(drawn) if op.p < 1 else torch.zeros(drawn)
            scale = kept.to(self.dtype) * (1 / (1 - op.p) if op.p < 1 else 0.0)
            self._repack("pack", scale.expand(shape), factor)

    # The rest builds the calls.

    def _call(self, name: str, argument: Any) -> Call:
        return partial(getattr(self.kernels, name), self.kind, argument, self.threads)

    def _mask(self, op: Convolution) -> ConvolutionMask:
        entry = self.entries[op.weight]
        shape = entry.shape if len(entry.shape) == 4 else (*entry.shape, 1, 1)
        where = self.compact.where[entry.begin : entry.end].view(shape)
        return ConvolutionMask(op, where >= 0, where)

    def _pads(self) -> tuple[list[int], list[int]]:
        """Of every value and of its gradient."""
        values, grads = ([0] * len(self.plan.shapes) for _ in range(2))
        for op in self.plan.ops:
            inside = self.plan.shapes[op.inputs[0]]
            if isinstance(op, Convolution) and len(inside) == 3:
                height, width = self.masks[op.output].kept.shape[2:]
                sizes = inside[1:], self.plan.shapes[op.output][1:]
                forward, backward = pads(op, (height, width), sizes[0], sizes[1])
                values[op.inputs[0]] = max(values[op.inputs[0]], forward)
                grads[op.output] = backward
        return values, grads

    def _parameter(self, vector: Tensor, name: str | None) -> int:
        """The address of a parameter that isn't pruned in a compact vector; 0 for none."""
        return 0 if name is None else vector[int(self.compact.where[self.entries[name].begin]) :].data_ptr()

    def _own(self, tensor: Tensor) -> int:
        self.owned.append(tensor)
        return tensor.data_ptr()

    def _grad(self, value: int) -> tuple[Map, bool]:
        """The gradient of a value, and whether something is in it already."""
        if value in self.grad_maps:
            return self.grad_maps[value], True
        return self._take_grad(value), False

    def _take_grad(self, value: int) -> Map:
        shape, pad = self.plan.shapes[value], self.grad_pads[value]
        free = self.free.get((shape, pad))
        self.grad_maps[value] = free.pop() if free else Map.of(shape, self.samples, pad, self.storage)
        if value == self.plan.output:
            self.output_grad = self.grad_maps[value]
        return self.grad_maps[value]

    def _give_back(self, value: int) -> None:
        if value in self.grad_maps:
            free = self.free.setdefault((self.plan.shapes[value], self.grad_pads[value]), [])
            free.append(self.grad_maps.pop(value))

    def _taps(self, taps: Taps) -> Any:
        """The kernels' form. The weights are read where they stand if that is the taps' order, else gathered."""
        start = int(taps.index[0, 0]) if taps.count else 0
        if taps.rows == 1 and torch.equal(taps.index.flatten(), torch.arange(start, start + taps.count).int()):
            values = self.weights[start:].data_ptr()
        else:
            values = self._own(torch.zeros(max(1, taps.count), dtype=self.dtype))
            index = self._own(taps.index)
            call = partial(
                self.kernels.gather, self.kind, self.weights.data_ptr(), index, values, taps.count, self.threads
            )
            self.gather_calls.append(call)
        return self.kernels.Taps(self._own(taps.starts), self._own(taps.offsets), values, taps.groups, taps.rows)

    def _fastest(self, op: Convolution, which: int, make: Callable[[int], tuple[Taps, Callable[[Taps], Call]]]) -> Call:
        """One pass of a convolution, with as many outputs sharing loads as is fastest, or as was recorded."""
        recorded = self.rows.setdefault(op.weight, [0, 0, 0])
        tried: list[tuple[int, Call, list[Call]]] = []
        for rows in [recorded[which]] if recorded[which] else [1, 2, 4]:
            if rows > self.masks[op.output].most_rows(which == BY_INPUT):
                break
            taps, call_of = make(rows)
            if tried and taps.waste > MOST_WASTE:
                break
            before = len(self.gather_calls)
            call = call_of(taps)
            tried.append((rows, call, self.gather_calls[before:]))
            del self.gather_calls[before:]
        if len(tried) > 1:
            tried.sort(key=lambda each: _seconds(each[1]))
        recorded[which], call, gathers = tried[0]
        self.gather_calls += gathers
        return call

    def _convolution(self, op: Convolution) -> tuple[list[Call], list[Call]]:
        source, target = self.values[op.inputs[0]], self.values[op.output]
        bias = self._parameter(self.weights, op.bias)

        def call_of(taps: Taps) -> Call:
            argument = (source.handle(), target.handle(), self._taps(taps), bias, op.stride, 1, False)
            return self._call("convolve", self.kernels.Convolve(*argument))

        mask = self.masks[op.output]
        calls = [self._fastest(op, FORWARD, lambda rows: (mask.forward_taps(rows, source.geometry), call_of))]
        return calls, calls

    def _convolution_backward(self, op: Convolution) -> list[Call]:
        source, out_grad, mask = self.values[op.inputs[0]], self.grad_maps[op.output], self.masks[op.output]
        bias_grad = self._parameter(self.grads, op.bias)

        def by_weights(taps: Taps) -> Call:
            parts = min(_parts(int(mask.kept.sum())), out_grad.blocks)
            size = max(1, taps.largest_chunk)
            if self.scratch.numel() < size * self.threads * SAMPLES:
                self.scratch = torch.zeros(size * self.threads * SAMPLES, dtype=self.dtype)
            if self.partial.numel() < parts * taps.count:
                self.partial = torch.zeros(parts * taps.count, dtype=self.dtype)
            handle = self.kernels.Taps(self._own(taps.starts), self._own(taps.offsets), 0, taps.groups, taps.rows)
            argument = self.kernels.WeightGrad(
                *(source.handle(), out_grad.handle(), handle, self._own(taps.chunks), len(taps.chunks) - 1, parts),
                *(op.stride, self._own(taps.index), self._own(self.partial), self._own(self.scratch), size),
                *(self.grads.data_ptr(), bias_grad),
            )
            return self._call("weight_grad", argument)

        calls = [self._fastest(op, BY_WEIGHTS, lambda rows: (mask.forward_taps(rows, source.geometry), by_weights))]
        if op.inputs[0] not in self.needed:
            return calls
        in_grad, accumulate = self._grad(op.inputs[0])

        def by_input(taps: Taps) -> Call:
            argument = (out_grad.handle(), in_grad.handle(), self._taps(taps), 0, 1, op.stride, accumulate)
            return self._call("convolve", self.kernels.Convolve(*argument))

        return [
            *calls,
            self._fastest(op, BY_INPUT, lambda rows: (mask.backward_taps(rows, out_grad.geometry), by_input)),
        ]

    def _norm(self, op: Norm) -> tuple[list[Call], list[Call]]:
        source, target = self.values[op.inputs[0]], self.values[op.output]
        residual = self.values[op.inputs[-1]].handle(nothing=len(op.inputs) == 1)
        begin = self.first_channel[op.output]
        count = self.samples * source.height * (1 if source.flat else source.width)
        self.unbiased[begin : begin + source.channels] = count / max(1, count - 1)
        self.norms[op.output] = self.kernels.Norm(
            *(source.handle(), target.handle(), residual),
            *(self._parameter(self.weights, op.weight), self._parameter(self.weights, op.bias)),
            *(self.mean[begin:].data_ptr(), self.variance[begin:].data_ptr(), op.eps, True, op.relu),
        )
        calls = [self._call("norm", self.norms[op.output])]
        return calls, calls

    def _norm_backward(self, op: Norm) -> list[Call]:
        out_grad = self.grad_maps[op.output]
        needed = op.inputs[0] in self.needed
        # The residual's first: it is written first, which tells where both inputs are one value.
        side, accumulate_side = self._grad(op.inputs[1]) if len(op.inputs) > 1 else (out_grad, False)
        in_grad, accumulate = self._grad(op.inputs[0]) if needed else (out_grad, False)
        argument = self.kernels.NormGrad(
            *(self.norms[op.output], in_grad.handle(nothing=not needed), out_grad.handle(), side.handle()),
            *(self._parameter(self.grads, op.weight), self._parameter(self.grads, op.bias)),
            *(accumulate, accumulate_side),
        )
        return [self._call("norm_grad", argument)]

    def _pointwise(self, op: Pointwise) -> tuple[list[Call], list[Call]]:
        source, target = self.values[op.inputs[0]].handle(), self.values[op.output].handle()
        argument = self.kernels.Pointwise(source, target, source, target, KINDS[op.kind], op.parameter, False)
        calls = [self._call("pointwise", argument)]
        return calls, calls

    def _pointwise_backward(self, op: Pointwise) -> list[Call]:
        in_grad, accumulate = self._grad(op.inputs[0])
        argument = self.kernels.Pointwise(
            *(self.values[op.inputs[0]].handle(), self.values[op.output].handle()),
            *(in_grad.handle(), self.grad_maps[op.output].handle(), KINDS[op.kind], op.parameter, accumulate),
        )
        return [self._call("pointwise_grad", argument)]

    def _move(self, source: Map, target: Map, from_: int, to: int, count: int, accumulate: bool) -> Call:
        argument = self.kernels.Channels(source.handle(), target.handle(), from_, to, count, accumulate)
        return self._call("channels", argument)

    def _add(self, op: Add) -> tuple[list[Call], list[Call]]:
        target = self.values[op.output]
        calls = [
            self._move(self.values[number], target, 0, 0, target.channels, place > 0)
            for place, number in enumerate(op.inputs)
        ]
        return calls, calls

    def _add_backward(self, op: Add) -> list[Call]:
        out_grad = self.grad_maps[op.output]
        grads = [self._grad(number) for number in op.inputs]
        return [self._move(out_grad, in_grad, 0, 0, out_grad.channels, accumulate) for in_grad, accumulate in grads]

    def _concatenate(self, op: Concatenate) -> tuple[list[Call], list[Call]]:
        calls, begin = [], 0
        for number in op.inputs:
            source = self.values[number]
            calls.append(self._move(source, self.values[op.output], 0, begin, source.channels, False))
            begin += source.channels
        return calls, calls

    def _concatenate_backward(self, op: Concatenate) -> list[Call]:
        calls, begin = [], 0
        for number in op.inputs:
            in_grad, accumulate = self._grad(number)
            calls.append(self._move(self.grad_maps[op.output], in_grad, begin, 0, in_grad.channels, accumulate))
            begin += in_grad.channels
        return calls

    def _pool_argument(self, op: Pool, in_grad: Map, out_grad: Map, accumulate: bool) -> Any:
        divisors = 0 if op.divisors is None else self._own(torch.tensor(op.divisors, dtype=torch.float64))
        return self.kernels.Pool(
            *(self.values[op.inputs[0]].handle(), self.values[op.output].handle()),
            *(in_grad.handle(), out_grad.handle(), self._own(torch.tensor(op.rows))),
            *(self._own(torch.tensor(op.columns)), divisors, accumulate),
        )

    def _pool(self, op: Pool) -> tuple[list[Call], list[Call]]:
        source, target = self.values[op.inputs[0]], self.values[op.output]
        calls = [self._call("pool", self._pool_argument(op, source, target, False))]
        return calls, calls

    def _pool_backward(self, op: Pool) -> list[Call]:
        in_grad, accumulate = self._grad(op.inputs[0])
        return [self._call("pool_grad", self._pool_argument(op, in_grad, self.grad_maps[op.output], accumulate))]

    def _flatten(self, op: Flatten) -> tuple[list[Call], list[Call]]:
        source, target = self.values[op.inputs[0]].handle(), self.values[op.output].handle()
        calls = [self._call("flatten", self.kernels.Flatten(source, target, False, False))]
        return calls, calls

    def _flatten_backward(self, op: Flatten) -> list[Call]:
        in_grad, accumulate = self._grad(op.inputs[0])
        argument = (in_grad.handle(), self.grad_maps[op.output].handle(), True, accumulate)
        return [self._call("flatten", self.kernels.Flatten(*argument))]

    def _dropout(self, op: Dropout) -> tuple[list[Call], list[Call]]:
        source, target = self.values[op.inputs[0]], self.values[op.output]
        factor = Map.of(self.plan.shapes[op.output], self.samples, 0, self.storage)
        self.factors.append((op, factor))
        argument = self.kernels.Multiply(source.handle(), factor.handle(), target.handle(), False)
        return [self._call("multiply", argument)], [self._move(source, target, 0, 0, target.channels, False)]

    def _dropout_backward(self, op: Dropout) -> list[Call]:
        factor = next(factor for each, factor in self.factors if each is op)
        in_grad, accumulate = self._grad(op.inputs[0])
        out_grad = self.grad_maps[op.output].handle()
        return [self._call("multiply", self.kernels.Multiply(out_grad, factor.handle(), in_grad.handle(), accumulate))]


def _parts(kept: int) -> int:
    """How many parts the blocks of a weight gradient are summed in; by the mask alone, so that bits are too."""
    parts = 1
    while parts * max(1, kept // CHUNK) < TASKS:
        parts *= 2
    return parts


def _seconds(call: Call) -> float:
    """The least time of a few runs."""
    times = []
    for _ in range(TIMINGS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


# The calls of an operation: in training, in evaluation, and backward.
_FORWARD: dict[type[Op], Callable[[Program, Any], tuple[list[Call], list[Call]]]] = {
    Convolution: Program._convolution,
    Norm: Program._norm,
    Pointwise: Program._pointwise,
    Add: Program._add,
    Concatenate: Program._concatenate,
    Pool: Program._pool,
    Flatten: Program._flatten,
    Dropout: Program._dropout,
}
_BACKWARD: dict[type[Op], Callable[[Program, Any], list[Call]]] = {
    Convolution: Program._convolution_backward,
    Norm: Program._norm_backward,
    Pointwise: Program._pointwise_backward,
    Add: Program._add_backward,
    Concatenate: Program._concatenate_backward,
    Pool: Program._pool_backward,
    Flatten: Program._flatten_backward,
    Dropout: Program._dropout_backward,
}
