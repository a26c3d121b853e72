"""Program: the kernel calls of a Plan for one mask and one batch size, made once and run for every lane and step."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast import ops
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.calls import backward_calls, forward_calls
from swamp_fast.engines.fused.cpu.maps import Allocate, Map, zeros
from swamp_fast.engines.fused.cpu.workspace import Call, Rows, Workspace
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.particles.random import DROPOUT


class Program:
    """One lane's forward and backward pass on batches of B samples.

    mean, variance, unbiased  [channels of all norms]  those of the Workspace
    rows                      see Rows; missing entries are chosen by timing and added
    trains                    whether the program has a backward pass
    allocate                  makes the memory of the maps
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
        allocate: Allocate = zeros,
    ) -> None:
        self.plan, self.samples, self.dtype = plan, samples, dtype
        self.workspace = workspace = Workspace(plan, compact, samples, dtype, storage, rows, allocate)
        self.mean, self.variance, self.unbiased = workspace.mean, workspace.variance, workspace.unbiased
        self.training_calls: list[Call] = []
        self.evaluation_calls: list[Call] = []
        self.backward_calls: list[Call] = []
        for op in plan.ops:
            training, evaluation = forward_calls(workspace, op)
            self.training_calls += training
            self.evaluation_calls += evaluation
        if trains:
            self.output_grad = workspace.take_grad(plan.output)
            for op in reversed(plan.ops):
                if op.output in workspace.needed:
                    self.backward_calls += backward_calls(workspace, op)
                    workspace.give_back_grad(op.output)

    def run(self, inputs: Tensor, weights: Tensor, batch_statistics: bool, key: Tensor | None) -> Tensor:
        """Return the outputs [B, ...] of one lane with compact weights [P'].

        batch_statistics  whether norms compute `mean` and `variance` from the batch instead of reading them
        key               [1, 3]  seeds dropout's random draws; None runs without dropout

        Raises ValueError if the inputs don't have the plan's shape.
        """
        expected = (self.samples, *self.plan.shapes[self.plan.input])
        if inputs.shape != expected:
            raise ValueError(
                f"the fused engine was made for inputs {list(expected)}, got {list(inputs.shape)}; a `transform` must "
                'keep the shape, or pass engine="eager".'
            )
        workspace = self.workspace
        workspace.weights.copy_(weights)
        for norm in workspace.norms.values():
            norm.batch = batch_statistics
        self._copy("pack", inputs.to(self.dtype), workspace.values[self.plan.input])
        for call in workspace.gather_calls:
            call()
        if key is not None:
            self._draw_dropout(key)
        for call in self.evaluation_calls if key is None else self.training_calls:
            call()
        outputs = torch.empty(self.samples, *self.plan.shapes[self.plan.output], dtype=self.dtype)
        self._copy("unpack", outputs, workspace.values[self.plan.output])
        return outputs

    def backward(self, out_grad: Tensor) -> Tensor:
        """Return the gradient [P'] of the compact weights, given the gradient [B, ...] of the last run's outputs.

        The last run must have had a dropout key.
        """
        self._copy("pack", out_grad, self.output_grad)
        for call in self.backward_calls:
            call()
        return self.workspace.grads

    def _copy(self, name: str, tensor: Tensor, target: Map) -> None:
        """Copy a tensor into a map ("pack") or a map into a tensor ("unpack")."""
        strides = (*tensor.stride(), 0, 0)[:4]
        self.workspace.call(name, self.workspace.kernels.Pack(tensor.data_ptr(), *strides, target.handle()))()

    def _draw_dropout(self, key: Tensor) -> None:
        """Write the factors of all dropouts, from the same random draws as swamp_fast/particles/dropout.py."""
        for number, (op, factor) in enumerate(self.workspace.factors):
            shape = (self.samples, *self.plan.shapes[op.output])
            drawn = (*shape[:2], *(1 for _ in shape[2:])) if op.channels else shape
            words = ops.philox(key, DROPOUT + (number << 8), int(torch.Size(drawn).numel()))
            kept = (words >= round(op.p * 2**32) - 2**31).view(drawn) if op.p < 1 else torch.zeros(drawn)
            scale = kept.to(self.dtype) * (1 / (1 - op.p) if op.p < 1 else 0.0)
            self._copy("pack", scale.expand(shape), factor)
