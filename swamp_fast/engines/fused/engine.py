"""The fused engine: lanes one after the other through a Program, on the kept weights alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.bank import ParticleBank, Solution
from swamp_fast.batchnorm import norms_of
from swamp_fast.data.store import Batch
from swamp_fast.data.streams import generators_left_alone
from swamp_fast.engines.fused.compact import Compact, CompactBank
from swamp_fast.engines.fused.program import Program, Rows
from swamp_fast.engines.lanes import read_buffers, write_buffers
from swamp_fast.engines.trainer import Trainer, first_handle
from swamp_fast.plan import Convolution, Plan
from swamp_fast.problem import Problem
from swamp_fast.schedule import Training
from swamp_fast.trace import NotCovered, plan_of

STEPS = 3  # that are timed


class FusedEngine:
    """Trains a bank of particles and runs models side by side for evaluation, by the kernels of csrc/cpu/fused.

    rows  of each cycle ("ticket" for the ticket's): how its convolutions share loads, by a stopwatch; part of a run's
          state, so that resuming replays it
    """

    name = "fused"

    def __init__(self, problem: Problem, plan: Plan, why: str, rows: dict[str, Rows]) -> None:
        self.problem, self.plan, self.why, self.rows = problem, plan, why, rows
        self.programs: Programs | None = None
        self.trainer: Trainer | None = None

    def spawn(self, start: Solution, mask: Tensor, particles: int, cycle: int | None) -> ParticleBank:
        """The bank with `particles` lanes at `start` under a mask [Q]; it and its program are made for the mask."""
        self.release()  # before new memory is taken
        compact = Compact(self.problem.layout, mask)
        rows = self.rows.setdefault("ticket" if cycle is None else str(cycle), {})
        self.programs = Programs(self.problem, self.plan, compact, rows)
        bank = CompactBank(compact, self.problem.config, particles, self.problem.dtype)
        bank.rewind_(start, mask, cycle)
        grads = torch.zeros_like(bank.weights)
        self.programs.of(self.problem.bounds[0][1], trains=True)  # measures now what is recorded before the first step
        self.trainer = Trainer(self.problem, bank, grads, Fused(self.problem, self.programs, bank.weights, grads))
        return bank

    def release(self) -> None:
        """Give the memory of training and evaluation back."""
        self.programs = self.trainer = None

    def train(
        self,
        bank: ParticleBank,
        training: Training,
        on_step: Callable[[int], None],
        on_epoch: Callable[[int, Tensor], None],
    ) -> Tensor:
        """As EagerEngine.train."""
        assert self.trainer is not None
        assert self.trainer.bank is bank
        return self.trainer.train(training, on_step, on_epoch)

    def side_by_side(self, weights: Tensor, buffers: dict[str, Tensor]) -> Fused:
        """As EagerEngine.side_by_side."""
        assert self.programs is not None
        way = Fused(self.problem, self.programs, self.programs.compact.compact(weights), None)
        way.set_buffers(buffers)
        for module in way.modules:
            module.eval()
        return way

    def describe(self) -> dict[str, Any]:
        """What ran, how, and why."""
        return {"engine": self.name, "why": self.why, "operations": self.plan.count(), "rows": self.rows}


def seconds_of_steps(engine: Any, problem: Problem, mask: Tensor) -> float:
    """The least time of a step of one particle under a mask, after one to warm up."""
    start = Solution(
        problem.layout.flat(dict(problem.template.named_parameters()), problem.dtype, problem.device),
        {name: buffer.detach().clone() for name, buffer in problem.template.named_buffers()},
    )
    bank = engine.spawn(start, mask, 1, None)
    trainer = engine.trainer
    trainer.way.set_buffers(bank.buffers)
    for module in trainer.way.modules:
        module.train()
    handle = first_handle(problem, bank)
    times = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        trainer.step(handle)
        times.append(time.perf_counter() - began)
    return min(times[1:])


class Programs:
    """The programs under one mask, one for each size of batch."""

    def __init__(self, problem: Problem, plan: Plan, compact: Compact, rows: Rows) -> None:
        self.problem, self.plan, self.compact, self.rows = problem, plan, compact, rows
        self.made: dict[tuple[int, bool], Program] = {}

    def of(self, samples: int, trains: bool) -> Program:
        """The program for so many samples; one that trains evaluates too."""
        for key in ((samples, True), (samples, trains)):
            if key in self.made:
                return self.made[key]
        storage = torch.bfloat16 if self.problem.config.precision == "bfloat16" else self.problem.dtype
        made = Program(self.plan, self.compact, samples, self.problem.dtype, storage, self.rows, trains)
        self.made[samples, trains] = made
        return made


class Fused:
    """Lanes over compact weights [L, P'], whose gradients go to grads [L, P']; the modules hold the buffers alone."""

    channels_last = False

    def __init__(self, problem: Problem, programs: Programs, weights: Tensor, grads: Tensor | None) -> None:
        self.problem, self.programs, self.compact_weights, self.grads = problem, programs, weights, grads
        self.modules: list[nn.Module] = [_without_weights(problem.template) for _ in range(len(weights))]
        self.norms = [[module.get_submodule(path) for path in programs.plan.norms] for module in self.modules]
        self.running = [_side_by_side(norms, problem.dtype) for norms in self.norms]

    @property
    def weights(self) -> Tensor:
        """[L, P] in full."""
        return self.programs.compact.expand(self.compact_weights)

    def backward(self, batch: Batch, step_keys: Tensor) -> Tensor:
        """As LaneByLane.backward."""
        assert self.grads is not None
        losses = []
        for lane in range(len(self.modules)):
            key = step_keys[lane : lane + 1]
            inputs, targets = batch.lane(lane)
            inputs = self.problem.transformed(inputs, key)
            program = self.programs.of(len(inputs), trains=True)
            outputs = self._run(program, lane, inputs, key).requires_grad_()
            loss = self.problem.losses(outputs.clone(), targets).mean()  # a loss may change what it is given
            (out_grad,) = torch.autograd.grad(loss, outputs)
            self.grads[lane].add_(program.backward(out_grad.to(self.grads.dtype)))
            losses.append(loss.detach())
        return torch.stack(losses)

    def outputs(self, inputs: Any, keys: Tensor) -> list[Any]:
        """As LaneByLane.outputs."""
        program = self.programs.of(len(inputs), trains=False)
        return [self._run(program, lane, inputs, None) for lane in range(len(self.modules))]

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        """As LaneByLane.set_buffers."""
        write_buffers(self.modules, buffers)

    def buffers(self) -> dict[str, Tensor]:
        """As LaneByLane.buffers."""
        return read_buffers(self.modules)

    def _run(self, program: Program, lane: int, inputs: Tensor, key: Tensor | None) -> Tensor:
        """Outputs of a lane; running statistics move where the norms train."""
        norms, (mean, variance, batches) = self.norms[lane], self.running[lane]
        by_batch = bool(norms) and norms[0].training
        if norms and not by_batch:
            program.mean.copy_(mean)
            program.variance.copy_(variance)
        outputs = program.run(inputs, self.compact_weights[lane], by_batch, key)
        if by_batch:
            momentum = float(norms[0].momentum)  # type: ignore[arg-type]
            mean.lerp_(program.mean, momentum)
            variance.lerp_(program.variance * program.unbiased, momentum)
            batches.add_(1)
        return outputs


def fused_plan(problem: Problem) -> Plan | str:
    """The plan by which the fused engine can run the model, or why it can't."""
    if problem.device.type != "cpu":
        return "it runs on CPU only, so far"
    if not problem.train.stacked:
        return "the batches come from a collate function of the user's"
    probe = problem.probe
    if probe.draws_elsewhere:
        return "its forward draws random numbers that are not dropout's"
    if probe.keeps_state:
        return "its forward keeps state of its own"
    if probe.changed:
        return f"its forward changes {probe.changed[0]}"
    if probe.reads_values is not None:
        return f"its forward looks at values ({probe.reads_values})"
    keys = torch.zeros(1, 3, dtype=torch.int64)
    handle = next(iter(problem.train.batches(torch.arange(problem.train.length)[None], keys, [problem.bounds[0]])))
    inputs, _ = problem.train.fetch(handle, None).lane(0)
    if problem.transform is not None and isinstance(inputs, Tensor):
        with generators_left_alone():
            if problem.transform(inputs.clone()).shape != inputs.shape:
                return "the transform changes the shape of its inputs"
    try:
        plan = plan_of(problem.template, problem.forward, inputs)
    except NotCovered as reason:
        return str(reason)
    weights = {op.weight for op in plan.ops if isinstance(op, Convolution)}
    for entry in problem.layout.prunable:
        if entry.name not in weights:
            return f"{entry.name} is pruned and is no weight of a convolution or a linear layer"
    frozen = [name for name, p in problem.template.named_parameters() if not p.requires_grad]
    if frozen:
        return f"{frozen[0]} is frozen"
    template = copy.deepcopy(problem.template).train()
    norms = norms_of([template])
    for path, module in template.named_modules():
        if module in norms and not module.training:
            return f"{path} ({type(module).__name__}) doesn't train"
        if module in norms and module.momentum != norms[0].momentum:
            return f"{path} ({type(module).__name__}) has another momentum than the first norm"
    if len(norms) != len(plan.norms):
        return "it has norms that its forward doesn't use"
    return plan


def _without_weights(template: nn.Module) -> nn.Module:
    module = copy.deepcopy(template)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return module


def _side_by_side(norms: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Running means, variances and counts of the norms as one vector each, of which their buffers become views."""
    mean = torch.cat([norm.running_mean for norm in norms]) if norms else torch.zeros(0, dtype=dtype)
    variance = torch.cat([norm.running_var for norm in norms]) if norms else torch.zeros(0, dtype=dtype)
    batches = torch.stack([norm.num_batches_tracked for norm in norms]) if norms else torch.zeros(0, dtype=torch.int64)
    begin = 0
    for place, norm in enumerate(norms):
        end = begin + len(norm.running_mean)
        norm.running_mean, norm.running_var = mean[begin:end], variance[begin:end]
        norm.num_batches_tracked = batches[place]
        begin = end
    return mean, variance, batches
