"""Makes a Problem from a call's arguments. Everything is checked before anything is trained or written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.copying import uncompiled
from swamp_fast.common.fingerprint import callable_fingerprint, changed_parts, model_fingerprint, tensor_fingerprint
from swamp_fast.common.warn import warn_user
from swamp_fast.config import SwampConfig, default_of
from swamp_fast.data.sources import Opened, open_source
from swamp_fast.data.standardise import Standardise
from swamp_fast.particles.layout import Layout
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.particles.spectral_norms import spectral_vectors
from swamp_fast.problem.arguments import Arguments, Forward, Loss, call, cross_entropy
from swamp_fast.problem.checks import (
    check_average,
    check_batches,
    check_cycles,
    check_layers,
    check_model,
    check_validation,
    choose_device,
    has_batch_of_one,
    particle_of,
    write_masks_,
)
from swamp_fast.problem.gradients import listed
from swamp_fast.problem.metrics import check_metrics, checked_metrics, fingerprint_of
from swamp_fast.problem.optimizer_trial import recipe_lines, try_optimizer
from swamp_fast.problem.parameter_groups import rates_lines, rates_of_parameters, trained_parameters
from swamp_fast.problem.precision import weight_dtype
from swamp_fast.problem.probe import Probe, batch_transform, check_single_sample, probe_model
from swamp_fast.problem.problem import Problem, steps_of
from swamp_fast.problem.recipe import Recipe
from swamp_fast.problem.scoring import accuracy_lines, decide_labels
from swamp_fast.problem.shared_memory import check_memory
from swamp_fast.problem.splits import Splits, build_splits, check_splits, open_splits, trained_weights

DOES_NOT_REPEAT = (
    "differs each time, as with a random generator of its own, so a run that is repeated or resumed ends in other "
    "results; draw from torch's global generator, which is seeded for every sample and step"
)


def prepare(
    model: nn.Module,
    train: object,
    test: object = None,
    arguments: Arguments | None = None,
    *,
    config: SwampConfig | None = None,
    settings: Mapping[str, Any],
    standardise: Mapping[str, Sequence[float]] | None = None,
) -> Problem:
    """Check every argument of a call, copy the model, open the data, and lay out the weights.

    standardise  the mean and std of uint8 pictures, as in SwampResult.standardise; None measures the training pictures

    Raises ValueError, TypeError, FileNotFoundError or RuntimeError for an argument that can't be used.
    """
    arguments = arguments or Arguments()
    forward, loss = arguments.forward or call, arguments.loss or cross_entropy
    config, recipe = SwampConfig.of(config, settings), arguments.recipe or Recipe()
    recipe.check(config)
    metrics = checked_metrics(arguments.metrics)
    model = uncompiled(model)
    check_model(model)
    check_memory(model)
    fingerprint = model_fingerprint(model)  # before hooks of the user's can collect anything in the model
    device, dtype = choose_device(config.device, model), weight_dtype(config)

    opened = open_source(train, "train", config.data_dir)
    config = _with_batch_size_of(opened, config, settings)
    like = None if standardise is None else Standardise.of(standardise)
    splits = build_splits(open_splits(opened, test, arguments.val, config.data_dir), config, device, dtype, like)
    steps_per_epoch = _checked_steps(splits.train.data.length, config, opened.drop_last)
    sample_weights = trained_weights(recipe.sample_weights, opened, arguments.val)
    transform = batch_transform(arguments.transform, splits.train.data, config)

    template, given_loss = _template_of(model, device, dtype), loss
    loss = _loss_of(given_loss, device, dtype)
    if has_batch_of_one(splits.train.data.length, config.batch_size):
        check_single_sample(template, splits.train.data, config, forward, loss, transform)
    probe = probe_model(model, template, splits.train.data, config, forward, loss, transform, arguments.prunable)
    own_optimizer = try_optimizer(recipe, template)
    check_splits(splits)
    decide_labels(template, splits.named, config, forward, loss, transform)
    check_metrics(template, splits.named, config, forward, loss, metrics)
    _show_warnings(model, template, splits, probe, config)
    hashes = splits.fingerprints()
    check_validation(hashes, config)

    rates = rates_of_parameters(template, config)
    layout = Layout.of(trained_parameters(template).items(), probe.prunable, rates)
    mask = _first_mask(layout, config, arguments.initial_masks, device)
    recipe.try_score(map(config.particles_at, range(config.cycles)), layout.weights, dtype, device)
    return Problem(
        config=config,
        original=model,
        template=template,
        layout=layout,
        mask=mask,
        train=splits.train.data,
        val=splits.val_data,
        test=splits.test_data,
        standardise=splits.train.standardise,
        forward=forward,
        loss=loss,
        transform=transform,
        recipe=recipe,
        sample_weights=sample_weights,
        own_optimizer=own_optimizer,
        rate_factors=recipe.factors(config.epochs * steps_per_epoch),
        metrics=metrics,
        on_epoch=arguments.on_epoch,
        on_cycle=arguments.on_cycle,
        drop_last=opened.drop_last,
        probe=probe,
        lines=_introduction(template, layout, splits, probe, (*rates_lines(rates), *recipe_lines(own_optimizer))),
        fingerprints={
            "model": fingerprint,
            "mask": tensor_fingerprint(mask),
            **hashes,
            **_callable_fingerprints(arguments, forward, given_loss, probe),
            "prunable": sorted(probe.prunable),
            "drop_last": opened.drop_last,
            **_recipe_fingerprints(recipe, arguments, config, template, layout, steps_per_epoch),
        },
    )


def _checked_steps(samples: int, config: SwampConfig, drop_last: bool) -> int:
    """Return the number of steps of an epoch. Raises ValueError if batches or the average don't fit it."""
    check_batches(samples, config, drop_last)
    steps = steps_of(samples, config, drop_last)
    check_average(config, steps)
    return steps


