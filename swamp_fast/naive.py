"""SWAMP as a careful researcher would write it: plain PyTorch, one particle after the other.

Tests compare fast_swamp with it, and benchmarks use it as the baseline. It shares the argument checks, the data, the
random draws and the run's record with fast_swamp, but no code that trains, averages, prunes or evaluates.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from swamp_fast.common.copying import copy_of
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.timing import Stopwatch
from swamp_fast.common.tree import tree_map
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

    Arguments, result and errors are those of fast_swamp. The setting `engine` has no effect. `on_epoch` is called for
    each particle: its row also has the particle's number as `particle`, and `train_loss` has one number.
    """
    arguments = Arguments.of(locals())
    problem = prepare(model, train, test, arguments, config=config, settings=settings)
    with Run(problem, "naive_swamp") as run:
        run.keep_engine({"engine": "naive", "name": "naive", "why": "plain PyTorch, one particle after the other"})
        return run.until_stopped(lambda: swamp(problem, run))


def swamp(problem: Problem, run: Run) -> SwampResult:
    """The algorithm."""
    config = problem.config
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
    config, steps_per_epoch = problem.config, problem.steps_per_epoch
    epochs = config.ticket_epochs if cycle is None else config.epochs
    window = min(math.floor(config.swa_start * epochs), epochs - 1) * steps_per_epoch  # its first step
    keys = lane_keys([config.seed], [stream_of(cycle, number)], problem.device)
    where = "ticket" if cycle is None else f"cycle {cycle}/{config.cycles}, particle {number + 1}"

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    apply_masks(parameters, masks)
    for norm in norms_in_training(model):
        norm.reset_running_stats()
    optimizers = optimizers_of(problem, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    factors = [group.get("lr_factor" if problem.own_optimizer is None else "lr", 0.0) for group in groups]
    average: State = {}
    samples, step, mean_loss = 0, 0, 0.0
    for epoch in range(epochs):
        epoch_keys = problem.epoch_keys(keys, epoch)
        epoch_loss = torch.zeros((), dtype=torch.float64, device=problem.device)
        for handles in problem.steps_of_epoch(epoch_keys):
            for group, factor in zip(groups, factors, strict=True):
                if "lr" in group:
                    group["lr"] = learning_rate(problem, cycle, step) * factor
            first = problem.first_batch_of(step)
            keyed = [(handle, at_time(keys, first + number)) for number, handle in enumerate(handles)]
            batches = [(problem.fetch(handle, epoch_keys, key).lane(0), key) for handle, key in keyed]
            epoch_loss += train_step(problem, model, parameters, masks, optimizers, batches)
            step += 1
            if cycle is not None and step > window and (step - window) % (config.average_every or steps_per_epoch) == 0:
                samples += 1
                add_to_average(config, average, parameters, samples)
            run.step(1, f"{where}, epoch {epoch + 1}/{epochs}")
            run.stop_if_requested()
        mean_loss = float(epoch_loss) / len(problem.bounds)
        run.keep_epoch(cycle, epoch, [mean_loss], particle=number)
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values())
        if not math.isfinite(mean_loss) or not finite:
            raise Diverged(where, epoch + 1)
    for name, mean in average.items():
        parameters[name].data.copy_(mean)
    return mean_loss


def add_to_average(config: SwampConfig, average: State, parameters: dict[str, nn.Parameter], number: int) -> None:
    """Add the weights to their average, as its sample with this number: to a running mean or an exponential one."""
    if config.average == "none":
        return
    weight = 1 / number if config.average == "swa" or number == 1 else 1 - config.ema_decay
    for name, parameter in parameters.items():
        mean = average.setdefault(name, torch.zeros_like(parameter))
        mean += (parameter.detach() - mean) * weight


