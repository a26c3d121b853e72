"""Trainer: the training loop of all lanes. A LaneRunner of any engine computes the forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swamp_fast import ops
from swamp_fast.data.store import Batch
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.engines.lane_optimizers import LaneOptimizers
from swamp_fast.particles.bank import ParticleBank
from swamp_fast.particles.norms import norms_of, reset_running_stats
from swamp_fast.particles.random import at_time, later
from swamp_fast.particles.schedule import Training
from swamp_fast.problem.mixing import mixes
from swamp_fast.problem.problem import Problem


class LaneRunner(Protocol):
    """Runs the forward and backward passes of L lanes: lane by lane, folded, or fused.

    modules        the modules that hold the lanes' buffers and have the train and eval modes
    channels_last  whether images are in channels-last memory format
    """

    modules: list[nn.Module]
    channels_last: bool

    @property
    def weights(self) -> Tensor:
        """The lanes' weights [L, P], including pruned ones."""

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """Add the gradient of each lane's mean loss to the lane's row of the gradients [L, P]; returns the losses [L].

        step_keys  [L, 3]  keys of the step's random draws
        """

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """Each lane's outputs for the same inputs [B, ...]; random draws use keys [L, 3]."""

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Write buffers [L, ...] into the modules."""

    def buffers(self) -> dict[str, Tensor]:
        """The modules' current buffers [L, ...]."""


