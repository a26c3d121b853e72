"""SWAMP: prune by iterative magnitude pruning, with the average of particles trained from one ticket.

Choi, Lee, Nam, Lee: "Sparse Weight Averaging with Multiple Particles for Iterative Magnitude Pruning", ICLR 2024,
arXiv 2305.14852.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast import distributed, ops
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.format import percent
from swamp_fast.common.memory import peak_memory
from swamp_fast.config import SwampConfig
from swamp_fast.cycle.averaging import reestimate
from swamp_fast.cycle.evaluation import score, score_row
from swamp_fast.cycle.pruning import drawn, particles_score, pruned
from swamp_fast.cycle.training import Particles, SideBySide, TrainingOutcome, TrainingRequest, Trainings, alone
from swamp_fast.engines.start import Engine, start_engine
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.layout import by_layer
from swamp_fast.particles.random import at_time
from swamp_fast.particles.schedule import cycle_training, ticket_training
from swamp_fast.problem.arguments import Arguments, Forward, Loss, OnCycle, Transform
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.solutions import initial, solution_of, state_of
from swamp_fast.runs.record import Run
from swamp_fast.runs.result import SwampResult


@one_at_a_time
def fast_swamp(
    model: nn.Module,
    train: object,
    test: object = None,
    *,
    val: object = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    transform: Transform | None = None,
    prunable: Prunable = None,
    initial_masks: Mapping[str, Tensor] | None = None,
    on_cycle: OnCycle | None = None,
    config: SwampConfig | None = None,
    **settings: Any,
) -> SwampResult:
    """Prune a model with SWAMP, all particles together.

    Args:
        model: any nn.Module on one device, left unchanged.
        train: "digits", "cifar10", "cifar100", "fashion_mnist" or "svhn"; a path to an .npz (train_images uint8
            [n, H, W, C], train_labels [n], test_images, test_labels) or to an image folder; a pair (inputs, targets)
            of tensors; a Dataset; or a DataLoader, whose dataset, batch size, drop_last and collate are used. A name
            or an .npz brings its own test split.
        test: likewise; None and no split of its own: accuracies are None.
        val: likewise, or the fraction of train to hold out. What selects (the best particle) needs it.
        forward: forward(model, inputs) for models with other inputs or outputs than one tensor.
        loss: loss(outputs, targets) -> [B], a number a sample; cross-entropy by default.
        transform: transform(inputs [B, ...]) -> inputs, your own augmentation, on the device, of one particle's batch.
        prunable: names or patterns of parameters, or a predicate (name, parameter) -> bool. By default every
            convolution and linear weight, attention projections included, but the output layer's.
        initial_masks: name -> bool tensor: what the first cycle keeps; the ticket itself is trained dense.
        on_cycle: called with each cycle's row of the history.
        config: the settings; `settings` are fields of SwampConfig and take precedence.

    Returns the result of all cycles. Raises ValueError, TypeError, FileNotFoundError or ImportError for an argument
    that doesn't fit, before anything is trained; FloatingPointError if a particle diverges (see `on_divergence`);
    OSError if a checkpoint can't be written; RuntimeError if another rank is gone. In a process group of
    torch.distributed the ranks share the particles; all call with the same arguments, and get the same result.
    Source: arXiv 2305.14852, algorithm 1; what is ours in it is marked in SwampConfig.
    """
    with distributed.current().watched() as job:
        arguments = Arguments(
            val=val,
            forward=forward,
            loss=loss,
            transform=transform,
            prunable=prunable,
            initial_masks=initial_masks,
            on_cycle=on_cycle,
        )
        problem = prepare(model, train, test, arguments, config=config, settings=settings)
        with Run(problem, "fast_swamp", job) as run:
            engine = start_engine(problem, run)
            return alone(engine, swamp(problem, engine, run))


def swamp(problem: Problem, engine: Engine, run: Run) -> Trainings[SwampResult]:
    """The algorithm. Each training that it wants done it yields, and is sent what that came to."""
    ticket = yield from train_ticket(problem, run)
    average, mask = resumed(problem, run, ticket)

    for cycle in range(len(run.rows), problem.config.cycles + 1):
        began = time.perf_counter()
        if cycle > 0:
            mask = run.ranks.broadcast_from_first(partial(next_mask, problem, run, mask, cycle))
        start = ticket if problem.config.rewind == "ticket" or cycle == 0 else average
        asked, before = of_cycle(problem, run, cycle, start, mask), time.perf_counter() - began
        trained = yield asked
        began = time.perf_counter() - before - trained.seconds  # while others' cycles end, this one only waits
        keep = problem.config.keep_particles and cycle == problem.config.cycles
        found = trained.particles(problem.config.swa)
        average, particles, scores = run.ranks.broadcast_from_first(
            partial(combined, problem, trained.side_by_side, found, keep)
        )
        row = {**about_cycle(problem, trained, mask, cycle), **scores}
        if keep:
            run.keep_particles([state_of(problem, particle) for particle in particles])
        score = run.ranks.broadcast_from_first(partial(mask_score, problem, found, cycle))
        row["seconds"], row["peak_memory"] = time.perf_counter() - began, peak_memory(problem.device)
        run.keep_engine(run.ranks.broadcast_from_first(engine.describe))
        run.keep_cycle(state_of(problem, average), problem.layout.mask_views(mask), row, score)
    return run.result()


def train_ticket(problem: Problem, run: Run) -> Trainings[Solution]:
    """The matching ticket: the model trained dense for T0, by one particle."""
    if run.ticket is None:
        start = initial(problem)
        if problem.config.ticket_epochs > 0:
            full = problem.layout.full_mask(problem.device)
            trained = yield TrainingRequest(run, None, start, full, 1, ticket_training(problem.config), "ticket")
            found = trained.particles(averaged=False)
            start = Solution(found.weights[0].clone(), {name: each[0] for name, each in found.buffers.items()})
        run.keep_ticket(state_of(problem, start))
    assert run.ticket is not None
    return solution_of(problem, run.ticket)


def resumed(problem: Problem, run: Run, ticket: Solution) -> tuple[Solution, Tensor]:
    """The average and the mask to go on from; before the first cycle the ticket and the first mask."""
    if not run.rows:
        return ticket, problem.mask
    last = run.last()
    mask = torch.zeros_like(problem.mask)
    for name, view in problem.layout.mask_views(mask).items():
        view.copy_(last.masks[name])
    return solution_of(problem, last.state), mask


def of_cycle(problem: Problem, run: Run, cycle: int, start: Solution, mask: Tensor) -> TrainingRequest:
    """A cycle's training of its particles."""
    config, particles = problem.config, problem.config.particles_at(cycle)
    density = percent(int(mask.sum()) / problem.layout.weights)
    shown = f"cycle {cycle}/{config.cycles}, density {density}, {particles} particles"
    return TrainingRequest(run, cycle, start, mask, particles, cycle_training(config, len(problem.bounds)), shown)


