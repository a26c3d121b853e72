"""Lanes side by side: every launch runs all of them, or as many as fit the memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.memory import free_memory
from swamp_fast.data.store import Batch
from swamp_fast.engines.fused.buffers import Buffers
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cuda.narrow import narrow, norm_columns, per_channel
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.cuda.program import Pass, Program
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.ops.contracts import triton_kernels
from swamp_fast.problem.arguments import cross_entropy
from swamp_fast.problem.problem import Problem

MAX_MEMORY_FRACTION = 0.4  # of the free memory that a step may take: there are two sizes of batch, and evaluation


class CudaPrograms:
    """The program under a mask [Q], or under those of R runs, [R, Q].

    plan     without channels that are dead in all runs
    compacts of the runs, of one length
    columns  [channels of its norms] int64: which of the model's those are; None where all are left
    at_once  how many lanes a launch runs at most; what a lane computes doesn't depend on it
    branch   if not None, so many lanes run beside as many others, each group on a stream of its own
    """

    def __init__(
        self, problem: Problem, plan: Plan, mask: Tensor, launch: Launch | None, branch: int | None = None
    ) -> None:
        self.problem, self.branch = problem, branch
        masks = mask.view(-1, mask.shape[-1])
        self.plan, channels = narrow(plan, problem.layout, masks.any(0))
        self.columns = norm_columns(plan, channels)
        self.columns = None if self.columns is None else self.columns.to(mask.device)
        first, room = per_channel(plan, channels), int(masks.sum(1).max())
        self.compacts = [Compact(problem.layout, own, first, room) for own in masks]
        storage = torch.bfloat16 if problem.config.precision == "bfloat16" else problem.dtype
        tf32 = {True: torch.backends.cuda.matmul.allow_tf32, False: torch.backends.cudnn.allow_tf32}
        self.program = Program(self.plan, channels, self.compacts, problem.dtype, storage, tf32, launch)
        self.at_once: int | None = None

    def measure(self, lanes: int) -> None:
        """Decide how many of so many lanes run at once, by the memory that is free. Raises MemoryError if none does."""
        if self.problem.device.type != "cuda":
            return
        free = free_memory(self.problem.device)
        free += torch.cuda.memory_reserved(self.problem.device) - torch.cuda.memory_allocated(self.problem.device)
        self.at_once = lanes_that_fit(lanes, self.program.bytes_of_lane(self.problem.bounds[0][1]), free)

    @property
    def compact(self) -> Compact:
        """The only run's."""
        (own,) = self.compacts
        return own

    def lanes(self, weights: Tensor, grads: Tensor | None, run_of_lane: Tensor | None = None) -> CudaLanes:
        """Lanes over compact weights [L, P'], whose gradients go to grads [L, P']; of run 0 unless told."""
        if run_of_lane is None:
            run_of_lane = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        return CudaLanes(self.problem, self, weights, grads, run_of_lane)


def lanes_that_fit(lanes: int, bytes_of_lane: int, free: int) -> int:
    """How many of so many lanes a launch may run; says so if not all. Raises MemoryError if not even one fits."""
    fitting = int(MAX_MEMORY_FRACTION * free) // bytes_of_lane
    needed = f"a step of one particle takes about {bytes_of_lane / 1e9:.2f} GB"
    allowed = f"{MAX_MEMORY_FRACTION:.0%} of the {free / 1e9:.2f} GB that are free may be used"
    if fitting == 0:
        raise MemoryError(f"{needed}, but only {allowed}; use a smaller batch_size.")
    if fitting < lanes:
        warnings.warn(f"{fitting} of {lanes} particles run at once: {needed}, and {allowed}.", stacklevel=2)
    return min(lanes, fitting)


