"""Lanes side by side on CUDA: every launch runs all of them, or as many as fit the memory."""

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
from swamp_fast.engines.fused.cuda.execution import Pass
from swamp_fast.engines.fused.cuda.narrow import narrow, norm_columns, per_channel
from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.cuda.program import Program
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.ops.contracts import triton_kernels
from swamp_fast.problem.arguments import cross_entropy
from swamp_fast.problem.problem import Problem

MAX_MEMORY_FRACTION = 0.4  # of the free memory for one step: steps of two batch sizes and evaluation share it


class CudaPrograms:
    """The program under a mask [Q], or under the masks [R, Q] of R runs, which leave the same channels alive.

    plan      without dead channels
    compacts  of the runs, all of one length
    columns   [channels of the plan's norms] int64, which of the model's channels they are; None if all are left
    at_once   how many lanes a launch runs at most, None for all; what a lane computes doesn't depend on it
    branch    how many lanes form a group, if groups run side by side, each on its own stream; else None
    """

    def __init__(
        self, problem: Problem, plan: Plan, mask: Tensor, launch: Launch | None, branch: int | None = None
    ) -> None:
        self.problem, self.branch = problem, branch
        masks = mask.view(-1, mask.shape[-1])
        self.plan, channels = narrow(plan, problem.layout, masks[0])
        self.columns = norm_columns(plan, channels)
        self.columns = None if self.columns is None else self.columns.to(mask.device)
        first, room = per_channel(plan, channels), int(masks.sum(1).max())
        self.compacts = [Compact(problem.layout, run_mask, first, room) for run_mask in masks]
        storage = torch.bfloat16 if problem.config.precision == "bfloat16" else problem.dtype
        tf32 = {True: torch.backends.cuda.matmul.allow_tf32, False: torch.backends.cudnn.allow_tf32}
        self.program = Program(self.plan, channels, self.compacts, problem.dtype, storage, tf32, launch)
        self.at_once: int | None = None

    def measure(self, lanes: int) -> None:
        """Set how many of `lanes` lanes run at once, by the free memory. Raises MemoryError if not even one fits."""
        if self.problem.device.type != "cuda":
            return
        bytes_of_lane = self.program.bytes_of_lane(self.problem.bounds[0][1])
        self.at_once = lanes_that_fit(lanes, bytes_of_lane, free_memory(self.problem.device))

    @property
    def compact(self) -> Compact:
        """The compact form of the only run. Raises ValueError if there are several runs."""
        (compact,) = self.compacts
        return compact

    def lanes(self, weights: Tensor, grads: Tensor | None, run_of_lane: Tensor | None = None) -> CudaLanes:
        """Lanes over compact weights [L, P'], whose gradients go to grads [L, P']; all of run 0 without run_of_lane."""
        if run_of_lane is None:
            run_of_lane = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        return CudaLanes(self.problem, self, weights, grads, run_of_lane)


def lanes_that_fit(lanes: int, bytes_of_lane: int, free: int) -> int:
    """How many of `lanes` lanes a launch may run; warns if not all. Raises MemoryError if not even one fits."""
    fitting = int(MAX_MEMORY_FRACTION * free) // bytes_of_lane
    needed = f"a step of one particle takes about {bytes_of_lane / 1e9:.2f} GB"
    allowed = f"{MAX_MEMORY_FRACTION:.0%} of the {free / 1e9:.2f} GB that are free may be used"
    if fitting == 0:
        raise MemoryError(f"{needed}, but only {allowed}; use a smaller batch_size.")
    if fitting < lanes:
        warnings.warn(f"{fitting} of {lanes} particles run at once: {needed}, and {allowed}.", stacklevel=2)
    return min(lanes, fitting)


