"""SWAMP as a careful researcher would write it: plain PyTorch, one particle after the other.

Tests compare fast_swamp with it, and benchmarks use it as the baseline. It shares the argument checks, the data, the
random draws and the run's record with fast_swamp, but no code that trains, averages, prunes or evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from swamp_fast.common.copying import copy_of
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.timing import Stopwatch
from swamp_fast.config import SwampConfig
from swamp_fast.data.labels import Labels
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import at_time, evaluation_time, lane_keys, layer_order, stream_of
from swamp_fast.particles.spectral_norms import find_spectral_norms, spectral_vectors
from swamp_fast.problem.arguments import Arguments, Forward, Loss, Metrics, OnCycle, OnEpoch, Transform
from swamp_fast.problem.checks import check_particles_fit
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.recipe import Recipe
from swamp_fast.runs.record import Run
from swamp_fast.runs.result import SCORES, SwampResult

State = dict[str, Tensor]


@one_at_a_time
def naive_swamp(
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
    """Prune a model with SWAMP, training one particle after the other.

    Arguments, result and errors are those of fast_swamp. The setting `engine` has no effect.
    """
    arguments = Arguments(
        val=val,
        forward=forward,
        loss=loss,
        transform=transform,
        prunable=prunable,
        initial_masks=initial_masks,
        recipe=recipe,
        metrics=metrics,
        on_epoch=on_epoch,
        on_cycle=on_cycle,
    )
    problem = prepare(model, train, test, arguments, config=config, settings=settings)
    config = problem.config
    with Run(problem, "naive_swamp") as run:
        run.keep_engine({"engine": "naive", "name": "naive", "why": "plain PyTorch, one particle after the other"})
        most = max(config.particles_at(cycle) for cycle in range(config.cycles + 1))
        # Each particle keeps its weights and its last gradients until it is averaged.
        check_particles_fit(problem.device, most, 2 * problem.layout.P * problem.dtype.itemsize)
        ticket = train_ticket(problem, run)
        average, masks = ticket, {n: mask.clone() for n, mask in problem.layout.mask_views(problem.mask).items()}
        if run.rows:  # a resumed run continues after these cycles
            average = load(problem, run.last().state)
            masks = {name: mask.to(problem.device) for name, mask in run.last().masks.items()}

        for cycle in run.remaining_cycles():
            if cycle > 0:
                masks = prune(problem, run.masks_source().ranked, masks, cycle)
            start = ticket if config.rewind == "ticket" or cycle == 0 else average
            particles, training = train_particles(problem, run, start, masks, cycle)
            score = score_of(problem, list(particles.values()), cycle)
            average = mean_of(list(particles.values()))
            # The average gets the number after the last particle's.
            models = {**particles, config.particles_at(cycle): average}
            for number, each in models.items():
                reestimate(problem, each, problem.keys_of(cycle, number))
            scored, best = scores(problem, models, cycle)
            if config.combine == "best":
                average = list(particles.values())[best]
            row = {
                "cycle": cycle,
                "particles": config.particles_at(cycle),
                **sparsity(problem, masks),
                **scored,
                **training,
            }
            if config.keep_particles and cycle == config.cycles:
                run.keep_particles([state_of(each) for each in particles.values()])
            run.keep_cycle(state_of(average), masks, row, score)
            run.begin_training()
        return run.result()


def train_ticket(problem: Problem, run: Run) -> nn.Module:
    """Return the matching ticket: the model after `ticket_epochs` epochs of dense training.

    A resumed run returns the ticket that it recorded.
    """
    if run.ticket is None:
        model = copy_of(problem.template)
        train_particle(problem, run, model, {}, None, 0)
        run.keep_ticket(state_of(model))
    assert run.ticket is not None
    return load(problem, run.ticket)


def train_particles(
    problem: Problem, run: Run, start: nn.Module, masks: State, cycle: int
) -> tuple[dict[int, nn.Module], dict[str, Any]]:
    """Train the particles of a cycle.

    Returns the particles that did not diverge, by number, and the training's entries for the cycle's history row.
    """
    config, watch = problem.config, Stopwatch()
    particles: dict[int, nn.Module] = {}
    losses: list[float] = []
    dropped: list[dict[str, int]] = []
    for number in range(config.particles_at(cycle)):
        particle = copy_of(start)
        try:
            losses.append(train_particle(problem, run, particle, masks, cycle, number))
            particles[number] = particle
        except Diverged as error:
            if config.on_divergence == "stop" or len(dropped) + 1 == config.particles_at(cycle):
                raise
            dropped.append({"lane": number, "epoch": error.epoch})
            run.warn_dropped(cycle, number, error.epoch)
    return particles, {"train_loss": losses, "dropped": dropped, "train_seconds": watch.seconds}


def sparsity(problem: Problem, masks: State) -> dict[str, Any]:
    """Return the history row's density, kept weights and FLOPs (of one sample's forward pass) under the masks."""
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    count = sum(kept.values())
    return {"density": count / sum(sizes.values()), "kept": count, "flops": problem.probe.flops(kept, sizes)}


class Diverged(FloatingPointError):
    """Raised if a particle's loss or weights are not finite at the end of `epoch`, which is counted from 1."""

    def __init__(self, where: str, epoch: int) -> None:
        super().__init__(
            f"{where}, epoch {epoch}: the particle diverged to NaN or infinity. Lower lr and swa_lr, or check the data."
        )
        self.epoch = epoch