def lanes_in_cache(plan: Plan, samples: int, itemsize: int, cache: int) -> int:
    """How many lanes' largest operation, its input and its output, fill half of a cache of so many bytes."""
    largest = max(math.prod(shape) for shape in plan.shapes) * samples * itemsize
    return max(1, cache // 2 // (2 * largest))


class CudaLanes:
    """Lanes over compact weights [L, P'], whose gradients go to grads [L, P']; the modules hold the buffers alone."""

    channels_last = True

    def __init__(
        self, problem: Problem, programs: CudaPrograms, weights: Tensor, grads: Tensor | None, run_of_lane: Tensor
    ) -> None:
        self.problem, self.programs, self.compact_weights, self.grads = problem, programs, weights, grads
        self.run_of_lane, self.runs = run_of_lane, run_of_lane.tolist()
        self.running = Buffers(problem.template, programs.plan.norms, len(weights), problem.dtype)
        self.modules = self.running.modules
        self.mean, self.variance = (self._own(torch.zeros_like(self.running.mean)) for _ in range(2))
        most = max(shape[0] for shape in programs.plan.shapes)  # blocks of channels of one launch, at most
        self.streams: list[torch.cuda.Stream] = []
        self.arrivals = torch.zeros(len(weights), most, dtype=torch.int32, device=weights.device)

    @property
    def weights(self) -> Tensor:
        """[L, P] in full."""
        each = zip(self.runs, self.compact_weights, strict=True)
        return torch.stack([self.programs.compacts[run].expand(own) for run, own in each])

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """As LaneByLane.backward."""
        assert self.grads is not None
        grads = self.grads

        self.programs.program.gradients_of(batch.inputs.shape[1])  # made here, not in the first branch that needs it

        def backward(lanes: slice) -> Tensor:
            return self._backward(batch, step_keys, lanes, grads[lanes])

        if self._branches:
            return torch.cat(self._in_branches(backward))
        return torch.cat([backward(each) for each in self._groups(self.programs.at_once)])

    @property
    def _branches(self) -> bool:
        """Whether groups run beside each other: if they fit the memory together."""
        lanes, branch = len(self.modules), self.programs.branch
        return branch is not None and branch < lanes <= (self.programs.at_once or lanes)

    def _in_branches(self, backward: Callable[[slice], Tensor]) -> list[Tensor]:
        """Each group on a stream that begins and ends with the current one: parallel branches, where it is captured."""
        device, groups, losses = self.compact_weights.device, self._groups(self.programs.branch), []
        here = torch.cuda.current_stream(device)
        while len(self.streams) < len(groups):  # the same ones each step: memory is kept for a stream
            self.streams.append(torch.cuda.Stream(device))
        for stream in self.streams:
            stream.wait_stream(here)
        for lanes, stream in zip(groups, self.streams, strict=True):
            with torch.cuda.stream(stream):
                losses.append(backward(lanes))
        for stream in self.streams:
            here.wait_stream(stream)
        return losses

    def _backward(self, batch: Batch, step_keys: Tensor, lanes: slice, grads: Tensor) -> Tensor:
        """One group; what it held is free again when this returns."""
        inputs, targets = self._inputs(batch, step_keys, lanes), batch.targets[lanes]
        run, outputs = self._run(lanes, inputs, step_keys[lanes], keep=True)
        losses, out_grad = self._losses(outputs, targets)
        with torch.no_grad():
            run.backward(out_grad, grads)
        return losses

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """As LaneByLane.outputs."""
        outputs: list[Any] = []
        for lanes in self._groups(self.programs.at_once):
            same = inputs.expand(lanes.stop - lanes.start, *inputs.shape)
            outputs += self._run(lanes, same, None, keep=False)[1].unbind()
        return outputs

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """As LaneByLane.set_buffers."""
        self.running.write(buffers)

    def buffers(self) -> dict[str, Tensor]:
        """As LaneByLane.buffers."""
        return self.running.read()

    def _groups(self, most: int | None) -> list[slice]:
        lanes = len(self.modules)
        step = min(lanes, most or lanes)
        return [slice(begin, min(lanes, begin + step)) for begin in range(0, lanes, step)]

    def _inputs(self, batch: Batch, step_keys: Tensor, lanes: slice) -> Tensor:
        if self.problem.transform is None:
            inputs: Tensor = batch.inputs[lanes]
            return inputs
        each = [
            self.problem.transformed(batch.lane(lane)[0], step_keys[lane : lane + 1])
            for lane in range(lanes.start, lanes.stop)
        ]
        return torch.stack(each)

    def _run(self, lanes: slice, inputs: Tensor, keys: Tensor | None, keep: bool) -> tuple[Pass, Tensor]:
        """A forward pass and its outputs; running statistics move where the norms train."""
        wanted = self.programs.plan.shapes[self.programs.plan.input]
        if inputs.shape[2:] != wanted:
            raise ValueError(
                f"the fused engine was made for inputs [B, {', '.join(map(str, wanted))}], got "
                f'{list(inputs.shape[1:])}; a `transform` must keep the shape, or pass engine="eager".'
            )
        by_batch = self.running.by_batch
        if by_batch:
            mean, variance = self.mean[lanes], self.variance[lanes]
        else:
            mean, variance = self._own(self.running.mean[lanes]), self._own(self.running.variance[lanes])
        weights, arrivals = self.compact_weights[lanes], self.arrivals[lanes]
        own = arrivals, self.run_of_lane[lanes]
        run = Pass(self.programs.program, weights, mean, variance, by_batch, keys, *own)
        with torch.no_grad():
            outputs = run.forward(inputs, keep).to(self.problem.dtype)
            if by_batch:
                unbiased = variance * self.programs.program.unbiased(inputs.shape[1])
                self.running.move(lanes, mean, unbiased, self.programs.columns)
        return run, outputs

    def _own(self, statistics: Tensor) -> Tensor:
        """[L, channels of the model's norms] -> [L, channels of the plan's]."""
        return statistics if self.programs.columns is None else statistics[:, self.programs.columns]

    def _losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Each lane's mean loss, and its gradient; a loss of the user's runs lane by lane, as it may mix samples."""
        if self.problem.loss is cross_entropy and outputs.dim() == 3 and targets.dtype == torch.int64:
            kernels = triton_kernels("loss")
            if outputs.shape[2] <= kernels.MAX_CLASSES:
                found: tuple[Tensor, Tensor] = kernels.cross_entropy(outputs.contiguous(), targets.contiguous())
                return found
        outputs.requires_grad_()
        each = [
            self.problem.losses(own.clone(), target).mean()  # a loss may change what it is given
            for own, target in zip(outputs, targets, strict=True)
        ]
        losses = torch.stack(each)
        return losses.detach(), torch.autograd.grad(losses.sum(), outputs)[0]
