"""SWAMP: iterative magnitude pruning of the average of several particles that are trained from one ticket.

Choi, Lee, Nam, Lee: "Sparse Weight Averaging with Multiple Particles for Iterative Magnitude Pruning", ICLR 2024,
arXiv 2305.14852, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast import distributed
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.config import SwampConfig
from swamp_fast.cycle.averaging import combine
from swamp_fast.cycle.evaluation import history_row
from swamp_fast.cycle.pruning import mask_score, next_mask
from swamp_fast.cycle.training import Trainings, alone, cycle_request, ticket_request, train
from swamp_fast.engines.footprint import refuse_too_many_particles
from swamp_fast.engines.start import Engine, start_engine
from swamp_fast.particles.bank import Solution
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Metrics, OnCycle, OnEpoch, Transform
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.recipe import Recipe
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
    recipe: Recipe | None = None,
    metrics: Metrics | None = None,
    on_epoch: OnEpoch | None = None,
    on_cycle: OnCycle | None = None,
    config: SwampConfig | None = None,
    **settings: Any,
) -> SwampResult:
    """Prune a model with SWAMP. All particles of a cycle are trained together, as one stacked tensor.

    Args:
        model: any nn.Module on one device; it is left unchanged, gradients included. If torch.compile has wrapped it,
            the plain module is used. Its forward may keep activations in attributes; they are copied without their
            autograd graph.
        train: "digits", "cifar10", "cifar100", "fashion_mnist" or "svhn"; a path to an .npz (train_images uint8
            [n, H, W, C], train_labels [n], test_images, test_labels) or to an image folder; a pair (inputs, targets)
            of tensors; a Dataset; or a DataLoader, whose dataset, batch size, drop_last, collate_fn, num_workers and
            worker_init_fn are used. A Dataset may draw from the global generators of torch, Python and NumPy, which are
            seeded for every sample. If a Dataset uses another generator, a run can't be repeated exactly. Some samples
            are read outside of the workers.
        test: test data in one of the same forms. By default, the test split that comes with `train`, as with a named
            data set; if there is none, accuracies are None. The accuracy is the fraction of labels whose class has the
            largest of the model's outputs [B, classes, ...] in evaluation. Labels that `loss` ignores don't count. If
            the targets are not class labels, accuracies are None, and the console says why.
        val: validation data in one of the same forms, or the fraction of `train` to hold out. Needed to select the
            best particle.
        forward: forward(model, inputs), for models that take or return something other than one tensor. It must use
            the module that it is given: this is a particle, not your model.
        loss: loss(outputs, targets) -> [B], one number per sample, or [B, ...] with the axes of the targets after the
            first, over which it is averaged. The loss of a batch is the mean over its B samples, also with class
            weights and ignored labels, where torch's reduction="mean" divides by another number. By default,
            cross-entropy of outputs [B, classes, ...] with labels [B, ...] or with probabilities [B, classes, ...]. A
            loss with an attribute `ignore_index` ignores that label; any other loss ignores the labels for which it is
            found to have no gradient. A module with tensors, such as class weights, is copied to the device; its
            parameters must not need gradients.
        transform: transform(inputs [B, ...]) -> inputs, or transform(inputs, targets) -> (inputs, targets): your own
            augmentation of one particle's training batch, on the device. Evaluation and the re-estimation of norms
            don't use it, so normalise in the data or in the model. It is called with the targets if its second
            positional parameter has no default, or is named targets, labels or y. A transform that takes *args, as
            those of torchvision.transforms.v2, is tried on a few inputs alone; if that raises, it is called with the
            targets. The targets that it returns may have another form, such as class probabilities for cross-entropy.
            It may draw from the global generators of torch, Python and NumPy, which are seeded for each batch.
        prunable: names or patterns of parameters, or a predicate (name, parameter) -> bool. By default, all
            convolution and linear weights are pruned, including attention projections and layers under spectral_norm,
            but not the output layer's. The console says which weights are pruned, which are not, and why.
        initial_masks: parameter name -> bool tensor that is True for the weights that the first cycle keeps. The
            ticket is trained dense nevertheless.
        recipe: a Recipe with an optimizer, a schedule, a mask score or sample weights of your own.
        metrics: a dict from names to metrics. A metric is a function (outputs, targets) -> [B] with one number per
            sample, of which the mean is taken, or an object with update, compute and reset, such as a torchmetrics
            object. Its attribute `higher_is_better`, by default True, gives the direction for `select_by`. Each metric
            is computed on test and val for the average, the particles and their ensemble, and appears in the history
            under its name. If accuracies are counted, the ensemble's outputs are the logarithm of the mean softmax,
            which are logits again; otherwise they are the mean of the outputs.
        on_epoch: called after each epoch of a training with a row: cycle (None for the ticket's training), epoch
            (counted from 0), epochs, and train_loss (a list, one number per particle). A resumed run may call it again
            for the last epoch before the checkpoint.
        on_cycle: called with the row of each cycle that this call has finished. If it needs two arguments, it is also
            given the cycle's snapshot, whose `state` has the average's parameters and buffers, and whose `masks` has
            the masks. A resumed run doesn't call it again for earlier cycles, even if it failed in the last of them.
            Callbacks get copies. They are called on the first rank only, under the global modes around this call, and
            after the epoch or cycle is recorded. An exception ends the run. After StopRun, the call returns the
            finished cycles, or raises RuntimeError if there are none. Times in the history include the time spent in
            `on_epoch`.
        config: the settings; a field of SwampConfig that is passed as a keyword takes precedence.

    Returns the result of all cycles.

    The buffers of a cycle's average are made as follows. Running statistics of norms that derive from torch's BatchNorm
    or InstanceNorm are re-estimated on the training data; norms that the model's own train() leaves in evaluation mode
    keep their statistics. The vectors of spectral_norm are computed anew, by power iterations on the average's weights.
    Other floating-point buffers are averaged over the particles. Integer and boolean buffers are the first particle's.

    Raises ValueError, TypeError, FileNotFoundError or ImportError for an unsuitable argument, before anything is
    trained, and MemoryError if a cycle's particles don't fit the free memory; FloatingPointError if a particle diverges
    (see `on_divergence`); OSError if a checkpoint can't be written; RuntimeError if another rank is gone, or inside
    FakeTensorMode.

    The result doesn't depend on the global modes around the call, such as autocast, no_grad, the default dtype and
    device, anomaly detection, hooks on saved tensors, and the precision of float32 products: during the call they are
    PyTorch's defaults, and warnings are shown but never raised. The number of threads, deterministic algorithms and
    cuDNN's flags stay as they are. The model, `forward`, `loss` and `transform` may set modes for themselves with
    context managers.

    In a torch.distributed process group the ranks share the particles. All ranks must call with the same arguments,
    and all get the same result.
    """
    with distributed.current().watched() as ranks:
        arguments = Arguments.of(locals())
        problem = prepare(model, train, test, arguments, config=config, settings=settings)
        with Run(problem, "fast_swamp", ranks) as run:
            engine = start_engine(problem, run)
            return run.until_stopped(lambda: alone(engine, swamp(problem, engine, run)))


def swamp(problem: Problem, engine: Engine, run: Run) -> Trainings[SwampResult]:
    """The algorithm as a generator. It yields a request for each training and is sent the training's outcome."""
    config = problem.config
    refuse_too_many_particles(problem, engine, run)
    ticket = yield from train_ticket(problem, run)
    average, mask = resumed(problem, run) if run.rows else (ticket, problem.mask)

    for cycle in run.remaining_cycles():
        if cycle > 0:
            mask = next_mask(problem, run, mask, cycle)
        start = ticket if config.rewind == "ticket" or cycle == 0 else average
        average = yield from train_cycle(problem, engine, run, cycle, start, mask)
    return run.result()


def train_cycle(
    problem: Problem, engine: Engine, run: Run, cycle: int, start: Solution, mask: Tensor
) -> Trainings[Solution]:
    """Train, average, evaluate and record the particles of a cycle. Their memory is free again afterwards."""
    outcome = yield from train(run, cycle_request(problem, run, cycle, start, mask))
    particles = outcome.particles(averaged=problem.config.average != "none")
    combined = combine(problem, run, outcome.side_by_side, particles, cycle)
    score = mask_score(problem, run, particles, cycle)

    run.share_engine(engine.describe)
    run.keep_particles([state_of(problem, particle) for particle in combined.particles])
    row = history_row(problem, cycle, mask, outcome, combined.scores)
    run.keep_cycle(state_of(problem, combined.average), problem.layout.mask_views(mask), row, score)
    return combined.average


def train_ticket(problem: Problem, run: Run) -> Trainings[Solution]:
    """Return the matching ticket: one particle, trained dense for T0 epochs from the user's model."""
    if run.ticket is None:
        ticket = initial(problem)
        if problem.config.ticket_epochs > 0:
            outcome = yield from train(run, ticket_request(problem, run, ticket))
            ticket = outcome.particles(averaged=False).solution(0)
        run.keep_ticket(state_of(problem, ticket))
    assert run.ticket is not None
    return solution_of(problem, run.ticket)


def resumed(problem: Problem, run: Run) -> tuple[Solution, Tensor]:
    """Return the average and the mask [Q] of the last cycle that the run completed."""
    last = run.last()
    mask = torch.zeros_like(problem.mask)
    for name, view in problem.layout.mask_views(mask).items():
        view.copy_(last.masks[name])
    return solution_of(problem, last.state), mask