def train_particle(problem: Problem, run: Run, model: nn.Module, masks: State, cycle: int | None, number: int) -> float:
    """Train a model in place, as one particle of a cycle or, if the cycle is None, as the ticket.

    With SWA, the model holds the SWA mean of its weights afterwards. Returns the mean loss over the last epoch. Raises
    Diverged if the loss or the weights are not finite.
    """
    config, steps_per_epoch = problem.config, problem.steps
    epochs = config.ticket_epochs if cycle is None else config.epochs
    swa_start = min(math.floor(config.swa_start * epochs), epochs - 1)
    keys = lane_keys([config.seed], [stream_of(cycle, number)], problem.device)
    where = "ticket" if cycle is None else f"cycle {cycle}/{config.cycles}, particle {number + 1}"

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    apply_masks(parameters, masks)
    for norm in norms_in_training(model):
        norm.reset_running_stats()
    optimizer = optimizer_of(config, parameters.values())
    swa: State = {}
    step, mean_loss = 0, 0.0
    for epoch in range(epochs):
        epoch_keys = problem.epoch_keys(keys, epoch)
        epoch_loss = torch.zeros((), dtype=torch.float64, device=problem.device)
        for handles in problem.steps_of_epoch(epoch_keys):
            if cycle is not None:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, steps_per_epoch, swa_start)
            first = problem.first_batch_of(step)
            keyed = [(handle, at_time(keys, first + number)) for number, handle in enumerate(handles)]
            batches = [(problem.fetch(handle, epoch_keys, key).lane(0), key) for handle, key in keyed]
            epoch_loss += train_step(problem, model, parameters, masks, optimizer, batches)
            run.step(1, f"{where}, epoch {epoch + 1}/{epochs}")
            run.stop_if_requested()
            step += 1
        mean_loss = float(epoch_loss) / len(problem.bounds)
        run.keep_epoch(cycle, epoch, [mean_loss], number)
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values())
        if not math.isfinite(mean_loss) or not finite:
            raise Diverged(where, epoch + 1)
        if config.average == "swa" and cycle is not None and epoch >= swa_start:
            for name, parameter in parameters.items():
                mean = swa.setdefault(name, torch.zeros_like(parameter))
                mean += (parameter.detach() - mean) / (epoch - swa_start + 1)
    for name, mean in swa.items():
        parameters[name].data.copy_(mean)
    return mean_loss


def train_step(
    problem: Problem,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    masks: State,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[tuple[Any, Any], Tensor]],
) -> Tensor:
    """Do one optimizer step by the mean gradient of some batches; returns the sum of their mean losses.

    batches  (inputs and targets, key [1, 3] that seeds the random draws) of each batch
    """
    optimizer.zero_grad()
    losses = []
    for batch, key in batches:
        inputs, targets = problem.particle_batch(*batch, key)
        problem.seeded(key)
        with DropoutStream(key), problem.autocast():
            loss = problem.losses(problem.forward(model, inputs), targets).mean()
        problem.backward(loss / len(batches), list(parameters.values()))
        losses.append(loss.detach().double())
    for parameter in parameters.values():
        if parameter.grad is None:  # unused in this step, but weight decay still applies
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:  # of an embedding with sparse=True
            parameter.grad = parameter.grad.to_dense()
    for name, mask in masks.items():
        parameters[name].grad.mul_(mask)  # type: ignore[union-attr]
    if problem.config.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), problem.config.clip_norm)
    optimizer.step()
    apply_masks(parameters, masks)
    return torch.stack(losses).sum()


def apply_masks(parameters: dict[str, nn.Parameter], masks: State) -> None:
    """Set pruned weights to 0."""
    for name, mask in masks.items():
        parameters[name].data.mul_(mask)