def train_step(
    problem: Problem,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    masks: State,
    optimizers: list[torch.optim.Optimizer],
    batches: list[tuple[tuple[Any, Any], Tensor]],
) -> Tensor:
    """Do one optimizer step by the mean gradient of some batches; returns the sum of their mean losses.

    batches  (inputs and targets, key [1, 3] that seeds the random draws) of each batch
    """
    prepared = [(*problem.particle_batch(*batch, key), key) for batch, key in batches]

    def closure() -> Tensor:
        losses = []
        for optimizer in optimizers:
            optimizer.zero_grad()
        for inputs, targets, key in prepared:
            problem.seeded(key)
            with torch.enable_grad(), DropoutStream(key), problem.autocast():
                loss = problem.losses(problem.forward(model, inputs), targets).mean()
                problem.backward(loss / len(batches), list(parameters.values()))
            losses.append(loss.detach().double())
        mask_gradients(parameters, masks)
        if problem.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), problem.config.clip_norm)
        return torch.stack(losses).sum()

    loss = closure()
    if problem.own_optimizer is None:
        for optimizer in optimizers:
            optimizer.step()
    else:
        needs_closure = problem.own_optimizer.needs_closure
        norms = norms_in_training(model) if needs_closure else []
        statistics = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
        problem.seeded_for_optimizer(batches[0][1])
        for optimizer in optimizers:
            optimizer.step(closure) if needs_closure else optimizer.step()  # type: ignore[arg-type]
        for buffer, before in statistics.items():  # as after the first pass
            buffer.copy_(before)
        mask_optimizers(optimizers, parameters, masks)
    apply_masks(parameters, masks)
    return loss


def mask_gradients(parameters: dict[str, nn.Parameter], masks: State) -> None:
    """Set the gradients of pruned weights to 0, and missing ones to zeros."""
    for parameter in parameters.values():
        if parameter.grad is None:  # unused in this step, but weight decay still applies
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:  # of an embedding with sparse=True
            parameter.grad = parameter.grad.to_dense()
    for name, mask in masks.items():
        parameters[name].grad.mul_(mask)  # type: ignore[union-attr]


def mask_optimizers(optimizers: list[torch.optim.Optimizer], parameters: dict[str, nn.Parameter], masks: State) -> None:
    """Set the optimizers' state of pruned weights to 0, also that of optimizers inside others."""
    for optimizer in optimizers:
        inner = [each for each in vars(optimizer).values() if isinstance(each, torch.optim.Optimizer)]
        mask_optimizers(inner, parameters, masks)
        for name, mask in masks.items():
            for value in optimizer.state.get(parameters[name], {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask)


def apply_masks(parameters: dict[str, nn.Parameter], masks: State) -> None:
    """Set pruned weights to 0."""
    for name, mask in masks.items():
        parameters[name].data.mul_(mask)


def optimizers_of(problem: Problem, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the recipe, or the one that the settings name, for the model's trained parameters."""
    config = problem.config
    if problem.recipe.optimizer is not None:
        return problem.recipe.optimizers({name: p for name, p in model.named_parameters() if p.requires_grad})
    groups = parameter_groups(config, model)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps)]
    return [torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov)]


def parameter_groups(config: SwampConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's groups of parameters with equal rates; "lr_factor" is the factor of a group's rate."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)]
    of_norms = {parameter for norm in norms for parameter in norm.parameters()}
    by_rates: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_factor, weight_decay = 1.0, config.weight_decay
        if not config.decay_norms_and_biases and (parameter in of_norms or parameter.dim() < 2):
            weight_decay = 0.0
        for group in config.groups:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in group.params):
                lr_factor = lr_factor if group.lr is None else group.lr
                weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
        by_rates.setdefault((lr_factor, weight_decay), []).append(parameter)
    return [
        {"params": params, "lr": config.initial_lr * factor, "lr_factor": factor, "weight_decay": weight_decay}
        for (factor, weight_decay), params in by_rates.items()
    ]


