"""Workspace: the memory that a program's kernel calls read and write, allocated once per mask and batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.maps import Allocate, Map, zeros
from swamp_fast.engines.fused.cpu.taps import ConvolutionMask, pads
from swamp_fast.engines.fused.plan import Convolution, Dropout, Norm, Plan
from swamp_fast.ops.contracts import native

Call = Callable[[], None]  # runs one kernel
# For each convolution, by the name of its weight: how many output channels share their loads in each of its passes
# (forward, input gradient, weight gradient); 0 if that is not chosen yet.
Rows = dict[str, list[int]]


class Workspace:
    """Memory for one lane's forward and backward pass on batches of B samples, and helpers that make kernel calls.

    weights, grads  [P']  compact
    mean, variance  [channels of all norms]  statistics of the batch, or in evaluation the running statistics
    unbiased        [channels of all norms]  n / (n - 1), where n numbers enter each statistic of a batch
    first_channel   where a Norm's channels begin among those of all norms, by the number of its output
    masks           the mask of each convolution, by the number of its output
    maps            all maps
    values          the map of each value that an operation reads or computes, by its number
    grad_maps       the maps of gradients that are in use at this point of the backward pass, while its calls are made
    norms           the kernel argument of each Norm, by the number of its output
    factors         each Dropout, in order, with the map of the factors that it multiplies by
    gather_calls    calls that collect weights for the convolutions; they run before the forward calls
    kept_alive      the tensors whose addresses the calls hold
    rows            see Rows; missing entries are chosen by timing and added
    needed          the numbers of the values that need a gradient
    allocate        makes the memory of the maps
    """

    def __init__(
        self,
        plan: Plan,
        compact: Compact,
        samples: int,
        dtype: torch.dtype,
        storage: torch.dtype,
        rows: Rows,
        allocate: Allocate = zeros,
    ) -> None:
        self.plan, self.compact, self.samples, self.dtype, self.storage = plan, compact, samples, dtype, storage
        self.rows, self.allocate = rows, allocate
        self.kernels, self.threads = native().fused, torch.get_num_threads()
        self._storage_kind = getattr(self.kernels.Storage, str(storage).removeprefix("torch."))
        self._entries = {entry.name: entry for entry in compact.layout.entries}
        self.weights = torch.zeros(compact.P, dtype=dtype)
        self.grads = torch.zeros_like(self.weights)
        self.masks = {op.output: self._mask(op) for op in plan.ops if isinstance(op, Convolution)}
        self.first_channel, channels = {}, 0
        for op in plan.ops:
            if isinstance(op, Norm):
                self.first_channel[op.output] = channels
                channels += plan.shapes[op.output][0]
        self.mean, self.variance = torch.zeros(2, channels, dtype=dtype)
        self.unbiased = torch.ones(channels, dtype=dtype)
        self.norms: dict[int, Any] = {}
        self.factors: list[tuple[Dropout, Map]] = []
        self.gather_calls: list[Call] = []
        self.scratch = self.partial = torch.zeros(0, dtype=dtype)  # shared by all weight gradients
        self.kept_alive: list[Tensor] = []
        value_pads, self._grad_pads = self._pads()
        self.maps: list[Map] = []
        used = {plan.input, *(op.output for op in plan.ops)}  # the others were merged into operations after them
        self.values = {number: self.new_map(plan.shapes[number], value_pads[number]) for number in sorted(used)}
        self.needed = plan.needs_gradient()
        self.grad_maps: dict[int, Map] = {}
        self._free_maps: dict[tuple[Any, ...], list[Map]] = {}

    def new_map(self, shape: tuple[int, ...], pad: int) -> Map:
        """A zeroed map for values [B, *shape] with a border of `pad` zeros."""
        self.maps.append(Map.of(shape, self.samples, pad, self.storage, self.allocate))
        return self.maps[-1]

    def call(self, name: str, argument: Any) -> Call:
        """A call of the kernel `name` with its argument object."""
        return partial(getattr(self.kernels, name), self._storage_kind, argument, self.threads)

    def gather_call(self, index: int, values: int, count: int) -> Call:
        """A call that copies `count` weights to the address `values`; `index` is the address of their int32 indices."""
        arguments = self._storage_kind, self.weights.data_ptr(), index, values, count, self.threads
        return partial(self.kernels.gather, *arguments)

    def address(self, vector: Tensor, name: str | None) -> int:
        """The address of a never-pruned parameter in a compact vector [P']; 0 if `name` is None."""
        return 0 if name is None else vector[int(self.compact.where[self._entries[name].begin]) :].data_ptr()

    def keep_alive(self, tensor: Tensor) -> int:
        """Return a tensor's address and keep the tensor alive as long as the workspace."""
        self.kept_alive.append(tensor)
        return tensor.data_ptr()

    def grad_of(self, value: int) -> tuple[Map, bool]:
        """The map of a value's gradient, and whether an earlier call writes to it, so that the next one must add."""
        if value in self.grad_maps:
            return self.grad_maps[value], True
        return self.take_grad(value), False

    def take_grad(self, value: int) -> Map:
        """Return a map for a value's gradient; a free map of the same shape is reused."""
        shape, pad = self.plan.shapes[value], self._grad_pads[value]
        free = self._free_maps.get((shape, pad))
        self.grad_maps[value] = free.pop() if free else self.new_map(shape, pad)
        return self.grad_maps[value]

    def give_back_grad(self, value: int) -> None:
        """Free the map of a value's gradient for reuse."""
        if value in self.grad_maps:
            free = self._free_maps.setdefault((self.plan.shapes[value], self._grad_pads[value]), [])
            free.append(self.grad_maps.pop(value))

    def _mask(self, op: Convolution) -> ConvolutionMask:
        entry = self._entries[op.weight]
        shape = entry.shape if len(entry.shape) == 4 else (*entry.shape, 1, 1)
        where = self.compact.where[entry.begin : entry.end].view(shape)
        return ConvolutionMask(op, where >= 0, where)

    def _pads(self) -> tuple[list[int], list[int]]:
        """The width of the border of zeros of each value's map, and the same for its gradient's map."""
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