class Trainer:
    """Trains the lanes of a bank. On CUDA, the step is captured as a CUDA graph and replayed where possible.

    A captured step reads fixed addresses, so these tensors are written in place before each step:

    epoch_keys, step_keys  [L, 3]  keys of the epoch's and of the step's first batch's random draws
    lr                     [L, S]  learning rates
    number                 [L]     the step's number, counted from 1
    swa_weight             [L]     weight of the step's new sample in the average; 0 if the step adds no sample

    done          the number of steps completed in the current training
    optimizers    the optimizers of the recipe; None if the settings describe the optimizer
    keeps_batches  whether a step's batches are needed again, by optimizers with a closure
    graphs        for each batch size, the index tensor [L, B] from which the graph reads its batch, and the graph
    not_captured  the reason why steps are not captured; None if they are
    """

    def __init__(self, problem: Problem, bank: ParticleBank, grads: Tensor, runner: LaneRunner) -> None:
        self.problem, self.bank, self.grads, self.runner = problem, bank, grads, runner
        self.epoch_keys, self.step_keys = self.bank.keys.clone(), self.bank.keys.clone()
        self.lr = torch.zeros_like(bank.weight_decay)
        self.loss_sum = torch.zeros(bank.lanes, dtype=torch.float64, device=problem.device)
        self.number, self.swa_weight = torch.ones_like(self.loss_sum), torch.zeros_like(self.loss_sum)
        self.done = 0
        self.optimizers: LaneOptimizers | None = None
        own = problem.own_optimizer
        self.keeps_batches = own is not None and own.needs_closure
        self.graphs: dict[int, tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        self.not_captured = _why_not_captured(problem)

    def train(
        self,
        trainings: Sequence[Training],
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run all epochs, or those that remain after `state`; returns each lane's mean loss over the last epoch, [L].

        At the end, the bank receives the modules' buffers.

        trainings  one schedule per run, all with the same number of epochs
        on_step, on_epoch, state  as in BankEngine.train
        """
        problem, bank, steps, batches = self.problem, self.bank, self.problem.steps_per_epoch, len(self.problem.bounds)
        self.begin(state)
        if self.done and self.done % steps == 0:  # on_epoch itself may have been interrupted, so it is called again
            on_epoch(self.done // steps - 1, self.loss_sum / batches)
        for epoch in range(self.done // steps, trainings[0].epochs):
            first = self.done % steps
            if first == 0:
                self.loss_sum.zero_()
            self.epoch_keys.copy_(problem.epoch_keys(bank.keys, epoch))
            # What an epoch's steps need goes to the device in one transfer. One per step would make the host wait.
            rates = self._of_lanes([[training.lr(epoch * steps + i) for training in trainings] for i in range(steps)])
            weights = self._of_lanes(
                [[training.average_weight(epoch * steps + i) for training in trainings] for i in range(steps)]
            )
            for handles in problem.steps_of_epoch(self.epoch_keys, first):
                step, last = self.done, self.done % steps == steps - 1
                torch.mul(rates[step % steps, :, None], bank.lr_factors, out=self.lr)
                self.number.fill_(step + 1)
                self.swa_weight.copy_(weights[step % steps])
                self.step_keys.copy_(at_time(bank.keys, problem.first_batch_of(step)))
                self.step(*handles)
                self.done += 1
                if last:
                    on_epoch(epoch, self.loss_sum / batches)
                on_step(step)
        bank.buffers = self.runner.buffers()
        return self.loss_sum / batches

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """One run's state between two steps, from which its training can resume. The keys determine everything else."""
        lanes, bank_state = self.bank.lanes_of(run), self.bank.of_run(run).state()
        buffers = {f"buffers/{name}": buffer[lanes] for name, buffer in self.runner.buffers().items()}
        own = {} if self.optimizers is None else self.optimizers.state(lanes)
        return {"done": torch.tensor(self.done), "loss_sum": self.loss_sum[lanes], **bank_state, **buffers, **own}

    def _of_lanes(self, of_runs: list[list[float]]) -> Tensor:
        """A float64 tensor [n, L], in which the runs' numbers [n, R] are repeated for the lanes of each run."""
        numbers = torch.tensor(of_runs, dtype=torch.float64, device=self.lr.device)
        return numbers.repeat_interleave(self.bank.lanes // len(self.bank.configs), 1)

    def begin(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Prepare a training from its first step, or restore it from a `state` at a later step."""
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
        if self.problem.own_optimizer is not None:
            self.optimizers = LaneOptimizers(self.problem, self.bank, self.grads)
            if state is not None:
                self.optimizers.load_state_(state)

    def step(self, *handles: Any) -> None:
        """Take one step of every lane, by replaying a graph if the step can be captured.

        handles  refer to the step's batches; captured steps have one, an index tensor [L, B]
        """
        if self.not_captured is None:
            (handle,) = handles
            size = handle.shape[1]
            if size not in self.graphs:
                self._capture(handle.clone(memory_format=torch.contiguous_format))
        if self.not_captured is None:
            index, graph = self.graphs[size]
            index.copy_(handle)
            graph.replay()
        else:
            self._step(*handles)

    def _step(self, *handles: Any) -> None:
        """Take one step of every lane by direct calls."""
        self.grads.zero_()
        batches = []
        for number, handle in enumerate(handles):
            keys = later(self.step_keys, number)
            batch = self.problem.fetch(handle, self.epoch_keys, keys, self.runner.channels_last)
            self.loss_sum.add_(self.runner.backward(batch, keys))
            if self.keeps_batches:
                batches.append((batch, keys))
        if len(handles) > 1:
            self.grads.div_(len(handles))
        if self.optimizers is None:
            self._update()
        else:
            again = partial(self._backward_again, batches)
            self.optimizers.step(self.lr[:, 0].tolist(), self.step_keys, self.swa_weight, again)

    def _backward_again(self, batches: list[tuple[Batch, Tensor]], lane: int) -> Tensor:
        """Compute one lane's gradients on the step's batches again, and return its mean loss.

        The running statistics of its norms stay as they are.

        batches  each batch with its keys [L, 3]
        """
        assert isinstance(self.runner, LaneByLane)
        norms = norms_of([self.runner.modules[lane]])
        before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
        losses = [self.runner.backward_of_lane(lane, batch, keys[lane : lane + 1]) for batch, keys in batches]
        if len(batches) > 1:
            self.grads[lane].div_(len(batches))
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])
        return torch.stack(losses).mean()

    def _update(self) -> None:
        """Update weights, moments and averages from the gradients."""
        bank, scale = self.bank, None
        if bank.clip_norm is not None:
            scale = ops.clip_scale(self.grads, bank.masks, bank.run_of_lane, bank.clip_norm)
        common: dict[str, Any] = {
            **bank.rates,
            "lr": self.lr,
            "weight_decay": bank.weight_decay,
            "segment_ends": bank.segment_ends,
            "grad_scale": scale,
            "swa": bank.swa,
            "swa_weight": self.swa_weight,
        }
        state = (bank.weights, self.grads, *bank.moments.values(), bank.masks, bank.run_of_lane)
        if bank.config.optimizer == "adamw":
            ops.masked_adamw_(*state, step=self.number, **common)
        else:
            ops.masked_sgd_(*state, nesterov=bank.config.nesterov, **common)

    def _capture(self, index: Tensor) -> None:
        """Capture a step over `index` [L, B], then restore what the warm-up steps changed."""
        state = [*self.bank.moving().values(), self.loss_sum]
        state += [buffer for module in self.runner.modules for buffer in module.buffers()]
        saved = [tensor.clone() for tensor in state]
        try:
            with torch.cuda.device(self.problem.device):  # torch creates streams, graphs and pools on this device
                self._record(index)
        finally:
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)

    def _record(self, index: Tensor) -> None:
        """Take warm-up steps over `index` [L, B] on the current device, then capture a step.

        If the capture fails, the reason is stored in `not_captured`.
        """
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
            # A failed capture leaves its stream current and its memory pool in use; no later capture could begin.
            torch.cuda.set_stream(here)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.problem.device.index, pool)
            torch.cuda.synchronize()  # pending work must not overwrite the tensors that _capture restores
            first = error.__context__ or error  # the original failure, if `error` was raised by ending the capture
            self.not_captured = f"capture failed: {str(first).splitlines()[0]}"


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the states of consecutive parts of a training's lanes into the state of the training."""
    first, *_ = states
    return {
        name: value if name == "done" else torch.cat([part[name] for part in states]) for name, value in first.items()
    }


def part_of(state: Mapping[str, Tensor], lanes: range, count: int) -> dict[str, Tensor]:
    """The inverse of `joined`: the state of the lanes in a range, out of a training with `count` lanes."""

    def rows_of_lanes(value: Tensor) -> Tensor:
        rows = len(value) // count
        return value[lanes.start * rows : lanes.stop * rows]

    return {name: value if name == "done" else rows_of_lanes(value) for name, value in state.items()}


def _why_not_captured(problem: Problem) -> str | None:
    """The reason why a step can't be captured as a CUDA graph; None if it can."""
    if problem.device.type != "cuda":
        return "not on CUDA"
    if problem.train.streamed:
        return "the data are streamed"
    if problem.config.accumulate > 1:
        return "a step takes several batches"
    if mixes(problem.config):
        return "mixup and CutMix draw on the host"
    if problem.own_optimizer is not None:
        return "the recipe's optimizers run in Python"
    if problem.probe.draws_elsewhere or problem.transform is not None:
        return "the model or the transform may draw from torch's generators"
    if problem.probe.keeps_state or problem.probe.changed:
        return "the model's forward changes its buffers or attributes, which a graph would not replay"
    if problem.probe.reads_values is not None:
        return f"the model's forward looks at values ({problem.probe.reads_values})"
    return None


def first_handle(problem: Problem, bank: ParticleBank) -> Any:
    """The handle of the first batch of the first epoch, for timing a step."""
    return next(problem.steps_of_epoch(problem.epoch_keys(bank.keys, 0)))[0]