def learning_rate(problem: Problem, cycle: int | None, step: int) -> float:
    """Return the learning rate of a step, or with a recipe's optimizers the factor of their rates; see SwampConfig.

    cycle  None for the ticket's training, which is a warm-up and then constant, or has a recipe's schedule
    """
    config, steps_per_epoch = problem.rates, problem.steps_per_epoch
    peak, epoch = config.initial_lr, step // steps_per_epoch
    if problem.rate_factors is not None:
        return peak * problem.rate_factors[min(step, len(problem.rate_factors) - 1)]
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    if cycle is None or config.schedule == "constant":
        return peak
    if config.schedule == "step":
        at = config.step_epochs
        falls = list(range(at, config.epochs, at) if isinstance(at, int) else at)
        return float(peak * config.step_factor ** len([fall for fall in falls if fall <= epoch]))
    with_swa = config.schedule == "swa" or (config.schedule == "auto" and config.average == "swa")
    epochs = min(math.floor(config.swa_start * config.epochs), config.epochs - 1) if with_swa else config.epochs
    end, steps = config.window_lr if with_swa else 0.0, epochs * steps_per_epoch - warmup
    progress = min((step - warmup) / steps, 1.0) if steps > 0 else 1.0
    if config.schedule == "linear":
        return peak * (1 - progress)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * progress))


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
    if not problem.scored_at(cycle):
        return {}
    if config.mask_score == "signal-to-noise" and len(particles) == 1:
        raise FloatingPointError(
            f"cycle {cycle}: only one particle is left, so there is no signal-to-noise ratio; lower lr."
        )
    named = [dict(each.named_parameters()) for each in particles]
    ranked = {}
    if problem.recipe.score is not None:
        names = [entry.name for entry in problem.layout.prunable]
        weights = torch.stack([torch.cat([each[name].detach().flatten() for name in names]) for each in named])
        sizes = [entry.size for entry in problem.layout.prunable]
        try:
            scored = problem.recipe.scores(weights)
        except (TypeError, ValueError):
            if cycle == config.cycles:
                return {}  # no mask is made from the last cycle
            raise
        parts = zip(names, scored.split(sizes), strict=True)
        return {name: part.view_as(named[0][name]) for name, part in parts}
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


class Evaluated(NamedTuple):
    """A model's mean loss on a split, its accuracy, the softmax of every sample [n, C], and the outputs by batch.

    Accuracy and softmax are None if the split has no labels. Outputs are kept only if there are metrics.
    """

    loss: float
    accuracy: float | None
    softmax: Tensor | None
    outputs: list[Any]


def scores(problem: Problem, models: dict[int, nn.Module], cycle: int) -> tuple[dict[str, Any], int]:
    """Return the scores of a cycle, and the index of the particle that is best on the validation data.

    With combine="best", the average's scores are those of the best particle.

    models  number -> model: first the particles, last the average
    """
    row: dict[str, Any] = dict.fromkeys(SCORES)
    row |= {key: None for name in problem.metrics for split in ("", "val_") for key in metric_keys(split, name)}
    test, val = problem.test, problem.val
    keyed = [(model, problem.keys_of(cycle, number)) for number, model in models.items()]
    best = 0
    if val is not None:
        *each, average = [evaluate(problem, model, val, key, 2) for model, key in keyed]
        metrics = metrics_of(problem, val, each, average)
        best = best_of(problem, each, metrics)
        row["val_accuracy"] = (each[best] if problem.config.combine == "best" else average).accuracy
        if average.accuracy is not None:
            row["val_mean_accuracy"] = sum(one.accuracy or 0.0 for one in each) / len(each)
        row |= metric_entries(problem, "val_", metrics, best)
    if test is not None:
        *each, average = [evaluate(problem, model, test, key, 1) for model, key in keyed]
        row["loss"], row["accuracy"], *_ = each[best] if problem.config.combine == "best" else average
        row["particle_loss"] = [one.loss for one in each]
        if average.accuracy is not None:
            row["particle_accuracy"] = [one.accuracy for one in each]
            row["mean_accuracy"] = sum(row["particle_accuracy"]) / len(each)
            together = torch.stack([one.softmax for one in each if one.softmax is not None]).mean(0)
            row["ensemble_accuracy"] = accuracy_of(problem, test, together)
            if row["val_accuracy"] is not None:
                row["best_accuracy"] = row["particle_accuracy"][best]
        row |= metric_entries(problem, "", metrics_of(problem, test, each, average), best)
    return row, best


