"""An estimate of a step on the fused engine: FLOPs, bytes, and the time at a device's measured ceilings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.engines.fused.plan import Convolution, Norm, Plan
from swamp_fast.engines.fused.trace import plan_of

COPIED = 256 << 20  # bytes in the copy that measures the memory's speed
SIDE = {"cuda": 8192, "cpu": 2048}  # rows and columns of the product that measures the arithmetic's speed
ROUNDS = 5
STORAGE = {"float32": 4, "bfloat16": 2, "float64": 8}  # bytes per number of a map


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes per second read and written by a copy, and FLOP per second of a matrix product."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Estimate:
    """One particle's step at density 1, if every convolution and norm reads and writes its maps once per pass.

    flops  FLOPs of the forward and backward pass
    moved  bytes of maps, weights and state read and written
    """

    flops: float
    moved: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Seconds if arithmetic and memory overlap perfectly at the ceilings' rates; a prediction, not a bound."""
        return max(self.moved / ceilings.bytes, self.flops / ceilings.flops)


def estimate(model: nn.Module, inputs: Tensor, precision: str) -> tuple[Plan, Estimate]:
    """The plan of a model for inputs [B, ...], and the estimate of a step. Raises NotCovered."""
    plan = plan_of(model, lambda module, x: module(x), inputs)
    samples, size = len(inputs), STORAGE[precision]
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
    """The rates of a copy and of a matrix product on the device: the best of ROUNDS, after a warm-up."""
    dtype = getattr(torch, precision)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    side = SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    seconds = []
    for call in (lambda: target.copy_(source), lambda: a @ b):
        call()
        seconds.append(min(seconds_in_turn([call], device, ROUNDS)[0]))
    copy_seconds, product_seconds = seconds
    return Ceilings(2 * COPIED / copy_seconds, 2 * side**3 / product_seconds)
