"""Program: a Plan prepared for the masks of R runs on CUDA, with the tables that its kernels need.

Each value is a feature map [L, B, H, W, C] (channels last); a value without pixels is [L, B, 1, 1, C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cuda.dense import DenseWeights, Gradients
from swamp_fast.engines.fused.cuda.halo import Halo
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.plan import Convolution, Norm, Op, Plan, Pool
from swamp_fast.ops.contracts import triton_kernels


class Program:
    """Everything that is computed once per plan and masks, and used by every pass.

    plan            the plan without dead channels
    channels        the model's channels that remain in each value of the plan, by the value's number
    compacts        the compact form of each run
    dtype           the type of weights and sums
    storage         the type of feature maps
    tf32            whether the inputs of float32 products may be rounded to TF32: [True] for linear layers, [False] for
                    convolutions
    launch          launches the CUDA kernels in csrc/cuda; None if only the Triton kernels run
    halos           the convolutions that the CUDA kernels run, by the number of their output
    recomputed      the outputs of norms that only CUDA kernels read. They are never written; each kernel recomputes
                    them while it loads its input
    begins          where each parameter begins in a compact row, by its name
    first_channel   where a norm's channels begin among those of all norms, by the number of its output
    norm_behind     the norm that reads a convolution's output, by the number of that output
    needed          the numbers of the values whose gradients the backward pass needs
    last_reader     the index of the last operation that reads a value, by the value's number
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
        compact = compacts[0]  # parameters that are never pruned begin at the same index in all of them
        self.launch = launch
        self.halos = self._halos() if launch is not None and storage == torch.bfloat16 else {}
        self.recomputed = self._recomputed()
        self.precision = {linear: "tf32" if allowed else "ieee" for linear, allowed in tf32.items()}
        self.begins = {
            entry.name: int(compact.where[entry.begin : entry.end].min()) for entry in compact.layout.entries
        }
        self.first_channel = self._first_channels()
        convolved = {op.output for op in plan.ops if isinstance(op, Convolution)}
        self.norm_behind = {op.inputs[0]: op for op in plan.ops if isinstance(op, Norm) and op.inputs[0] in convolved}
        self.needed = plan.needs_gradient()
        self.gradients: dict[int, Gradients] = {}
        self.counts: dict[int, Tensor] = {}
        self.windows = {op.output: self._windows(op) for op in plan.ops if isinstance(op, Pool)}
        self.last_reader = {number: place for place, op in enumerate(plan.ops) for number in op.inputs}

    def map_of(self, value: int, lanes: int, samples: int) -> Tensor:
        """An uninitialised feature map [L, B, H, W, C] for a value."""
        return torch.empty(lanes, samples, *picture(self.plan.shapes[value]), dtype=self.storage, device=self._device)

    def unbiased(self, samples: int) -> Tensor:
        """The factor n / (n - 1) that makes the batch variance of n numbers unbiased, for each channel of all norms."""
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
        """The tables that collect weight gradients over batches of `samples`."""
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
        """The largest number of bytes that one lane's step uses for maps, gradients and dense weights.

        The memory of the bank itself is not counted.
        """
        numbers = sum(math.prod(shape) for shape in self.plan.shapes) * samples
        largest = max(math.prod(shape) for shape in self.plan.shapes) * samples
        dense = self.dense.index.shape[1] * self.storage.itemsize
        return (numbers + 4 * largest) * self.storage.itemsize + dense + 4 * self.gradients_of(samples).length

    @staticmethod
    def kernels(name: str) -> ModuleType:
        """The module `name` of Triton kernels."""
        return triton_kernels(name)

    @property
    def _device(self) -> torch.device:
        return self.dense.index.device

    def _first_channels(self) -> dict[int, int]:
        first: dict[int, int] = {}
        channels = 0
        for op in self.plan.ops:
            if isinstance(op, Norm):
                first[op.output] = channels
                channels += self.plan.shapes[op.output][0]
        return first

    def _halos(self) -> dict[int, Halo]:
        candidates = {
            op.output: Halo.of(
                *(op, self.dense.places[op.output].kernel),
                *(self.plan.shapes[op.inputs[0]], self.plan.shapes[op.output]),
            )
            for op in self.plan.ops
            if isinstance(op, Convolution)
        }
        return {output: halo for output, halo in candidates.items() if halo is not None}

    def _recomputed(self) -> set[int]:
        if not self.halos:
            return set()
        readers: dict[int, list[Op]] = {self.plan.output: []}
        for op in self.plan.ops:
            for number in op.inputs:
                readers.setdefault(number, []).append(op)
        return {
            op.output
            for op in self.plan.ops
            if isinstance(op, Norm) and op.relu and len(op.inputs) == 1 and op.output != self.plan.output
            if all(reader.output in self.halos for reader in readers.get(op.output, []))
        }

    def _windows(self, op: Pool) -> Any:
        height, width = self.plan.shapes[op.inputs[0]][1:]
        return self.kernels("pool").windows_of(op.rows, op.columns, op.divisors, height, width, self._device)


def picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(height, width, channels) of a value's map; `shape` is [C, H, W] or [C]."""
    channels, height, width = picture_first(shape)
    return height, width, channels


def picture_first(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width) of a value's map; `shape` is [C, H, W] or [C]."""
    return (shape[0], 1, 1) if len(shape) == 1 else (shape[0], shape[1], shape[2])
