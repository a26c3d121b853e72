"""Estimates the FLOPs, memory traffic and time of a training step on the fused engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.engines.fused.plan import Convolution, Norm, Plan
from swamp_fast.engines.fused.trace import plan_of

COPY_BYTES = 256 << 20  # size of the copy that measures the memory bandwidth
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the matrices whose product measures the FLOP rate
TIMING_ROUNDS = 5
BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float64": 8}  # in a feature map


@dataclass(frozen=True)
class Ceilings:
    """A device's measured rates per second: bytes that a copy reads and writes, and FLOPs of a matrix product."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Estimate:
    """What one particle's step costs at density 1, assuming that each pass reads and writes a feature map only once.

    flops  FLOPs of the forward and backward pass
    moved  bytes of feature maps, weights and optimiser state that are read and written
    """

    flops: float
    moved: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The predicted seconds if arithmetic and memory traffic overlap perfectly; not a strict lower bound."""
        return max(self.moved / ceilings.bytes, self.flops / ceilings.flops)


def estimate(model: nn.Module, inputs: Tensor, precision: str) -> tuple[Plan, Estimate]:
    """Return a model's plan for inputs [B, ...] and the estimate of one step.

    precision  a key of BYTES_PER_NUMBER

    Raises NotCovered if the fused engine can't run the model.
    """
    plan = plan_of(model, lambda module, x: module(x), inputs)
    samples, size = len(inputs), BYTES_PER_NUMBER[precision]
    numbers = [math.prod(shape) * samples for shape in plan.shapes]
    parameters = dict(model.named_parameters())
    needed = plan.needs_gradient()
    flops = moved = 0.0
    for op in plan.ops:
        inside, outside = sum(numbers[number] for number in op.inputs), numbers[op.output]
        backward = any(number in needed for number in op.inputs)
        if isinstance(op, Convolution):
            weight = parameters[op.weight]
            pixels = outside / plan.shapes[op.output][0]
            flops += 2 * pixels * weight.numel() * (3 if backward else 2)
            moved += size * (inside + outside) * (3 if backward else 2)
        elif isinstance(op, Norm):
            moved += size * (inside + outside + 3 * outside + 3 * outside + inside)
        else:
            moved += size * 2 * (inside + outside)
    bank = 8 if precision == "float64" else 4
    state = 4 * bank * sum(parameter.numel() for parameter in parameters.values())
    moved += 2 * state
    return plan, Estimate(flops, moved)


def measured_ceilings(device: torch.device, precision: str) -> Ceilings:
    """Measure a copy and a matrix product on a device; the fastest of TIMING_ROUNDS rounds counts."""
    dtype = getattr(torch, precision)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    side = MATRIX_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    seconds = []
    for call in (lambda: target.copy_(source), lambda: a @ b):
        call()
        seconds.append(min(seconds_in_turn([call], device, TIMING_ROUNDS)[0]))
    copy_seconds, product_seconds = seconds
    return Ceilings(2 * COPY_BYTES / copy_seconds, 2 * side**3 / product_seconds)
