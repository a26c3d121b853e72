"""What a step of the fused engine costs: bytes, FLOPs, the time at a device's measured ceilings, and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamp_fast.engines.fused.plan import Convolution, Norm, Plan
from swamp_fast.engines.fused.trace import plan_of

COPIED = 256 << 20  # bytes, to measure how fast memory is
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices, to measure how fast products are
ROUNDS = 5
STORAGE = {"float32": 4, "bfloat16": 2, "float64": 8}  # bytes of a number of a map


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second that a copy reads and writes, and FLOP a second of a matrix product, as measured."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Estimate:
    """Of one particle's step at density 1: every convolution reads and writes its maps once a pass, norms likewise.

    flops       of forward and backward pass
    moved       bytes of maps, weights and state that go through memory
    state       bytes of weights, gradients, momentum and SWA means
    maps        bytes of the values kept for the backward pass, and of gradients
    """

    flops: float
    moved: float
    state: float
    maps: float

    def seconds(self, ceilings: Ceilings) -> float:
        """If products and bytes overlap perfectly, each at the rate of the ceilings; a prediction, not a bound."""
        return max(self.moved / ceilings.bytes, self.flops / ceilings.flops)

    def particles(self, memory: float) -> int:
        """How many fit so many bytes at once."""
        return int(memory // (self.state + self.maps))


def estimate(model: nn.Module, inputs: Tensor, precision: str) -> tuple[Plan, Estimate]:
    """The plan of a model for inputs [B, ...], and what a step of it costs. Raises NotCovered."""
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
    largest = max(numbers)
    return plan, Estimate(flops, moved, state, size * (sum(numbers) + 4 * largest))


def measured_ceilings(device: torch.device, precision: str) -> Ceilings:
    """A copy and a matrix product on the device, the best of a few."""
    dtype = getattr(torch, precision)
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    side = SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    copied = _least_seconds(lambda: target.copy_(source), device)
    return Ceilings(2 * COPIED / copied, 2 * side**3 / _least_seconds(lambda: a @ b, device))


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
