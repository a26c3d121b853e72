"""What is refused before anything runs: a model, a device, batches or masks that can't be used."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swamp_fast.common.tree import tree_map
from swamp_fast.data.store import Data
from swamp_fast.particles.layout import Layout, by_layer
from swamp_fast.particles.schedule import kept_after


def check_model(model: object) -> None:
    """Refuse what can't be copied into particles."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"`model` must be the plain module, got a {type(model).__name__}; pass model.module.")
    named = [*model.named_parameters(), *model.named_buffers()]
    if not any(True for _ in model.parameters()):
        raise ValueError("`model` has no parameters, so nothing to train or prune; pass the network itself.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has nothing to prune: all its parameters are frozen (requires_grad=False).")
    for name, tensor in named:
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ValueError(f"`model`: {name} has no shape yet; run one batch through the lazy module first.")
        if tensor.is_meta:
            raise ValueError(
                f"`model`: {name} is on the meta device and has no values; call model.to_empty and load it."
            )
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`model`: {name} is in half precision ({_dtype(tensor)}), which loses small updates; pass "
                'model.float(), and precision="bfloat16" for fast activations.'
            )
        if tensor.is_complex():
            raise ValueError(f"`model`: {name} is complex; parameters must be real.")
    devices = sorted({str(tensor.device) for _, tensor in named})
    if len(devices) > 1:
        raise ValueError(f"`model` must be on one device, got {', '.join(devices)}; call model.to(...) first.")


def choose_device(wanted: str, model: nn.Module) -> torch.device:
    """The device that a setting names; "auto" is the model's own GPU, else the current one, else the CPU."""
    if wanted == "auto":
        own = next(model.parameters()).device
        if own.type == "cuda":
            return own
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f'`device` must be "auto", "cpu", "cuda" or "cuda:N", got "{wanted}".') from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f'`device` must be a CPU or a CUDA device, got "{wanted}"; there are no kernels for others.')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(
            f'`device`: "{wanted}" can\'t be had, this machine offers torch {count} CUDA devices; use "auto" or "cpu".'
        )
    return torch.device("cuda", index)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, or an error that says what stands in its way."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"`model` can't be copied ({error}); a particle is a deep copy of it. Remove tensors that carry a graph, "
            "open files and the like from its attributes."
        ) from error


def check_batches(samples: int, batch: int, drop_last: bool, model: nn.Module) -> None:
    """Refuse a batch size that an epoch can't be cut into, or BatchNorm can't train with."""
    if batch > samples:
        raise ValueError(f"`batch_size` = {batch} is more than the {samples} training samples; lower it.")
    if any(isinstance(module, _BatchNorm) for module in model.modules()) and (
        batch == 1 or (samples % batch == 1 and not drop_last)
    ):
        raise ValueError(
            f"the last of an epoch's batches would hold one sample ({samples} samples, batch_size = {batch}), of "
            f"which BatchNorm has no statistics; take another batch_size, such as {max(batch - 1, 2)}."
        )


def check_split(name: str, data: Data, train: Data) -> None:
    """Refuse a split whose samples are not of the training samples' kind, before hours are spent on those."""
    if not (data.stacked and train.stacked):
        return  # the user's collate function decides
    kinds = [_sample_kind(split) for split in (data, train)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"`{name}` must hold samples like those of `train`, (input, target) of {kinds[1]}; got {kinds[0]}. Give "
            "both in the same shape and type (uint8 pictures are standardised here, float ones are taken as they are)."
        )


def _sample_kind(data: Data) -> tuple[str, str]:
    """Shape and type of one sample and its target, and whether it is standardised here."""
    first, no_keys = (torch.zeros(1, size, dtype=torch.int64, device=data.device) for size in (1, 3))
    inputs, targets = data.fetch(next(iter(data.batches(first, no_keys, [(0, 1)]))), None).lane(0)
    return ("uint8 pictures " if data.table is not None else "") + str(_kinds(inputs)), str(_kinds(targets))


def _kinds(tree: Any) -> Any:
    return tree_map(lambda leaf: f"{list(leaf.shape[1:])} {_dtype(leaf)}" if isinstance(leaf, Tensor) else "?", tree)


def put_in(layout: Layout, mask: Tensor, initial: Mapping[str, Tensor]) -> None:
    """Write the masks that were given into the first mask [Q]."""
    views = layout.mask_views(mask)
    for name, given in initial.items():
        if name not in views:
            raise ValueError(f'`initial_masks`: "{name}" is not a prunable parameter; those are {", ".join(views)}.')
        if not isinstance(given, Tensor) or given.dtype != torch.bool:
            kind = _dtype(given) if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f'`initial_masks`: "{name}" must be a bool tensor, got {kind}.')
        if given.shape != views[name].shape:
            raise ValueError(
                f'`initial_masks`: "{name}" must have shape {list(views[name].shape)}, got {list(given.shape)}.'
            )
        views[name].copy_(given)
    if not bool(mask.any()):
        raise ValueError(
            f"`initial_masks` keep none of the {layout.weights:,} prunable weights; at least some must be True."
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_cycles(kept: int, prune: float, cycles: int) -> None:
    """Refuse, before anything runs, more cycles than the weights allow."""
    left = kept
    for cycle in range(1, cycles + 1):
        before, left = left, kept_after(left, prune)
        if left < 1 or left == before:
            what = "nothing would be left to keep" if left < 1 else f"nothing would be pruned of {before}"
            raise ValueError(
                f"{cycles} cycles at prune = {prune} are more than {kept} weights allow: in cycle {cycle} {what}. "
                f"Ask for at most {cycle - 1} cycles."
            )


def check_layers(layout: Layout, mask: Tensor, layer_kept: Sequence[Sequence[int]]) -> None:
    """Refuse numbers of weights by cycle and layer that can't be kept of a mask [Q], one cycle after the other."""
    before = by_layer(layout, mask)
    for cycle, kept in enumerate(layer_kept, 1):
        if len(kept) != len(before) or not sum(kept) or any(not 0 <= k <= b for k, b in zip(kept, before, strict=True)):
            raise ValueError(
                f"`layer_kept`: cycle {cycle} has {list(kept)}, and needs for each of {len(before)} prunable "
                f"parameters at most as many as are left of it, {before}."
            )
        before = list(kept)