def best_of(problem: Problem, each: list[Evaluated], metrics: dict[str, list[float]]) -> int:
    """Return the index of the particle that is best according to `select_by`; NaN is worst, of equals the first wins.

    metrics  as `metrics_of` returns them
    """
    by, sign = problem.config.select_by, 1
    if by in metrics:
        values = metrics[by][: len(each)]
        sign = 1 if getattr(problem.metrics[by], "higher_is_better", True) else -1
    elif by == "accuracy" and each[0].accuracy is None:
        raise ValueError('`select_by` = "accuracy", but no label of the validation data counts.')
    elif by == "loss" or each[0].accuracy is None:
        values, sign = [one.loss for one in each], -1
    else:
        values = [one.accuracy or 0.0 for one in each]
    goodness = [-math.inf if math.isnan(value) else sign * value for value in values]
    return goodness.index(max(goodness))


def metrics_of(problem: Problem, data: Data, each: list[Evaluated], average: Evaluated) -> dict[str, list[float]]:
    """Return the values of each metric by name: of the particles, of the average and, last, of the ensemble."""
    if not problem.metrics:
        return {}
    models = [one.outputs for one in (*each, average)]
    models.append([ensemble_of(problem, data, list(of_batch)) for of_batch in zip(*models[:-1], strict=True)])
    targets = [targets for _, targets, _ in pass_in_stored_order(data, problem.config.batch_size)]
    values: dict[str, list[float]] = {}
    for name, metric in problem.metrics.items():
        for outputs in models:
            batches = copy.deepcopy(list(zip(outputs, targets, strict=True)))  # a metric may change what it gets
            if hasattr(metric, "compute"):
                own: Any = copy.deepcopy(metric)
                own = own.to(problem.device) if isinstance(own, nn.Module) else own
                own.reset()
                for batch in batches:
                    own.update(*batch)
                value = float(own.compute())
            else:
                value = float(torch.cat([metric(*batch) for batch in batches]).double().mean())
            values.setdefault(name, []).append(value)
    return values


def ensemble_of(problem: Problem, data: Data, particles: list[Any]) -> Any:
    """Return an ensemble's outputs on a batch: the logarithm of the mean softmax with labels, else the mean outputs."""
    if isinstance(data.labels, Labels):
        mean = sum(output.double().softmax(1) for output in particles) / len(particles)
        return mean.log().clamp_min(math.log(sys.float_info.min)).to(problem.dtype)
    return tree_map(
        lambda *leaves: (
            (sum(leaf.double() for leaf in leaves) / len(leaves)).to(leaves[0].dtype)
            if isinstance(leaves[0], Tensor) and leaves[0].is_floating_point()
            else leaves[0]
        ),
        *particles,
    )


def metric_keys(split: str, name: str) -> list[str]:
    """Return the keys of a metric on a split ("" or "val_"): of the average, of the particles, of the ensemble."""
    return [f"{split}{name}", f"{split}particle_{name}", f"{split}ensemble_{name}"]


def metric_entries(problem: Problem, split: str, metrics: dict[str, list[float]], best: int) -> dict[str, Any]:
    """Return the history row's entries of the metrics on a split.

    best  the index of the particle whose values replace the average's with combine="best"
    """
    row: dict[str, Any] = {}
    for name, (*each, average, ensemble) in metrics.items():
        values = each[best] if problem.config.combine == "best" else average, each, ensemble
        row |= dict(zip(metric_keys(split, name), values, strict=True))
    return row


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, data: Data, keys: Tensor, which: int) -> Evaluated:
    """Evaluate a model on a split.

    which  the split, 1 for test and 2 for val, which decides the random draws
    """
    loss, outputs = 0.0, []
    for number, (inputs, targets, count) in enumerate(pass_in_stored_order(data, problem.config.batch_size)):
        output = problem.outputs(model, inputs, at_time(keys, evaluation_time(which, number)))
        loss += float(problem.losses(output, targets).double().mean()) * count
        outputs.append(output)
    mean, kept = loss / data.length, outputs if problem.metrics else []
    if not isinstance(data.labels, Labels):
        return Evaluated(mean, None, None, kept)
    softmax = torch.cat(outputs).double().softmax(1)
    return Evaluated(mean, accuracy_of(problem, data, softmax), softmax, kept)


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
