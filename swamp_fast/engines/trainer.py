"""A step of all lanes, and a training of many: what every engine does around its forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swamp_fast import ops
from swamp_fast.config import SwampConfig
from swamp_fast.data.store import Batch
from swamp_fast.particles.bank import ParticleBank, Solution
from swamp_fast.particles.norms import reset_running_stats
from swamp_fast.particles.random import at_time, epoch_order
from swamp_fast.particles.schedule import Training
from swamp_fast.problem.problem import Problem


class LaneRunner(Protocol):
    """How lanes run: folded, lane by lane, or fused.

    modules  hold the buffers, and whether they train
    """

    modules: list[nn.Module]
    channels_last: bool

    @property
    def weights(self) -> Tensor:
        """[L, P] in full."""

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """Add each lane's gradient of its mean loss to its row of the gradients; returns the losses [L]."""

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """Each lane's outputs on the same inputs [B, ...]; what it draws, it draws with keys [L, 3]."""

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Write buffers [L, ...] into the modules."""

    def buffers(self) -> dict[str, Tensor]:
        """The modules' buffers as they are now, [L, ...]."""


class Trainer:
    """A bank, its gradients, and the step over them; on CUDA the step is captured in a graph and replayed.

    Everything a step reads stands at a fixed address: index [L, B], keys [L, 3] at the epoch and at the step,
    rates [L], the step's number [L], 1 for the first, and the share of an SWA sample [L], 0 for none.

    done  steps of the training under way
    """

    def __init__(self, problem: Problem, bank: ParticleBank, grads: Tensor, way: LaneRunner) -> None:
        self.problem, self.bank, self.grads, self.way = problem, bank, grads, way
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
        """All epochs of a training, from a `state` on if there is one; the bank's buffers end as the modules'.

        Each run has its own rates; the epochs are as many.
        """
        problem, bank, steps = self.problem, self.bank, len(self.problem.bounds)
        self._begin(state)
        if self.done and self.done % steps == 0:  # it may have stopped at what was seen then
            on_epoch(self.done // steps - 1, self.loss_sum / steps)
        for epoch in range(self.done // steps, trainings[0].epochs):
            first = self.done % steps
            if first == 0:
                self.loss_sum.zero_()
            self.epoch_keys.copy_(at_time(bank.keys, epoch))
            order = epoch_order(self.epoch_keys, problem.train.length)
            # For all steps at once: a number sent from the host at each would make it wait for the device.
            rates = self._of_lanes([[each.lr(epoch * steps + i) for each in trainings] for i in range(steps)])
            (shares,) = self._of_lanes([[each.swa_weight(epoch) for each in trainings]])
            for handle in problem.train.batches(order, self.epoch_keys, problem.bounds[first:]):
                step, last = self.done, self.done % steps == steps - 1
                self.lr.copy_(rates[step % steps])
                self.number.fill_(step + 1)
                self.swa_weight.copy_(shares) if last else self.swa_weight.zero_()
                self.step_keys.copy_(at_time(bank.keys, step))
                self.step(handle)
                self.done += 1
                if last:
                    on_epoch(epoch, self.loss_sum / steps)
                on_step(step)
        bank.buffers = self.way.buffers()
        return self.loss_sum / steps

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """All that a run's training goes on from, between two steps; everything else follows from the keys."""
        lanes, own = self.bank.lanes_of(run), self.bank.of_run(run).state()
        buffers = {f"buffers/{name}": buffer[lanes] for name, buffer in self.way.buffers().items()}
        return {"done": torch.tensor(self.done), "loss_sum": self.loss_sum[lanes], **own, **buffers}

    def _of_lanes(self, of_runs: list[list[float]]) -> Tensor:
        """Numbers of runs, [S, R], as those of their lanes, [S, L]."""
        each = torch.tensor(of_runs, dtype=torch.float64, device=self.lr.device)
        return each.repeat_interleave(self.bank.lanes // len(self.bank.configs), 1)

    def _begin(self, state: Mapping[str, Tensor] | None) -> None:
        """Put the modules at the start of a training, or all at a `state` inside it."""
        self.done = 0
        self.way.set_buffers(self.bank.buffers)
        reset_running_stats(self.way.modules)
        for module in self.way.modules:
            module.train()
        if state is not None:
            self.done = int(state["done"])
            self.loss_sum.copy_(state["loss_sum"])
            self.bank.load_state_(state)
            self.way.set_buffers({name: state[f"buffers/{name}"] for name in self.bank.buffers})

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
        self.grads.zero_()
        batch = self.problem.train.fetch(handle, self.epoch_keys, self.way.channels_last)
        losses = self.way.backward(batch, self.step_keys)
        self.loss_sum.add_(losses)
        self._update()

    def _update(self) -> None:
        """The optimizer's step and the SWA means, by the gradients."""
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
        """Record a step over `index` [L, B]; what the warm-up changed is put back."""
        state = [*self.bank.moving().values(), self.loss_sum]
        state += [buffer for module in self.way.modules for buffer in module.buffers()]
        saved = [tensor.clone() for tensor in state]
        try:
            with torch.cuda.device(self.problem.device):  # streams, graphs and pools are made on the current one
                self._record(index)
        finally:
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)

    def _record(self, index: Tensor) -> None:
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
            # What broke off leaves its stream current and memory going to its pool, so that no later capture begins.
            torch.cuda.set_stream(here)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.problem.device.index, pool)
            torch.cuda.synchronize()  # what is under way must not change what is put back
            first = error.__context__ or error  # ending the capture raises too
            self.not_captured = f"capture failed: {str(first).splitlines()[0]}"


class BankEngine:
    """What engines have in common that train one bank at a time.

    joins  whether lanes of several runs can stand in one bank
    """

    problem: Problem
    trainer: Trainer | None
    joins: bool

    def spawn(
        self,
        start: Solution,
        mask: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        config: SwampConfig | None = None,
    ) -> ParticleBank:
        """The bank at `start` under a mask [Q], a lane for each of `particles`.

        particles  their numbers, which decide what they draw
        config     of the run, if it isn't the engine's own problem's
        """
        return self.spawn_runs([start], mask[None], particles, cycle, [config or self.problem.config])

    def spawn_runs(
        self,
        starts: Sequence[Solution],
        masks: Tensor,
        particles: Sequence[int],
        cycle: int | None,
        configs: Sequence[SwampConfig],
    ) -> ParticleBank:
        """As `spawn`, of R runs with the same particles each, at their starts under their masks [R, Q]."""
        raise NotImplementedError

    def train(
        self,
        bank: ParticleBank,
        training: Training,
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        state: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Train all lanes through a schedule; returns each lane's mean loss over the last epoch, [L].

        on_step(step) is called after each step, on_epoch(epoch, mean losses [L]) before it after an epoch's last.
        With a `state` of this training it goes on from there, to the same bits.
        """
        return self.train_runs(bank, [training], on_step, on_epoch, None if state is None else [state])

    def train_runs(
        self,
        bank: ParticleBank,
        trainings: Sequence[Training],
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Tensor:
        """As `train`, each run's lanes through its own schedule, and from its own state, all after as many steps."""
        assert self.trainer is not None
        assert self.trainer.bank is bank
        return self.trainer.train(trainings, on_step, on_epoch, None if states is None else joined(states))

    def state(self, run: int = 0) -> dict[str, Tensor]:
        """All that a run's training under way goes on from."""
        assert self.trainer is not None
        return self.trainer.state(run)


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a training from those of its lanes' parts, in order."""
    first, *_ = states
    return {
        name: each if name == "done" else torch.cat([part[name] for part in states]) for name, each in first.items()
    }


def part_of(state: Mapping[str, Tensor], lanes: range, count: int) -> dict[str, Tensor]:
    """The inverse of `joined`: what of a training's state belongs to some of its lanes, `count` in all."""

    def own(each: Tensor) -> Tensor:
        rows = len(each) // count
        return each[lanes.start * rows : lanes.stop * rows]

    return {name: each if name == "done" else own(each) for name, each in state.items()}


def _why_not_captured(problem: Problem) -> str | None:
    """Why the step can't be a CUDA graph; None if it may."""
    if problem.device.type != "cuda":
        return "not on CUDA"
    if problem.train.streamed:
        return "the data are streamed"
    if problem.probe.draws_elsewhere or problem.transform is not None:
        return "the model or the transform may draw from torch's generators"
    if problem.probe.keeps_state or problem.probe.changed:
        return "the model's forward changes buffers or attributes of its own, which a graph would not replay"
    if problem.probe.reads_values is not None:
        return f"the model's forward looks at values ({problem.probe.reads_values})"
    return None


def first_handle(problem: Problem, bank: ParticleBank) -> Any:
    """The first batch of the first epoch, to time a step on."""
    order = epoch_order(bank.keys, problem.train.length)
    return next(iter(problem.train.batches(order, bank.keys, problem.bounds[:1])))