def lanes_in_cache(plan: Plan, samples: int, itemsize: int, cache: int) -> int:
    """How many lanes fill half of a cache of `cache` bytes with the input and the output of the largest operation."""
    largest = max(math.prod(shape) for shape in plan.shapes) * samples * itemsize
    return max(1, cache // 2 // (2 * largest))


class CudaLanes:
    """Lanes over compact weights [L, P'], whose gradients go to grads [L, P']. The modules hold only the buffers."""

    channels_last = True

    def __init__(
        self, problem: Problem, programs: CudaPrograms, weights: Tensor, grads: Tensor | None, run_of_lane: Tensor
    ) -> None:
        self.problem, self.programs, self.compact_weights, self.grads = problem, programs, weights, grads
        self.run_of_lane, self.runs = run_of_lane, run_of_lane.tolist()
        self.running = Buffers(problem.template, programs.plan.norms, len(weights), problem.dtype)
        self.modules = self.running.modules
        self.mean, self.variance = (self._of_plan(torch.zeros_like(self.running.mean)) for _ in range(2))
        self.streams: list[torch.cuda.Stream] = []
        counters = max(shape[0] for shape in programs.plan.shapes)  # no launch has more blocks of channels
        self.arrivals = torch.zeros(len(weights), counters, dtype=torch.int32, device=weights.device)

    @property
    def weights(self) -> Tensor:
        """The weights [L, P] with the pruned ones."""
        rows = zip(self.runs, self.compact_weights, strict=True)
        return torch.stack([self.programs.compacts[run].expand(row) for run, row in rows])

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """See LaneByLane.backward."""
        assert self.grads is not None
        grads = self.grads

        # Made here, because the branches share it.
        self.programs.program.gradients_of(batch.inputs.shape[1])

        def backward(lanes: slice) -> Tensor:
            return self._backward(batch, step_keys, lanes, grads[lanes])

        if self._branches:
            return torch.cat(self._in_branches(backward))
        return torch.cat([backward(lanes) for lanes in self._groups(self.programs.at_once)])

    @property
    def _branches(self) -> bool:
        """Whether groups run side by side, which they do if all lanes fit the memory together."""
        lanes, branch = len(self.modules), self.programs.branch
        return branch is not None and branch < lanes <= (self.programs.at_once or lanes)

    def _in_branches(self, backward: Callable[[slice], Tensor]) -> list[Tensor]:
        """Run each group on its own stream; in a CUDA graph these are parallel branches."""
        device, groups, losses = self.compact_weights.device, self._groups(self.programs.branch), []
        current = torch.cuda.current_stream(device)
        while len(self.streams) < len(groups):  # the same streams each step, because torch caches memory by stream
            self.streams.append(torch.cuda.Stream(device))
        for stream in self.streams:
            stream.wait_stream(current)
        for lanes, stream in zip(groups, self.streams, strict=True):
            with torch.cuda.stream(stream):
                losses.append(backward(lanes))
        for stream in self.streams:
            current.wait_stream(stream)
        return losses

    def _backward(self, batch: Batch, step_keys: Tensor, lanes: slice, grads: Tensor) -> Tensor:
        """The losses of one group; its gradients are added to grads. Its maps are free again when this returns."""
        inputs, targets = self._inputs(batch, step_keys, lanes), batch.targets[lanes]
        run, outputs = self._run(lanes, inputs, step_keys[lanes], keep=True)
        losses, out_grad = self._losses(outputs, targets)
        with torch.no_grad():
            run.backward(out_grad, grads)
        return losses

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """See LaneByLane.outputs."""
        outputs: list[Any] = []
        for lanes in self._groups(self.programs.at_once):
            shared = inputs.expand(lanes.stop - lanes.start, *inputs.shape)
            outputs += self._run(lanes, shared, None, keep=False)[1].unbind()
        return outputs

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """See LaneByLane.set_buffers."""
        self.running.write(buffers)

    def buffers(self) -> dict[str, Tensor]:
        """See LaneByLane.buffers."""
        return self.running.read()

    def _groups(self, size: int | None) -> list[slice]:
        """The lanes in groups of at most `size`; None is all of them."""
        lanes = len(self.modules)
        step = min(lanes, size or lanes)
        return [slice(begin, min(lanes, begin + step)) for begin in range(0, lanes, step)]

    def _inputs(self, batch: Batch, step_keys: Tensor, lanes: slice) -> Tensor:
        """The inputs [L, B, ...] of some lanes, through the user's transform."""
        if self.problem.transform is None:
            inputs: Tensor = batch.inputs[lanes]
            return inputs
        transformed = [
            self.problem.transformed(batch.lane(lane)[0], step_keys[lane : lane + 1])
            for lane in range(lanes.start, lanes.stop)
        ]
        return torch.stack(transformed)

    def _run(self, lanes: slice, inputs: Tensor, keys: Tensor | None, keep: bool) -> tuple[Pass, Tensor]:
        """A forward pass of some lanes, and its outputs. Running statistics are updated where the norms train.

        Raises ValueError for inputs of another shape than the plan's.
        """
        expected = self.programs.plan.shapes[self.programs.plan.input]
        if inputs.shape[2:] != expected:
            raise ValueError(
                f"the fused engine was made for inputs [B, {', '.join(map(str, expected))}], got "
                f'{list(inputs.shape[1:])}; a `transform` must keep the shape, or pass engine="eager".'
            )
        by_batch = self.running.by_batch
        if by_batch:
            mean, variance = self.mean[lanes], self.variance[lanes]
        else:
            mean, variance = self._of_plan(self.running.mean[lanes]), self._of_plan(self.running.variance[lanes])
        run = Pass(
            *(self.programs.program, self.compact_weights[lanes], mean, variance, by_batch, keys),
            *(self.arrivals[lanes], self.run_of_lane[lanes]),
        )
        with torch.no_grad():
            outputs = run.forward(inputs, keep).to(self.problem.dtype)
            if by_batch:
                unbiased = variance * self.programs.program.unbiased(inputs.shape[1])
                self.running.update(lanes, mean, unbiased, self.programs.columns)
        return run, outputs

    def _of_plan(self, statistics: Tensor) -> Tensor:
        """Statistics [L, channels of the plan's norms], from those of the model's norms."""
        return statistics if self.programs.columns is None else statistics[:, self.programs.columns]

    def _losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Each lane's mean loss [L], and its gradient. A user's loss runs lane by lane, because it may mix samples."""
        if self.problem.loss is cross_entropy and outputs.dim() == 3 and targets.dtype == torch.int64:
            kernels = triton_kernels("loss")
            if outputs.shape[2] <= kernels.MAX_CLASSES:
                result: tuple[Tensor, Tensor] = kernels.cross_entropy(outputs.contiguous(), targets.contiguous())
                return result
        outputs.requires_grad_()
        lane_losses = [
            self.problem.losses(
                lane_outputs.clone(), lane_targets
            ).mean()  # cloned, because a loss may change its input
            for lane_outputs, lane_targets in zip(outputs, targets, strict=True)
        ]
        losses = torch.stack(lane_losses)
        return losses.detach(), torch.autograd.grad(losses.sum(), outputs)[0]