def combined(
    problem: Problem, side_by_side: SideBySide, found: Particles, keep: bool
) -> tuple[Solution, list[Solution], dict[str, Any]]:
    """The mean over the particles that are left, or the best of them, its BatchNorm re-estimated, these likewise if
    `keep`, and scores.
    """
    lanes, keys = found.left, found.keys
    mean = ops.particle_mean(found.weights[lanes], torch.zeros_like(keys[lanes, 0]), 1)
    buffers = {name: torch.cat([each, mean_buffer(each[lanes])[None]]) for name, each in found.buffers.items()}
    keys = torch.cat([keys, keys[-1:] + keys.new_tensor([0, 1, 0])])  # the average's is the next stream
    models = side_by_side(torch.cat([found.weights, mean]), buffers)

    def run(inputs: Any, time: int) -> list[Any]:
        outputs = models.outputs(inputs, at_time(keys, time))
        return [outputs[lane] for lane in (*lanes, -1)]

    reestimate(models.modules, run, problem.train, problem.config.batch_size, models.channels_last)
    test, val = (
        None if data is None else score(problem, run, data, which, models.channels_last)
        for which, data in ((1, problem.test), (2, problem.val))
    )
    weights, after = models.weights.clone(), models.buffers()
    *each, average = (Solution(weights[i], {name: buffer[i] for name, buffer in after.items()}) for i in (*lanes, -1))
    if problem.config.combine == "best" and val is not None:
        best = val.best
        average, test, val = each[best], test and test.of(best), val.of(best)
    return average, each if keep else [], score_row(test, val)


def next_mask(problem: Problem, run: Run, mask: Tensor, cycle: int) -> Tensor:
    """The mask [Q] of a cycle, from that of the cycle before it."""
    ranked = problem.layout.flat(run.masks_source().ranked, problem.dtype, problem.device)
    largest = pruned(ranked[None], mask[None], problem.config.prune)[0]
    if problem.config.mask_score != "random":
        return largest
    told = problem.config.layer_kept
    kept = by_layer(problem.layout, largest) if told is None else told[cycle - 1]
    return drawn(problem.layout, kept, mask, problem.config.seed, cycle)


def mask_score(problem: Problem, found: Particles, cycle: int) -> dict[str, Tensor]:
    """What later masks rank, by name, where a cycle's solution doesn't tell it; nothing elsewhere."""
    config = problem.config
    if not config.scored_at(cycle):
        return {}
    if config.mask_score == "signal-to-noise" and len(found.left) == 1:
        raise FloatingPointError(
            f'cycle {cycle}: one particle is left, which has no spread for mask_score="signal-to-noise". Lower lr and '
            "swa_lr so that fewer diverge, or take more particles."
        )
    score = particles_score(config.mask_score, [found.weights[lane, : problem.layout.Q] for lane in found.left])
    return problem.layout.mask_views(score)


def about_cycle(problem: Problem, trained: TrainingOutcome, mask: Tensor, cycle: int) -> dict[str, Any]:
    """What a cycle's row says besides scores."""
    kept = int(mask.sum())
    return {
        "cycle": cycle,
        "particles": trained.count,
        "density": kept / problem.layout.weights,
        "kept": kept,
        "flops": problem.flops(mask),
        "train_loss": [trained.losses[lane] for lane in trained.left],
        "train_seconds": trained.seconds,
        "dropped": [{"lane": lane, "epoch": epoch} for lane, epoch in sorted(trained.dropped.items())],
    }


def mean_buffer(each: Tensor) -> Tensor:
    """The average's buffer from the particles' [N, ...]: their mean, or the first of what is no number to average."""
    return each.double().mean(0).to(each.dtype) if each.is_floating_point() else each[0]
