"""Training steps to be timed: the fused engine's, the eager engine's, and the loops that people write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu import ticket
from swamp_fast.data.store import Batch
from swamp_fast.engines.comparison import in_float64
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.engines.trainer import Trainer, first_handle
from swamp_fast.models import build_model
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem

Step = Callable[[], object]
LR = 1e-3
FLOOR = {"bfloat16": 2**-8, "float32": 2**-20, "float64": 2**-40}  # of an error, relative: a rounding of the result


def problem_of(model: str, particles: int, batch: int, precision: str, device: torch.device, size: int = 32) -> Problem:
    """A network on four batches of random pictures, CIFAR-10's by default; which they are is no matter for time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * batch, 3, size, size), dtype=torch.uint8, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_model(model, 3, size, size, 10)
    settings = {"particles": particles, "batch_size": batch, "precision": precision, "augment": "crop_flip"}
    settings |= {"device": str(device), "progress": False}
    return prepare(network, (images, torch.arange(len(images)) % 10), settings=settings)


def trainer_of(
    engine: FusedEngine | EagerEngine, problem: Problem, particles: int, mask: Tensor | None = None
) -> tuple[Trainer, Tensor]:
    """An engine's trainer of a fresh bank under a mask [Q], the problem's by default, and a batch for it.

    Raises RuntimeError where a GPU captures no graph.
    """
    bank = engine.spawn(ticket(problem), problem.mask if mask is None else mask, range(particles), 1)
    trainer = engine.trainer
    assert trainer is not None
    trainer.runner.set_buffers(bank.buffers)
    trainer.lr.fill_(LR)
    for module in trainer.runner.modules:
        module.train()
    handle = first_handle(problem, bank)
    trainer.step(handle)
    if problem.device.type == "cuda" and trainer.not_captured is not None:
        raise RuntimeError(f"the step is no CUDA graph: {trainer.not_captured}")
    return trainer, handle


def step_of(engine: FusedEngine | EagerEngine, problem: Problem, particles: int, mask: Tensor | None = None) -> Step:
    """A step of all particles, its data gathered and augmented on the device."""
    trainer, handle = trainer_of(engine, problem, particles, mask)
    return lambda: trainer.step(handle)


def errors(engine: FusedEngine, problem: Problem, particles: int) -> dict[str, float]:
    """How far the losses and gradients of a step, captured on a GPU, are from those of autograd in float64.

    Norms of the differences relative to float64's, the worst lane's, beside those of autograd in the run's own
    precision on the same weights and pictures. Raises RuntimeError where the engine's is over twice as large.
    """
    trainer, handle = trainer_of(engine, problem, particles)
    programs = engine.programs
    assert programs is not None
    batch = problem.train.fetch(handle, trainer.epoch_keys, False)
    weights, before = trainer.runner.weights.clone(), trainer.loss_sum.clone()
    trainer.step(handle)
    found = trainer.loss_sum - before, torch.stack([programs.compacts[0].expand(row) for row in trainer.grads])
    own = _autograd(problem, weights, batch, trainer.step_keys)
    exact_batch = Batch(batch.inputs.double(), batch.targets)
    exact = _autograd(in_float64(problem), weights.double(), exact_batch, trainer.step_keys)
    told: dict[str, float] = {}
    for what, mine, theirs, expected in zip(("losses", "gradients"), found, own, exact, strict=True):
        mine_off, theirs_off = _off(mine, expected), _off(theirs, expected)
        told |= {f"{what}, error": mine_off, f"{what}, autograd's error": theirs_off}
        if not mine_off <= 2 * theirs_off + FLOOR[problem.config.precision]:
            raise RuntimeError(
                f"the {what} of a step are {mine_off:.2g} from float64's, where autograd's in "
                f"{problem.config.precision} are {theirs_off:.2g}"
            )
    return told


def _autograd(problem: Problem, weights: Tensor, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor]:
    weights = weights.clone()
    grads = torch.zeros_like(weights)
    way = LaneByLane(problem, weights, grads, False)
    for module in way.modules:
        module.train()
    return way.backward(batch, keys), grads


def _off(found: Tensor, exact: Tensor) -> float:
    rows = found.double().view(len(found), -1), exact.view(len(exact), -1)
    return float(((rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1)).max())


class Loop:
    """What people write: one particle's network, autocast, SGD, masked weights; the data come as the fused engine's."""

    def __init__(self, problem: Problem, compiled: str | None = None) -> None:
        self.problem, device = problem, problem.device
        self.model = copy.deepcopy(problem.original).to(device).to(memory_format=torch.channels_last).train()
        self.run = torch.compile(self.model, mode=compiled) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, fused=True)
        masks = problem.layout.mask_views(problem.mask)
        parameters = dict(self.model.named_parameters())
        self.masked = [(parameters[name], each.to(torch.float32)) for name, each in masks.items()]
        self.keys = torch.zeros(1, 3, dtype=torch.int64, device=device)
        order = torch.arange(problem.train.length, device=device)[None]
        self.handle = next(iter(problem.train.batches(order, self.keys, problem.bounds[:1]))).contiguous()

    def step(self) -> None:
        """One step of one particle."""
        inputs, targets = self.problem.train.fetch(self.handle, self.keys, True).lane(0)
        self.optimizer.zero_grad()
        with torch.autocast(self.problem.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.run(inputs), targets)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, mask in self.masked:
                parameter.mul_(mask)


def in_one_graph(loops: Sequence[Loop]) -> Step:
    """A step of each loop, captured in one CUDA graph on forked streams; without a GPU one after the other."""
    if loops[0].problem.device.type != "cuda":

        def one_by_one() -> None:
            for loop in loops:
                loop.step()

        return one_by_one
    streams = [torch.cuda.Stream() for _ in loops]

    def fork() -> None:
        current = torch.cuda.current_stream()
        for loop, stream in zip(loops, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                loop.step()
        for stream in streams:
            current.wait_stream(stream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fork()
    here, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    here.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            fork()
    except RuntimeError:  # put back what a capture leaves that breaks off, or no contender behind it could capture
        torch.cuda.set_stream(here)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph.replay
