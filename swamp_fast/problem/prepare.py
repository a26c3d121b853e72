"""A call's arguments, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from swamp_fast.common.fingerprint import callable_fingerprint, model_fingerprint, tensor_fingerprint
from swamp_fast.config import SwampConfig
from swamp_fast.data.sources import Opened, Source, hold_out, open_source
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.store import Built, build
from swamp_fast.particles.layout import Layout
from swamp_fast.problem.arguments import Arguments, call, cross_entropy
from swamp_fast.problem.checks import (
    check_batches,
    check_cycles,
    check_layers,
    check_model,
    check_split,
    choose_device,
    copy_of,
    put_in,
)
from swamp_fast.problem.precision import weight_dtype
from swamp_fast.problem.probe import look_at
from swamp_fast.problem.problem import SPLITS, Problem


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
    """Check every argument of a call, and make the model's copy, the data and the layout of the weights.

    standardise  as SwampResult.standardise, instead of the mean and std of uint8 training pictures

    Raises ValueError, TypeError, FileNotFoundError or RuntimeError that say what was expected, what came, and what
    to do; nothing has been trained or written by then.
    """
    config = SwampConfig.of(config, settings)
    given = arguments or Arguments()
    forward, loss, transform = given.forward or call, given.loss or cross_entropy, given.transform
    check_model(model)
    device, dtype = choose_device(config.device, model), weight_dtype(config)

    opened = open_source(train, "train", config.data_dir)
    config = _with_loader(config, opened, settings)
    like = None if standardise is None else Standardise.of(standardise)
    built, *others = _build_splits(opened, test, given.val, config, device, dtype, like)
    train_data = built.data
    val_data, test_data = (None if other is None else other.data for other in others)
    check_batches(train_data.length, config.batch_size, opened.drop_last, model)

    template = copy_of(model).to(device, dtype)
    for buffer in template.buffers():
        buffer.requires_grad_(False)
    found = look_at(template, train_data, forward, loss, transform, given.prunable, config)
    for name, data in (("val", val_data), ("test", test_data)):
        if data is not None:
            check_split(name, data, train_data)
    for data in (train_data, val_data, test_data):
        if data is not None and loss is cross_entropy and found.classes is not None:
            data.check_labels(found.classes)

    if val_data is not None and val_data.fingerprint() == train_data.fingerprint():
        raise ValueError(
            "`val` is the training data, on which nothing can be selected; pass other data, or a fraction."
        )

    if config.combine == "best" and val_data is None:
        raise ValueError(
            '`combine` = "best" chooses a particle on validation data, but `val` is None; pass data, or a fraction of '
            "train to hold out, such as 0.1."
        )

    lines = [f"data     {each.line}" for each in (built, *others) if each]
    if found.uncounted:
        lines.append(f"flops    unknown of {', '.join(found.uncounted)}: pruning them leaves the number as it is")

    trained = ((name, p) for name, p in template.named_parameters() if p.requires_grad)
    layout = Layout.of(trained, found.prunable)
    mask = layout.full_mask(device)
    if given.initial_masks is not None:
        put_in(layout, mask, given.initial_masks)
    check_cycles(int(mask.sum()), config.prune, config.cycles)
    if config.layer_kept is not None:
        check_layers(layout, mask, config.layer_kept)

    return Problem(
        config=config,
        original=model,
        template=template,
        layout=layout,
        mask=mask,
        train=train_data,
        val=val_data,
        test=test_data,
        standardise=built.standardise,
        forward=forward,
        loss=loss,
        transform=transform,
        on_cycle=given.on_cycle,
        drop_last=opened.drop_last,
        probe=found,
        lines=(_model_line(template, layout), *lines),
        fingerprints={
            "model": model_fingerprint(model),
            "mask": tensor_fingerprint(mask),
            **{
                name: None if data is None else data.fingerprint()
                for name, data in zip(SPLITS, (train_data, val_data, test_data), strict=True)
            },
            **{
                name: callable_fingerprint(function)
                for name, function in (("forward", forward), ("loss", loss), ("transform", transform))
            },
            "prunable": sorted(found.prunable),
            "drop_last": opened.drop_last,
        },
    )


def _with_loader(config: SwampConfig, opened: Opened, settings: Mapping[str, Any]) -> SwampConfig:
    """The settings with what a DataLoader decides."""
    if opened.batch_size is None:
        return config
    asked = settings.get("batch_size", opened.batch_size)
    if asked != opened.batch_size:
        raise ValueError(f"`batch_size` = {asked} contradicts the DataLoader's {opened.batch_size}; give one of them.")
    return config.replace(batch_size=opened.batch_size)


def _build_splits(
    opened: Opened,
    test: object,
    val: object,
    config: SwampConfig,
    device: torch.device,
    dtype: torch.dtype,
    like: Standardise | None,
) -> tuple[Built, Built | None, Built | None]:
    """The splits train, val, test, ready on the device; `like` or the training split's statistics standardise all."""
    source: Source = opened.source
    val_source: Source | None = None
    if isinstance(val, float | int) and not isinstance(val, bool):
        if len(source) == 0:
            raise ValueError("`train` is empty.")
        source, val_source = hold_out(source, float(val))
    elif val is not None:
        val_source = open_source(val, "val", config.data_dir).source
    test_source = open_source(test, "test", config.data_dir) if test is not None else None
    # A name or an .npz given as `test` means its test split.
    tested = opened.test if test_source is None else test_source.test or test_source.source
    for name, split in (("train", source), ("val", val_source), ("test", tested)):
        if split is not None and len(split) == 0:
            raise ValueError(f"`{name}` is empty; at least one sample is needed.")
    built = build(source, device, dtype, augment=config.augment, like=like)
    like = built.standardise
    held_out = None if val_source is None else build(val_source, device, dtype, like=like)
    return built, held_out, None if tested is None else build(tested, device, dtype, like=like)


def _model_line(model: nn.Module, layout: Layout) -> str:
    trained = sum(entry.size for entry in layout.entries)
    return (
        f"model    {type(model).__name__}: {layout.weights:,} prunable of {trained:,} trained weights, in "
        f"{len(layout.prunable)} of {len(layout.entries)} parameters"
    )
