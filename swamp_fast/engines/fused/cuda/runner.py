"""CudaLanes: the LaneRunner on CUDA. Each launch runs all lanes, or as many as fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.memory import free_memory
from swamp_fast.common.warn import warn_user
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

MAX_STEP_MEMORY_FRACTION = 0.4  # of the free memory, for one step; a smaller last batch and evaluation need memory too


class CudaPrograms:
    """The program for a mask [Q], or for the masks [R, Q] of R runs. All masks must leave the same channels alive.

    plan      the plan without dead channels
    compacts  the compact form of each run, all of the same length
    columns   [channels of the plan's norms]  int64, the index of each channel among the channels of the model's norms;
              None if no channel was removed
    at_once   the largest number of lanes per launch; None for all. A lane's results don't depend on it
    branch    the number of lanes per group if groups run in parallel, each on its own stream; otherwise None
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
        """Set `at_once` to the number of lanes that the free memory allows. Raises MemoryError if not even one fits."""
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
        """The runner of lanes with compact weights [L, P']; their gradients are added to grads [L, P'].

        run_of_lane  [L]  int64; by default all lanes belong to run 0
        """
        if run_of_lane is None:
            run_of_lane = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
        return CudaLanes(self.problem, self, weights, grads, run_of_lane)


def lanes_that_fit(lanes: int, bytes_of_lane: int, free: int) -> int:
    """How many of `lanes` lanes fit into memory at once; warns if not all do. Raises MemoryError if none fits.

    bytes_of_lane  memory that one lane's step uses
    free           bytes of free memory
    """
    fitting = int(MAX_STEP_MEMORY_FRACTION * free) // bytes_of_lane
    needed = f"a step of one particle takes about {bytes_of_lane / 1e9:.2f} GB"
    allowed = f"{MAX_STEP_MEMORY_FRACTION:.0%} of the {free / 1e9:.2f} GB that are free may be used"
    if fitting == 0:
        raise MemoryError(f"{needed}, but only {allowed}; use a smaller batch_size.")
    if fitting < lanes:
        warn_user(f"{fitting} of {lanes} particles run at once: {needed}, and {allowed}.")
    return min(lanes, fitting)


def lanes_in_cache(plan: Plan, samples: int, itemsize: int, cache: int) -> int:
    """The number of lanes whose largest input and output maps together fill half of a cache of `cache` bytes."""
    largest = max(math.prod(shape) for shape in plan.shapes) * samples * itemsize
    return max(1, cache // 2 // (2 * largest))


class CudaLanes:
    """Runs lanes with compact weights [L, P'] and adds their gradients to grads [L, P'].

    modules      one per lane, without weights; they hold the buffers
    run_of_lane  [L]  int64, the run that each lane belongs to
    """

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
        counters = max(shape[0] for shape in programs.plan.shapes)  # a launch has at most one block per channel
        self.arrivals = torch.zeros(len(weights), counters, dtype=torch.int32, device=weights.device)

    @property
    def weights(self) -> Tensor:
        """The full weights [L, P], in which pruned weights are 0."""
        rows = zip(self.runs, self.compact_weights, strict=True)
        return torch.stack([self.programs.compacts[run].expand(row) for run, row in rows])

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """See LaneRunner.backward."""
        assert self.grads is not None
        grads = self.grads

        # Make the gradient tables on the current stream, because all branches use them.
        self.programs.program.gradients_of(batch.inputs.shape[1])

        def backward(lanes: slice) -> Tensor:
            return self._backward(batch, step_keys, lanes, grads[lanes])

        if self._branches:
            return torch.cat(self._in_branches(backward))
        return torch.cat([backward(lanes) for lanes in self._groups(self.programs.at_once)])

    @property
    def _branches(self) -> bool:
        """Whether groups of lanes run in parallel; this requires that all lanes fit into memory together."""
        lanes, branch = len(self.modules), self.programs.branch
        return branch is not None and branch < lanes <= (self.programs.at_once or lanes)

    def _in_branches(self, backward: Callable[[slice], Tensor]) -> list[Tensor]:
        """Run `backward` for each group on a separate stream; in a CUDA graph these become parallel branches."""
        device, groups, losses = self.compact_weights.device, self._groups(self.programs.branch), []
        current = torch.cuda.current_stream(device)
        while len(self.streams) < len(groups):  # reuse the streams, because PyTorch caches memory per stream
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
        """Return the losses of one group of lanes and add its gradients to `grads`.

        The group's feature maps are freed on return.
        """
        inputs, targets = self._batch(batch, step_keys, lanes)
        run, outputs = self._run(lanes, inputs, step_keys[lanes], keep=True)
        losses, out_grad = self._losses(outputs, targets)
        with torch.no_grad():
            run.backward(out_grad, grads)
        return losses

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """See LaneRunner.outputs."""
        outputs: list[Any] = []
        for lanes in self._groups(self.programs.at_once):
            shared = inputs.expand(lanes.stop - lanes.start, *inputs.shape)
            outputs += self._run(lanes, shared, None, keep=False)[1].unbind()
        return outputs

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """See LaneRunner.set_buffers."""
        self.running.write(buffers)

    def buffers(self) -> dict[str, Tensor]:
        """See LaneRunner.buffers."""
        return self.running.read()

    def _groups(self, size: int | None) -> list[slice]:
        """Divide the lanes into groups of at most `size`; None puts all lanes into one group."""
        lanes = len(self.modules)
        step = min(lanes, size or lanes)
        return [slice(begin, min(lanes, begin + step)) for begin in range(0, lanes, step)]

    def _batch(self, batch: Batch, step_keys: Tensor, lanes: slice) -> tuple[Tensor, Any]:
        """The inputs [L, B, ...] of some lanes, and their targets: a tensor [L, B, ...], or a list of each lane's."""
        if self.problem.batches_as_stored:
            return batch.inputs[lanes], batch.targets[lanes]
        of_lanes = [
            self.problem.particle_batch(*batch.lane(lane), step_keys[lane : lane + 1])
            for lane in range(lanes.start, lanes.stop)
        ]
        inputs, targets = (list(each) for each in zip(*of_lanes, strict=True))
        return torch.stack(inputs), torch.stack(targets) if isinstance(targets[0], Tensor) else targets

    def _run(self, lanes: slice, inputs: Tensor, keys: Tensor | None, keep: bool) -> tuple[Pass, Tensor]:
        """Run the forward pass of some lanes; returns the pass and its outputs.

        In training mode this also updates the running statistics.
        Raises ValueError if the inputs don't have the plan's shape.
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
        """Select the columns of the plan's channels from statistics [L, channels of the model's norms]."""
        return statistics if self.programs.columns is None else statistics[:, self.programs.columns]

    def _losses(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return each lane's mean loss [L] and the gradient of the outputs.

        A user-defined loss is called once per lane, because it may combine the samples of a batch.
        """
        labels = isinstance(targets, Tensor) and targets.dtype == torch.int64
        if self.problem.loss is cross_entropy and outputs.dim() == 3 and labels:
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
