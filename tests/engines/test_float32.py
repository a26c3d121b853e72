"""fast_swamp in float32: single steps are compared with the naive loop.

Whole runs can't be compared, because rounding errors grow during training. So the steps begin at several states of a
naive run. The error of a gradient or an update, relative to float64, may be at most twice that of the naive loop in the
same memory format. (On a CPU, torch's BatchNorm rounds more coarsely with channels last than with channels first.)
"""

from __future__ import annotations

import copy
import statistics
from functools import partial

import networks
import pytest
import torch
from networks import CASES

from benchmarks.agreement import agreement, agreements, pruned
from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import eager_trainer
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import at_time, epoch_order, lane_keys, stream_of
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem

STATES = (0, 4, 11)  # the steps of the naive run at which the compared steps begin
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


class Naive:
    """Takes the naive loop's steps on one particle, with a plain module and torch.optim.SGD."""

    def __init__(self, problem: Problem, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.problem, self.module = problem, copy.deepcopy(problem.template).train()
        self.parameters = dict(self.module.named_parameters())
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        self.masks = problem.layout.mask_views(problem.mask)

    def load(self, weights: torch.Tensor, momentum: torch.Tensor) -> None:
        for entry in self.problem.layout.entries:
            parameter = self.parameters[entry.name]
            parameter.data.copy_(self.problem.layout.view(weights, entry))
            self.optimizer.state[parameter]["momentum_buffer"] = self.problem.layout.view(momentum, entry).to(
                parameter.dtype, copy=True
            )
        for name, mask in self.masks.items():
            self.parameters[name].data.mul_(mask)

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        layout, dtype = self.problem.layout, self.problem.dtype
        buffers = {n: self.optimizer.state[p]["momentum_buffer"] for n, p in self.parameters.items()}
        device = self.problem.device
        return layout.flat(self.parameters, dtype, device), layout.flat(buffers, dtype, device)

    def step(self, index: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Take one step; returns the gradient [P] before masking."""
        inputs, targets = self.problem.train.fetch(index, keys, self.channels_last).lane(0)
        self.optimizer.zero_grad()
        with DropoutStream(keys):
            self.problem.losses(self.problem.forward(self.module, inputs), targets).mean().backward()
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = self.problem.layout.flat(
            {n: p.grad for n, p in self.parameters.items()}, self.problem.dtype, self.problem.device
        )
        for name, mask in self.masks.items():
            self.parameters[name].grad.mul_(mask)
        self.optimizer.step()
        for name, mask in self.masks.items():
            self.parameters[name].data.mul_(mask)
        return gradient


def problems(name: str, digits) -> tuple[Problem, Problem]:
    """The same pruned problem in float32 and float64."""
    model = networks.build(name)
    masks = {
        key: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        for key, p in model.named_parameters()
        if p.dim() >= 2
    }
    few = 96 if name == "resnet18" else 160
    data = ((digits[0][0][:few], digits[0][1][:few]), digits[1])
    made = []
    for precision in ("float32", "float64"):
        settings = {"particles": 3, "batch_size": 32, "precision": precision, "progress": False}
        names = {entry.name for entry in prepare(model, *data, settings=settings).layout.prunable}
        chosen = {key: mask for key, mask in masks.items() if key in names}
        made.append(prepare(model, *data, Arguments(initial_masks=chosen), settings=settings))
    return made[0], made[1]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm())


@pytest.mark.parametrize(("name", "mode", "channels_last"), CASES)
def test_one_step_errs_at_most_twice_as_much(name, mode, channels_last, digits):
    single, double = problems(name, digits)
    naive = Naive(single, channels_last)
    naive.load(single.layout.flat(naive.parameters, single.dtype, single.device), torch.zeros(single.layout.P))
    keys = lane_keys([0], [stream_of(0, 0)], single.device)
    order = epoch_order(keys, single.train.length)
    batches = [order[:, b : b + 32] for b in range(0, order.shape[1] - 31, 32)]
    states = []
    for step in range(STATES[-1] + 1):
        if step in STATES:
            states.append(naive.state())
        naive.step(batches[step % len(batches)], at_time(keys, step))

    trainer = eager_trainer(single, Choice(mode, channels_last, "forced", {}), len(states))
    bank = trainer.bank
    bank.masks.copy_(single.mask)
    bank.keys.copy_(keys.expand(len(states), -1))
    trainer.epoch_keys.copy_(bank.keys)
    trainer.step_keys.copy_(at_time(bank.keys, 50))
    for lane, (weights, momentum) in enumerate(states):
        bank.weights[lane], bank.moments["momentum_buffer"][lane] = weights, momentum
    trainer.lr.fill_(LR)
    for module in trainer.runner.modules:
        module.train()
    trainer.step(batches[0].expand(len(states), -1))

    key = at_time(keys, 50)
    worst = 0.0
    for lane, (weights, momentum) in enumerate(states):
        references = []
        for problem in (single, double):
            plain = Naive(problem, channels_last)
            plain.load(weights, momentum)
            gradient = plain.step(batches[0], key)
            references.append((gradient, *plain.state()))
        found = trainer.grads[lane], bank.weights[lane], bank.moments["momentum_buffer"][lane]
        for what, mine, theirs, exact in zip(("gradient", "weights", "momentum"), found, *references, strict=True):
            assert error(mine, exact) <= 2 * error(theirs, exact), (what, lane)
            worst = max(worst, error(mine, exact) / error(theirs, exact))
        assert error(references[0][0], references[1][0]) > 0  # the naive loop does have a rounding error
    print(f"{name}, {mode}, channels {'last' if channels_last else 'first'}: {worst:.2f} of the naive loop's error")


def test_lane_by_lane_has_the_bits_of_the_naive_loop():
    """With the same number of threads and memory format, both call the same kernels, so masks and weights are equal."""
    fast, naive = pruned(partial(fast_swamp, engine="eager:lanes"), 0, 1), pruned(naive_swamp, 0, 1)
    assert agreement(fast, naive) == 1.0
    for name, value in naive.ticket.items():
        assert torch.equal(fast.ticket[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "channels_last"), [("lanes", True), ("fold", False), ("fold_grouped", False)])
def test_masks_agree_as_two_naive_runs_do(mode, channels_last):
    """Our final masks agree with the naive loop's as well as two naive runs with different numbers of threads agree.

    Agreements are compared by their means over several seeds.
    """
    ours, theirs = agreements(mode, channels_last)
    spread = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
    assert statistics.mean(ours) >= statistics.mean(theirs) - 2 * spread, (ours, theirs)