def _callable_fingerprints(arguments: Arguments, forward: Forward, loss: Loss, probe: Probe) -> dict[str, str | None]:
    """Return the hashes of the callables, without the parts that calls change."""
    functions = {"forward": forward, "loss": loss, "transform": arguments.transform}
    return {name: callable_fingerprint(each, probe.call_state[name]) for name, each in functions.items()}


def _recipe_fingerprints(
    recipe: Recipe,
    arguments: Arguments,
    config: SwampConfig,
    template: nn.Module,
    layout: Layout,
    steps_per_epoch: int,
) -> dict[str, Any]:
    """Return the hashes of the recipe and of the metric that selects, if the call has them.

    The recipe's functions have been called once. They are called again, to leave out what their calls change.
    """
    before = recipe.parts()
    with generators_left_alone():
        if recipe.optimizer is not None:
            recipe.optimizers(trained_parameters(particle_of(template)))
        if recipe.schedule is not None:
            recipe.schedule(0, config.epochs * steps_per_epoch)
        device = next(template.parameters()).device
        recipe.try_score(map(config.particles_at, range(config.cycles)), layout.weights, weight_dtype(config), device)
    after = recipe.parts()
    hashes = recipe.fingerprint({name: changed_parts(before[name], after[name]) for name in before})
    metric = (arguments.metrics or {}).get(config.select_by)
    return {
        **({"recipe": hashes} if hashes else {}),
        **({} if metric is None else {"select_by": fingerprint_of(metric)}),
    }


def _with_batch_size_of(opened: Opened, config: SwampConfig, settings: Mapping[str, Any]) -> SwampConfig:
    """Return the settings with the batch size of `train` if it is a DataLoader.

    Raises ValueError if the call also sets another batch size.
    """
    if opened.batch_size is None:
        return config
    is_set = "batch_size" in settings or config.batch_size != default_of("batch_size")
    requested = config.batch_size if is_set else opened.batch_size
    if requested != opened.batch_size:
        raise ValueError(
            f"`batch_size` = {requested} contradicts the DataLoader's {opened.batch_size}; give one of them."
        )
    return config.replace(batch_size=opened.batch_size)


