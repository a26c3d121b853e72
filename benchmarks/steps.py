"""Training steps for benchmarks: those of this project's engines, and those of loops that people write by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.data.store import Batch
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.engines.self_check import in_float64
from swamp_fast.engines.trainer import Trainer, first_handle
from swamp_fast.models import build_model
from swamp_fast.particles.bank import Solution
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem

Step = Callable[[], object]
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4  # for every timed step
# Relative errors below these are ignored, because rounding the result alone causes them.
ROUNDING = {"bfloat16": 2**-8, "float32": 2**-20, "float64": 2**-40}


def random_pictures(count: int, shape: tuple[int, int, int] = (3, 32, 32)) -> tuple[Tensor, Tensor]:
    """Return random uint8 pictures [count, C, H, W] and labels [count]. A step's time doesn't depend on the content."""
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % 10


def seeded_model(name: str, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Return a network with the same initial weights in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(name, *shape, 10)


def problem_of(
    model: str, particles: int, batch: int, shape: tuple[int, int, int] = (3, 32, 32), batches: int = 4, **changed: Any
) -> Problem:
    """Prepare the training of a network on `batches` batches of random pictures; `changed` are additional settings."""
    settings = {"particles": particles, "batch_size": batch, "augment": "crop_flip", "device": "cpu", "progress": False}
    return prepare(seeded_model(model, shape), random_pictures(batches * batch, shape), settings=settings | changed)


def initial_solution(problem: Problem) -> Solution:
    """Return the initial weights and buffers of a problem's network."""
    weights = problem.layout.flat(dict(problem.template.named_parameters()), problem.dtype, problem.device)
    return Solution(weights, {name: buffer.clone() for name, buffer in problem.template.named_buffers()})


def covered_plan(problem: Problem) -> Plan:
    """Return the fused engine's plan of a network. Raise RuntimeError if the engine doesn't cover it."""
    plan = fused_plan(problem)
    if isinstance(plan, str):
        raise RuntimeError(plan)
    return plan


def trainer_of(
    engine: FusedEngine | EagerEngine, problem: Problem, particles: int, mask: Tensor | None = None
) -> tuple[Trainer, Tensor]:
    """Return an engine's trainer for a new bank, warmed up by one step, and the handle of a batch to train on.

    mask  [Q], by default that of the problem

    Raises RuntimeError if the step runs on a GPU and can't be captured as a CUDA graph.
    """
    bank = engine.spawn(initial_solution(problem), problem.mask if mask is None else mask, range(particles), 1)
    trainer = engine.trainer
    assert trainer is not None
    trainer.runner.set_buffers(bank.buffers)
    trainer.lr.fill_(LR)
    for module in trainer.runner.modules:
        module.train()
    handle = first_handle(problem, bank)
    trainer.step(handle)
    if problem.device.type == "cuda" and trainer.not_captured is not None:
        raise RuntimeError(f"the step can't be captured as a CUDA graph: {trainer.not_captured}")
    return trainer, handle


def step_of(engine: FusedEngine | EagerEngine, problem: Problem, particles: int, mask: Tensor | None = None) -> Step:
    """Return a step of all particles, including the gathering and augmenting of its batch on the device."""
    trainer, handle = trainer_of(engine, problem, particles, mask)
    return lambda: trainer.step(handle)


def errors(engine: FusedEngine, problem: Problem, particles: int) -> dict[str, float]:
    """Compare the losses and gradients of one step with those of autograd in float64.

    Returns the relative norm of each difference for the worst lane. Returns the same for autograd in the precision of
    the run, on the same weights and pictures. Raises RuntimeError if the engine's error is more than twice autograd's.
    """
    trainer, handle = trainer_of(engine, problem, particles)
    programs = engine.programs
    assert programs is not None
    batch = problem.train.fetch(handle, trainer.epoch_keys, False)
    weights, loss_before = trainer.runner.weights.clone(), trainer.loss_sum.clone()
    trainer.step(handle)
    grads = torch.stack([programs.compacts[0].expand(row) for row in trainer.grads])
    by_engine = trainer.loss_sum - loss_before, grads
    by_autograd = _autograd(problem, weights, batch, trainer.step_keys)
    exact_batch = Batch(batch.inputs.double(), batch.targets)
    exact = _autograd(in_float64(problem), weights.double(), exact_batch, trainer.step_keys)
    report: dict[str, float] = {}
    for what, ours, theirs, expected in zip(("losses", "gradients"), by_engine, by_autograd, exact, strict=True):
        our_error, their_error = _worst_error(ours, expected), _worst_error(theirs, expected)
        report |= {f"{what}, error": our_error, f"{what}, autograd's error": their_error}
        if not our_error <= 2 * their_error + ROUNDING[problem.config.precision]:
            raise RuntimeError(
                f"the {what} of a step have a relative error of {our_error:.2g} against float64, those of autograd in "
                f"{problem.config.precision} {their_error:.2g}"
            )
    return report


def _autograd(problem: Problem, weights: Tensor, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor]:
    weights = weights.clone()
    grads = torch.zeros_like(weights)
    runner = LaneByLane(problem, weights, grads, False)
    for module in runner.modules:
        module.train()
    return runner.backward(batch, keys), grads