def optimizer_of(config: SwampConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.initial_lr,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
    return torch.optim.SGD(
        parameters,
        lr=config.initial_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def learning_rate(config: SwampConfig, step: int, steps_per_epoch: int, swa_start: int) -> float:
    """Return the learning rate of a step of a cycle; see SwampConfig's `schedule`.

    With SWA's schedule, it is a cosine from `lr` to `swa_lr` at the start of the SWA window, and constant from there.
    Otherwise it is a cosine from `lr` to 0 at the end of the training.
    """
    with_swa = config.schedule == "swa" or (config.schedule == "auto" and config.average == "swa")
    end, epochs = (config.window_lr, swa_start) if with_swa else (0.0, config.epochs)
    progress = min(step / (epochs * steps_per_epoch), 1.0) if epochs else 1.0
    return end + 0.5 * (config.initial_lr - end) * (1 + math.cos(math.pi * progress))


def mean_of(particles: list[nn.Module]) -> nn.Module:
    """Return a model with the mean of the particles' parameters and floating-point buffers.

    The vectors of its spectral norms are the first particle's, from which `reestimate` finds those of its weights.
    """
    average = copy_of(particles[0])
    sources = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in particles]
    for name, target in {**dict(average.named_parameters()), **dict(average.named_buffers())}.items():
        if target.is_floating_point() and name not in spectral_vectors(average):
            values = torch.stack([source[name].detach() for source in sources])
            equal = (values == values[0]).all(0)  # of which the mean may round
            target.data.copy_(torch.where(equal, values[0].double(), values.double().mean(0)))
    return average


def score_of(problem: Problem, particles: list[nn.Module], cycle: int) -> State:
    """Return the score of each prunable parameter by name, or {} if `mask_score` needs only the particles' average."""
    config = problem.config
    if not config.scored_at(cycle):
        return {}
    if config.mask_score == "signal-to-noise" and len(particles) == 1:
        raise FloatingPointError(
            f"cycle {cycle}: only one particle is left, so there is no signal-to-noise ratio; lower lr."
        )
    named = [dict(each.named_parameters()) for each in particles]
    ranked = {}
    for entry in problem.layout.prunable:
        stack = torch.stack([each[entry.name].detach() for each in named]).double()
        if config.mask_score == "mean-abs":
            score = stack.abs().mean(0)
        elif config.mask_score == "rms":
            score = (stack**2).mean(0) ** 0.5
        else:
            signal, noise = stack.mean(0).abs(), stack.std(0, correction=0)
            noise[stack.amax(0) == stack.amin(0)] = 0
            score = torch.where(noise > 0, signal / noise, torch.where(signal > 0, math.inf, 0.0))
        ranked[entry.name] = score.to(problem.dtype)
    return ranked


def prune(problem: Problem, ranked: State, masks: State, cycle: int) -> State:
    """Return masks that keep the weights with the largest scores over all layers; of equal scores, the first are kept.

    With mask_score="random" the kept weights are drawn at random. Each layer then keeps as many weights as `layer_kept`
    says or, without it, as many as the largest scores would keep.

    ranked  parameter name -> score, of which the absolute value is ranked
    masks   the masks of the cycle before
    """
    config = problem.config
    magnitudes = torch.cat([ranked[name].detach().to(problem.device).abs().flatten() for name in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    keep = round((1 - config.prune) * int(kept.sum()))
    if config.target_density is not None:
        target = math.floor(config.target_density * len(kept) + 1e-6)
        keep = target if cycle == config.cycles else max(keep, target)
    largest = magnitudes.masked_fill(~kept, -1).argsort(descending=True, stable=True)[:keep]
    chosen = torch.zeros_like(kept)
    chosen[largest] = True
    parts = chosen.split([mask.numel() for mask in masks.values()])
    if config.mask_score == "random":
        counts = [int(part.sum()) for part in parts] if config.layer_kept is None else config.layer_kept[cycle - 1]
        layers = enumerate(zip(masks.values(), counts, strict=True))
        parts = tuple(draw(config, mask.flatten(), count, cycle, layer) for layer, (mask, count) in layers)
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def draw(config: SwampConfig, kept: Tensor, count: int, cycle: int, layer: int) -> Tensor:
    """Draw a mask that keeps `count` weights of a layer, at random among those in `kept`."""
    chosen = torch.zeros_like(kept)
    for place in layer_order(config.seed, cycle, layer, len(kept), kept.device).tolist():
        if count and kept[place]:
            chosen[place] = True
            count -= 1
    return chosen


def norms_in_training(model: nn.Module) -> list[Any]:
    """Put a model into train mode; return its norms with running statistics, without those that it leaves frozen."""
    model.train()
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    return [norm for norm in norms if norm.training]


@torch.no_grad()
def reestimate(problem: Problem, model: nn.Module, keys: Tensor) -> None:
    """Set the running statistics to their mean over the training batches, weighted by the number of samples.

    A norm layer that one forward pass calls several times counts every call. Also finds the vectors of spectral norms
    anew. Leaves the model in eval mode.
    """
    norms = norms_in_training(model)
    model.eval()
    find_spectral_norms([model])
    momenta = [norm.momentum for norm in norms]
    seen, count = dict.fromkeys(norms, 0), 0

    def before_call(norm: Any, _: object) -> None:
        seen[norm] += count
        norm.momentum = count / seen[norm]

    hooks = [norm.register_forward_pre_hook(before_call) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    batches = pass_in_stored_order(problem.train, problem.config.batch_size) if norms else ()
    for number, (inputs, _, samples) in enumerate(batches):
        count = samples  # the weight of every call in this batch
        problem.outputs(model, inputs, at_time(keys, evaluation_time(0, number)))
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        norm.momentum = momentum
        norm.eval()
        hook.remove()


def scores(problem: Problem, models: dict[int, nn.Module], cycle: int) -> tuple[dict[str, Any], int]:
    """Return the scores of a cycle, and the index of the particle that is best on the validation data.

    With combine="best", the average's scores are those of the best particle.

    models  number -> model: first the particles, last the average
    """
    row: dict[str, Any] = dict.fromkeys(SCORES)
    test, val = problem.test, problem.val
    keyed = [(model, problem.keys_of(cycle, number)) for number, model in models.items()]
    best = 0
    if val is not None:
        *each, average = [evaluate(problem, model, val, key, 2) for model, key in keyed]
        goodness = [-loss if accuracy is None else accuracy for loss, accuracy, _ in each]
        best = goodness.index(max(goodness))
        row["val_accuracy"] = (each[best] if problem.config.combine == "best" else average)[1]
        if average[1] is not None:
            row["val_mean_accuracy"] = sum(goodness) / len(each)
    if test is not None:
        *each, average = [evaluate(problem, model, test, key, 1) for model, key in keyed]
        row["loss"], row["accuracy"], _ = each[best] if problem.config.combine == "best" else average
        row["particle_loss"] = [loss for loss, _, _ in each]
        if average[1] is not None:
            row["particle_accuracy"] = [accuracy for _, accuracy, _ in each]
            row["mean_accuracy"] = sum(row["particle_accuracy"]) / len(each)
            together = torch.stack([softmax for _, _, softmax in each if softmax is not None]).mean(0)
            row["ensemble_accuracy"] = accuracy_of(problem, test, together)
            if row["val_accuracy"] is not None:
                row["best_accuracy"] = row["particle_accuracy"][best]
    return row, best


@torch.no_grad()
def evaluate(
    problem: Problem, model: nn.Module, data: Data, keys: Tensor, which: int
) -> tuple[float, float | None, Tensor | None]:
    """Return the mean loss, the accuracy, and the softmax of every sample [n, C].

    Accuracy and softmax are None if the split has no labels.

    which  the split, 1 for test and 2 for val, which decides the random draws
    """
    loss, outputs = 0.0, []
    for number, (inputs, targets, count) in enumerate(pass_in_stored_order(data, problem.config.batch_size)):
        output = problem.outputs(model, inputs, at_time(keys, evaluation_time(which, number)))
        loss += float(problem.losses(output, targets).double().mean()) * count
        outputs.append(output)
    if not isinstance(data.labels, Labels):
        return loss / data.length, None, None
    softmax = torch.cat(outputs).double().softmax(1)
    return loss / data.length, accuracy_of(problem, data, softmax), softmax


def accuracy_of(problem: Problem, data: Data, scores: Tensor) -> float | None:
    """Return the share of a split's labels that get the largest of the scores [n, C, ...].

    Labels that the loss ignores don't count. Returns None if no label counts.
    """
    targets = torch.cat([targets for _, targets, _ in pass_in_stored_order(data, problem.config.batch_size)])
    classes = [label for label in range(scores.shape[1]) if label not in data.labels.ignored]  # type: ignore[union-attr]
    counted = torch.isin(targets, torch.tensor(classes, device=targets.device))
    certain = ~scores.isnan().any(1)  # NaN predicts no class
    right = ((scores.argmax(1) == targets) & certain)[counted]
    return float(right.double().mean()) if len(right) else None


def load(problem: Problem, state: State) -> nn.Module:
    """Return a model on the problem's device that has the parameters and buffers of `state`."""
    model = copy_of(problem.template)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        tensor.data.copy_(state[name])
    return model


def state_of(model: nn.Module) -> State:
    """Return the model's parameters and buffers by name."""
    return {**{n: p.detach() for n, p in model.named_parameters()}, **{n: b.detach() for n, b in model.named_buffers()}}