def _template_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the model on the device, with buffers that need no gradient."""
    template = particle_of(model).to(device, dtype)
    for buffer in template.buffers():
        buffer.requires_grad_(False)
    return template


def _loss_of(loss: Loss, device: torch.device, dtype: torch.dtype) -> Loss:
    """Return the loss; of a module, a copy on the device if it has tensors, such as class weights.

    Raises ValueError for a loss with parameters that would have to be trained.
    """
    if not isinstance(loss, nn.Module) or not [*loss.parameters(), *loss.buffers()]:
        return loss
    trained = [name for name, parameter in loss.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"`loss` has parameters of its own ({', '.join(trained)}), but only the model's are trained. Call "
            "loss.requires_grad_(False) to keep them as they are, or make them part of the model."
        )
    return copy.deepcopy(loss).to(device, dtype)


def _first_mask(
    layout: Layout, config: SwampConfig, initial_masks: Mapping[str, Tensor] | None, device: torch.device
) -> Tensor:
    """Return the mask [Q] of cycle 0. Raises ValueError if the settings would prune more weights than it keeps."""
    mask = layout.full_mask(device)
    if initial_masks is not None:
        write_masks_(layout, mask, initial_masks)
    check_cycles(config, int(mask.sum()), layout.weights)
    if config.layer_kept is not None:
        check_layers(layout, mask, config.layer_kept)
    return mask


def _show_warnings(model: nn.Module, template: nn.Module, splits: Splits, probe: Probe, config: SwampConfig) -> None:
    """Warn of layers in evaluation mode, and of data and transforms that keep a run from being resumed exactly."""
    _warn_of_modes(model, template)
    for text in _unrepeatable(splits, probe) if config.run_dir is not None else ():
        warn_user(f"{text}.")


def _warn_of_modes(model: nn.Module, template: nn.Module) -> None:
    """Warn if the user put layers into evaluation mode that train() puts back into training mode."""
    evaluated = [name for name, module in model.named_modules() if not (module.training or list(module.children()))]
    if not model.training or not evaluated:
        return
    trained = dict(particle_of(template).train().named_modules())
    left = [name for name in evaluated if trained[name].training]
    if left:
        warn_user(
            f"{listed(left)} of the model are in evaluation mode, but model.train(), which is called before each "
            "training, puts them into training mode. To keep a layer in evaluation mode, override its train()."
        )


def _notes(model: nn.Module, probe: Probe) -> list[str]:
    """Return lines about what is not trained, and about buffers that are averaged."""
    notes = []
    if probe.without_gradient:
        unused = listed(probe.without_gradient)
        notes.append(f"note     the first samples give no gradient for {unused}; weight decay still applies")
    if probe.outside:
        shapes = listed([str(list(shape)) for shape in probe.outside])
        notes.append(f"note     the loss has gradients for tensors outside the model, which aren't trained: {shapes}")
    for name, parts in probe.call_state.items():
        if parts:
            held = listed(sorted(parts))
            notes.append(f"note     `{name}` changes {held} at every call, so the run's fingerprint leaves that out")
    buffers, vectors = dict(model.named_buffers()), spectral_vectors(model)
    averaged = [
        name for name in probe.changed if name in buffers and buffers[name].is_floating_point() and name not in vectors
    ]
    if averaged:
        notes.append(
            f"buffers  {listed(averaged)}: averaged over the particles; only statistics of norms that derive from "
            "torch's BatchNorm are re-estimated"
        )
    return notes


def _unrepeatable(splits: Splits, probe: Probe) -> list[str]:
    """Return notes on the data and the augmentation that can't be repeated by seeding the global generators."""
    names = [f"what {split.data.name} reads" for split in splits.built if not split.repeats]
    names += [] if probe.repeats else ["what `transform` returns"]
    return [f"{name} {DOES_NOT_REPEAT}" for name in names]


def _introduction(
    model: nn.Module, layout: Layout, splits: Splits, probe: Probe, of_training: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the console's first lines on a run: its model, its data, its training, and what the FLOPs leave out."""
    trained = sum(entry.size for entry in layout.entries)
    lines = [
        f"model    {type(model).__name__}: {layout.weights:,} prunable of {trained:,} trained weights, in "
        f"{len(layout.prunable)} of {len(layout.entries)} parameters"
    ]
    lines += [probe.pruned.line, *_notes(model, probe), *splits.lines, *of_training]
    lines += [line for name, data in splits.named.items() if name != "train" for line in accuracy_lines(name, data)]
    lines += [f"random   {text}" for text in _unrepeatable(splits, probe)]
    if probe.uncounted:
        lines.append(
            f"flops    not counted for {', '.join(probe.uncounted)}: pruning these doesn't lower the FLOPs shown"
        )
    return tuple(lines)