def _worst_error(values: Tensor, exact: Tensor) -> float:
    rows, exact_rows = values.double().view(len(values), -1), exact.view(len(exact), -1)
    return float(((rows - exact_rows).norm(dim=1) / exact_rows.norm(dim=1)).max())


def trainable_copy(problem: Problem) -> nn.Module:
    """Return a copy of the problem's network in the run's type and on its device, in training mode."""
    return copy.deepcopy(problem.original).to(problem.device, problem.dtype).train()


class FirstBatch:
    """The first training batch of one lane. Each call gathers and augments it again."""

    def __init__(self, problem: Problem, channels_last: bool) -> None:
        self.train, self.channels_last = problem.train, channels_last
        self.keys = torch.zeros(1, 3, dtype=torch.int64, device=problem.device)
        order = torch.arange(problem.train.length, device=problem.device)[None]
        self.handle = next(iter(problem.train.batches(order, self.keys, problem.bounds[:1]))).contiguous()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return inputs [B, C, H, W] and targets [B]."""
        inputs, targets = self.train.fetch(self.handle, self.keys, self.channels_last).lane(0)
        return inputs, targets


class NaiveLoop:
    """The loop that people write by hand: one network, autograd, torch.optim.SGD, and weights that are masked.

    fetches  whether each step gathers and augments a batch, as a step of the fused engine does; else all steps use the
             same tensors
    mask     [Q], by default that of the problem
    """

    def __init__(
        self,
        problem: Problem,
        *,
        mask: Tensor | None = None,
        channels_last: bool = True,
        compiled: bool = False,
        fetches: bool = True,
    ) -> None:
        self.problem = problem
        model = trainable_copy(problem)
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.run = torch.compile(self.model) if compiled else self.model
        options: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **options)
        masks = problem.layout.mask_views(problem.mask if mask is None else mask)
        parameters = dict(self.model.named_parameters())
        self.masked = [(parameters[name], each.to(problem.dtype)) for name, each in masks.items()]
        self.mask_weights()
        self.fetch = FirstBatch(problem, channels_last)
        self.batch = None if fetches else self.fetch()

    def mask_weights(self) -> None:
        """Set the pruned weights to zero."""
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)

    def step(self) -> None:
        """Train one particle for one step."""
        inputs, targets = self.fetch() if self.batch is None else self.batch
        self.optimizer.zero_grad()
        low = self.problem.config.precision == "bfloat16"
        with torch.autocast(self.problem.device.type, torch.bfloat16, enabled=low):
            loss = F.cross_entropy(self.run(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.mask_weights()


def stacked_step(problem: Problem, lanes: int, compiled: bool = False) -> Step:
    """Return a step of `lanes` particles at once, by stacked parameters and vmap, with a handwritten SGD update.

    There are no masks. BatchNorm has no running statistics, because vmap can't update them in place.
    """
    models = [torch.func.replace_all_batch_norm_modules_(trainable_copy(problem)) for _ in range(lanes)]
    weights, buffers = torch.func.stack_module_state(models)
    momenta = {name: torch.zeros_like(each) for name, each in weights.items()}
    inputs, targets = FirstBatch(problem, channels_last=False)()
    inputs, targets = inputs.expand(lanes, *inputs.shape), targets.expand(lanes, *targets.shape)
    low = problem.config.precision == "bfloat16"

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        if low:  # cast by hand, since autocast under vmap gives gradients another type than their weights have
            weights, inputs = {name: each.bfloat16() for name, each in weights.items()}, inputs.bfloat16()
        outputs = torch.func.functional_call(models[0], (weights, buffers), (inputs,))
        return F.cross_entropy(outputs.float(), targets)

    gradient: Any = torch.func.vmap(torch.func.grad(loss), randomness="different")
    if compiled:
        gradient = torch.compile(gradient)

    def step() -> None:
        grads = gradient(weights, buffers, inputs, targets)
        with torch.no_grad():
            for name, weight in weights.items():
                momenta[name].mul_(MOMENTUM).add_(grads[name]).add_(weight, alpha=WEIGHT_DECAY)
                weight.sub_(momenta[name], alpha=LR)

    return step


def in_one_graph(loops: Sequence[NaiveLoop]) -> Step:
    """Return a step of all loops, captured in one CUDA graph on forked streams; on a CPU they run one by one."""
    if loops[0].problem.device.type != "cuda":

        def one_by_one() -> None:
            for loop in loops:
                loop.step()

        return one_by_one
    streams = [torch.cuda.Stream() for _ in loops]

    def forked() -> None:
        current = torch.cuda.current_stream()
        for loop, stream in zip(loops, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                loop.step()
        for stream in streams:
            current.wait_stream(stream)

    warm_up_stream = torch.cuda.Stream()
    warm_up_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up_stream):
        for _ in range(3):
            forked()
    current, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    current.wait_stream(warm_up_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            forked()
    except RuntimeError:  # clean up after a failed capture, or no later contender could capture
        torch.cuda.set_stream(current)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph.replay
