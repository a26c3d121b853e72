"""Trainer: a training of all lanes, step by step, around any engine's forward and backward pass (LaneRunner)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swamp_fast import ops
from swamp_fast.data.store import Batch
from swamp_fast.particles.bank import ParticleBank
from swamp_fast.particles.norms import reset_running_stats
from swamp_fast.particles.random import at_time, epoch_order
from swamp_fast.particles.schedule import Training
from swamp_fast.problem.problem import Problem


class LaneRunner(Protocol):
    """Runs the forward and backward pass of L lanes: lane by lane, folded, or fused.

    modules  hold the lanes' buffers, and the switch between training and evaluation
    """

    modules: list[nn.Module]
    channels_last: bool

    @property
    def weights(self) -> Tensor:
        """The lanes' weights [L, P], pruned ones included."""

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """Add the gradient of each lane's mean loss to the lane's row of the gradients; returns the losses [L]."""

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """Each lane's outputs on the same inputs [B, ...]; random draws use keys [L, 3]."""

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Write buffers [L, ...] into the modules."""

    def buffers(self) -> dict[str, Tensor]:
        """The modules' current buffers [L, ...]."""


class Trainer:
    """Trains a bank with its gradients; on CUDA the step is captured in a graph and replayed.

    A captured step reads fixed addresses, so these tensors are written in place before each step:

    epoch_keys, step_keys  [L, 3]  the lanes' keys at the epoch and at the step
    lr                     [L]     learning rates
    number                 [L]     of the step, counted from 1
    swa_weight             [L]     of the step's weights in the SWA mean; 0 if it takes no sample

    done    steps completed of the current training
    graphs  by batch size: the index [L, B] that a graph reads its batch by, and the graph
    """

    def __init__(self, problem: Problem, bank: ParticleBank, grads: Tensor, runner: LaneRunner) -> None:
        self.problem, self.bank, self.grads, self.runner = problem, bank, grads, runner
        self.epoch_keys, self.step_keys = self.bank.keys.clone(), self.bank.keys.clone()
        self.lr = torch.zeros(bank.lanes, dtype=torch.float64, device=problem.device)
        self.number, self.swa_weight = torch.ones_like(self.lr), torch.zeros_like(self.lr)
        self.loss_sum = torch.zeros(bank.lanes, dtype=torch.float64, device=problem.device)
        self.done = 0
        self.graphs: dict[int, tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        self.not_captured = _why_not_captured(problem)

    def train(
        self,
        trainings: Sequence[Training],
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run all epochs, or the rest of them after `state`; returns each lane's mean loss over the last epoch, [L].

        The bank gets the modules' final buffers. `trainings` has one entry per run, all of equally many epochs.
        """
        problem, bank, steps = self.problem, self.bank, len(self.problem.bounds)
        self.begin(state)
        if self.done and self.done % steps == 0:  # the interruption may have come from on_epoch, so it is called again
            on_epoch(self.done // steps - 1, self.loss_sum / steps)
        for epoch in range(self.done // steps, trainings[0].epochs):
            first = self.done % steps
            if first == 0:
                self.loss_sum.zero_()
            self.epoch_keys.copy_(at_time(bank.keys, epoch))
            order = epoch_order(self.epoch_keys, problem.train.length)
            # Sent for all steps at once: sending a number at each step would make the host wait for the device.
            rates = self._of_lanes([[training.lr(epoch * steps + i) for training in trainings] for i in range(steps)])
            (swa_weights,) = self._of_lanes([[training.swa_weight(epoch) for training in trainings]])
            for handle in problem.train.batches(order, self.epoch_keys, problem.bounds[first:]):
                step, last = self.done, self.done % steps == steps - 1
                self.lr.copy_(rates[step % steps])
                self.number.fill_(step + 1)
                self.swa_weight.copy_(swa_weights) if last else self.swa_weight.zero_()
                self.step_keys.copy_(at_time(bank.keys, step))
                self.step(handle)
                self.done += 1
                if last:
                    on_epoch(epoch, self.loss_sum / steps)
                on_step(step)
        bank.buffers = self.runner.buffers()
        return self.loss_sum / steps

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """A run's state between two steps, from which its training can resume; all else follows from the keys."""
        lanes, bank_state = self.bank.lanes_of(run), self.bank.of_run(run).state()
        buffers = {f"buffers/{name}": buffer[lanes] for name, buffer in self.runner.buffers().items()}
        return {"done": torch.tensor(self.done), "loss_sum": self.loss_sum[lanes], **bank_state, **buffers}

    def _of_lanes(self, of_runs: list[list[float]]) -> Tensor:
        """Numbers of runs [S, R], repeated for their lanes: [S, L]."""
        numbers = torch.tensor(of_runs, dtype=torch.float64, device=self.lr.device)
        return numbers.repeat_interleave(self.bank.lanes // len(self.bank.configs), 1)

    def begin(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Prepare the modules for a training from its start, or restore everything from a `state` inside it."""
        self.done = 0
        self.runner.set_buffers(self.bank.buffers)
        for module in self.runner.modules:
            module.train()
        reset_running_stats(self.runner.modules)
        if state is not None:
            self.done = int(state["done"])
            self.loss_sum.copy_(state["loss_sum"])
            self.bank.load_state_(state)
            self.runner.set_buffers({name: state[f"buffers/{name}"] for name in self.bank.buffers})

    def step(self, handle: Any) -> None:
        """One step of every lane."""
        if self.not_captured is None:
            size = handle.shape[1]
            if size not in self.graphs:
                self._capture(handle.clone(memory_format=torch.contiguous_format))
        if self.not_captured is None:
            index, graph = self.graphs[size]
            index.copy_(handle)
            graph.replay()
        else:
            self._step(handle)

    def _step(self, handle: Any) -> None:
        """One step, uncaptured."""
        self.grads.zero_()
        batch = self.problem.train.fetch(handle, self.epoch_keys, self.runner.channels_last)
        losses = self.runner.backward(batch, self.step_keys)
        self.loss_sum.add_(losses)
        self._update()

    def _update(self) -> None:
        """Update weights, moments and SWA means from the gradients."""
        bank, scale = self.bank, None
        if bank.clip_norm is not None:
            scale = ops.clip_scale(self.grads, bank.masks, bank.run_of_lane, bank.clip_norm)
        common = {**bank.rates, "swa": bank.swa, "swa_weight": self.swa_weight}
        if bank.config.optimizer == "adamw":
            ops.masked_adamw_(
                *(bank.weights, self.grads, *bank.moments.values(), bank.masks, bank.run_of_lane),
                lr=self.lr,
                step=self.number,
                grad_scale=scale,
                **common,
            )
        else:
            ops.masked_sgd_(
                *(bank.weights, self.grads, *bank.moments.values(), bank.masks, bank.run_of_lane),
                lr=self.lr,
                nesterov=bank.config.nesterov,
                grad_scale=scale,
                **common,
            )

    def _capture(self, index: Tensor) -> None:
        """Capture a step over `index` [L, B], then restore what the warm-up steps changed."""
        state = [*self.bank.moving().values(), self.loss_sum]
        state += [buffer for module in self.runner.modules for buffer in module.buffers()]
        saved = [tensor.clone() for tensor in state]
        try:
            with torch.cuda.device(self.problem.device):  # streams, graphs and pools belong to the current device
                self._record(index)
        finally:
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)

    def _record(self, index: Tensor) -> None:
        """Warm up and capture on the current device; a failure sets `not_captured`."""
        here, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step(index)
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(index)
            self.graphs[index.shape[1]] = index, graph
        except RuntimeError as error:
            # A capture that fails leaves its stream current and its memory pool in use, so that no later one can begin.
            torch.cuda.set_stream(here)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.problem.device.index, pool)
            torch.cuda.synchronize()  # pending work must not overwrite what _capture restores
            first = error.__context__ or error  # the failure itself; ending the capture raised `error`
            self.not_captured = f"capture failed: {str(first).splitlines()[0]}"


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a training, from the states of consecutive parts of its lanes."""
    first, *_ = states
    return {
        name: value if name == "done" else torch.cat([part[name] for part in states]) for name, value in first.items()
    }


def part_of(state: Mapping[str, Tensor], lanes: range, count: int) -> dict[str, Tensor]:
    """The inverse of `joined`: the part of a training's state that belongs to some of its `count` lanes."""

    def rows_of_lanes(value: Tensor) -> Tensor:
        rows = len(value) // count
        return value[lanes.start * rows : lanes.stop * rows]

    return {name: value if name == "done" else rows_of_lanes(value) for name, value in state.items()}


def _why_not_captured(problem: Problem) -> str | None:
    """Why the step can't be captured as a CUDA graph; None if it may."""
    if problem.device.type != "cuda":
        return "not on CUDA"
    if problem.train.streamed:
        return "the data are streamed"
    if problem.probe.draws_elsewhere or problem.transform is not None:
        return "the model or the transform may draw from torch's generators"
    if problem.probe.keeps_state or problem.probe.changed:
        return "the model's forward changes its buffers or attributes, which a graph would not replay"
    if problem.probe.reads_values is not None:
        return f"the model's forward looks at values ({problem.probe.reads_values})"
    return None


def first_handle(problem: Problem, bank: ParticleBank) -> Any:
    """The handle of the first batch of the first epoch, for timing a step."""
    order = epoch_order(bank.keys, problem.train.length)
    return next(iter(problem.train.batches(order, bank.keys, problem.bounds[:1])))
