"""Checks that refuse unusable models, devices, batch sizes, validation data and masks before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.nn.utils.prune import BasePruningMethod

from swamp_fast.common.copying import attribute_tensors, copy_of
from swamp_fast.common.format import dtype_name
from swamp_fast.common.memory import known_free_memory
from swamp_fast.config import SwampConfig
from swamp_fast.particles.layout import Layout, by_layer
from swamp_fast.particles.schedule import average_samples, kept_at, swa_first_epoch


def check_model(model: object) -> None:
    """Raise TypeError or ValueError for a model that can't be trained as particles."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"`model` must be the plain module, got a {type(model).__name__}; pass model.module.")
    _check_modules(model)
    _check_hooks(model)
    named = [*model.named_parameters(), *model.named_buffers()]
    if not any(True for _ in model.parameters()):
        raise ValueError("`model` has no parameters, so nothing to train or prune; pass the network itself.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has nothing to prune: all its parameters are frozen (requires_grad=False); unfreeze some."
        )
    for name, tensor in named:
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            raise ValueError(f"`model`: {name} has no shape yet; run one batch through the lazy module first.")
        if tensor.is_meta:
            raise ValueError(
                f"`model`: {name} is on the meta device and has no values; call model.to_empty and load its weights."
            )
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`model`: {name} is in half precision ({dtype_name(tensor.dtype)}), which loses small updates; pass "
                'model.float(), and precision="bfloat16" for fast activations.'
            )
        if tensor.is_complex():
            raise ValueError(f"`model`: {name} is complex; parameters must be real.")
    empty = next((name for name, parameter in model.named_parameters() if parameter.numel() == 0), None)
    if empty is not None:
        raise ValueError(f"`model`: {empty} is empty, as of a layer with no features; leave that layer out.")
    devices = sorted({str(tensor.device) for _, tensor in named})
    if len(devices) > 1:
        raise ValueError(f"`model` must be on one device, got {', '.join(devices)}; call model.to(...) first.")
    _check_values(model)


def _check_values(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"`model`: {name} has NaN or infinite values; initialise it, or load its weights anew.")


def _check_hooks(model: nn.Module) -> None:
    """Raise ValueError if a parameter has a hook, which its copies would not have."""
    hooked = [
        name
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    if hooked:
        raise ValueError(
            f"`model`: {', '.join(hooked[:6])} has a hook on its gradient, which the particles' copies would "
            "lose. Remove it, and change the gradient in `forward` instead, by detach() or by a hook on an activation."
        )


def _check_modules(model: nn.Module) -> None:
    """Raise TypeError or ValueError for modules of which copies can't be trained or pruned."""
    for path, module in model.named_modules():
        place = path or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"`model`: {place} is compiled by torch.jit, and its copies share their parameters. Pass the plain "
                "module, and compile the result."
            )
        if isinstance(module, FakeQuantizeBase | ObserverBase):
            raise TypeError(
                f"`model`: {place} ({type(module).__name__}) prepares the model for quantization. Pass the model as it "
                "was before torch.ao.quantization.prepare or prepare_qat, and prepare the result."
            )
        pruned = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)]
        if pruned:
            name = pruned[0]._tensor_name
            raise ValueError(
                f"`model`: torch.nn.utils.prune prunes {name} of {place} at every forward pass. Call "
                f'torch.nn.utils.prune.remove(module, "{name}") first; `initial_masks` takes the mask.'
            )


def choose_device(name: str, model: nn.Module) -> torch.device:
    """Return the device that the setting `device` names; "auto" is the model's GPU, else the current GPU, else the CPU.

    Raises ValueError if the device doesn't exist or is neither a CPU nor a CUDA device.
    """
    if name == "auto":
        device = next(model.parameters()).device
        if device.type == "cuda":
            return device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'`device` must be "auto", "cpu", "cuda" or "cuda:N", got "{name}".') from error
    if device.type == "cpu":
        if device.index:
            raise ValueError(f'`device`: "{name}" doesn\'t exist, because all processors are one device; use "cpu".')
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f'`device` must be a CPU or a CUDA device, got "{name}"; there are no kernels for others.')
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(
            f'`device`: "{name}" is not available; torch sees {count} CUDA devices here. Use "auto" or "cpu".'
        )
    return torch.device("cuda", index)


def particle_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of the model. Raises ValueError, with the reason, if it can't be copied."""
    try:
        return copy_of(model)
    except Exception as error:
        raise ValueError(
            f"`model` can't be copied ({error}), but each particle is a deep copy of it. Remove open files, locks and "
            "similar objects from its attributes."
        ) from error


def check_recomputed(model: nn.Module, before: Mapping[str, list[Tensor]], graphs: Mapping[str, list[int]]) -> None:
    """Raise ValueError if a forward pass left an attribute as it was that had an autograd graph in the user's model.

    A copy has only its values, without the graph. So it must be a cache that every forward pass computes anew.

    before  the model's `attribute_tensors` before the forward pass
    graphs  the attributes of the user's model that have a graph, as `attributes_with_graphs` returns them
    """
    after = {name: {id(tensor) for tensor in held} for name, held in attribute_tensors(model).items()}
    for name, places in graphs.items():
        if any(id(before[name][place]) in after.get(name, ()) for place in places):
            raise ValueError(
                f"`model`: its attribute {name} holds a tensor with an autograd graph that forward doesn't compute "
                f"anew, and each particle is a copy of the model, without this graph. Compute {name} in forward, or "
                f"detach it: model.{name} = model.{name}.detach()."
            )


def check_particles_fit(device: torch.device, particles: int, of_particle: int) -> None:
    """Raise MemoryError if particles of `of_particle` bytes each don't fit the free memory, where that is known."""
    free = known_free_memory(device)
    if free is not None and particles * of_particle > free:
        raise MemoryError(
            f"{particles} particles take at least {particles * of_particle / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
            f"free on {device}, where at most {free // of_particle} fit. Lower `particles`, or choose a device with "
            "more memory."
        )


def check_batches(samples: int, config: SwampConfig, drop_last: bool) -> None:
    """Raise ValueError if a batch takes more samples, or a step more batches, than an epoch has."""
    batch = config.batch_size
    if batch > samples:
        raise ValueError(f"`batch_size` = {batch} is more than the {samples} training samples; lower it.")
    batches = samples // batch if drop_last else -(-samples // batch)
    if config.accumulate > batches:
        raise ValueError(
            f"`accumulate` = {config.accumulate} is more than the {batches} batches of an epoch, after each of which a "
            "step is taken; lower it, or batch_size."
        )


def has_batch_of_one(samples: int, batch: int) -> bool:
    """Whether a pass through the data has a batch of one sample.

    With `drop_last` an epoch has none, but the pass in which statistics are re-estimated does.
    """
    return batch == 1 or samples % batch == 1


def other_batch_size(samples: int, batch: int) -> str:
    """Return an advice on the batch size that leaves no batch of one sample, as close to `batch` as possible."""
    sizes = [size for size in range(2, samples + 1) if samples % size != 1]
    if not sizes:
        return "Pass more samples."
    return f"Choose another batch_size, such as {min(sizes, key=lambda size: abs(size - batch))}."


def check_validation(fingerprints: Mapping[str, str | None], config: SwampConfig) -> None:
    """Raise ValueError if the validation data are the training data, or if combine="best" has no validation data.

    fingerprints  split name -> hash of the split's data, None without data
    """
    if fingerprints["val"] is None:
        if config.combine == "best":
            raise ValueError(
                '`combine` = "best" chooses a particle on validation data, but `val` is None; pass data, or a fraction '
                "of train to hold out, such as 0.1."
            )
    elif fingerprints["val"] == fingerprints["train"]:
        raise ValueError(
            "`val` is the training data, but particles must be selected on other data; pass some, or a fraction of "
            "train to hold out."
        )


def check_masks(argument: str, masks: object, views: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError unless masks are a dict of bool tensors with the names and shapes of `views`."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"`{argument}` must be a dict from parameter names to masks, got {type(masks).__name__}.")
    for name, given in masks.items():
        if name not in views:
            raise ValueError(f'`{argument}`: "{name}" is not a prunable parameter; those are {", ".join(views)}.')
        if not isinstance(given, Tensor) or given.dtype != torch.bool:
            kind = dtype_name(given.dtype) if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f'`{argument}`: "{name}" must be a bool tensor, got {kind}.')
        if given.is_meta or given.layout != torch.strided:
            raise ValueError(f'`{argument}`: "{name}" must be a dense tensor with values, not a meta or sparse one.')
        if given.shape != views[name].shape:
            raise ValueError(
                f'`{argument}`: "{name}" must have shape {list(views[name].shape)}, got {list(given.shape)}.'
            )


def write_masks_(layout: Layout, mask: Tensor, initial: Mapping[str, Tensor]) -> None:
    """Write the user's initial masks into the mask [Q] of cycle 0.

    Raises ValueError or TypeError for a mask of the wrong name, type or shape, and if no weight is kept.
    """
    views = layout.mask_views(mask)
    check_masks("initial_masks", initial, views)
    for name, given in initial.items():
        views[name].copy_(given)
    if not bool(mask.any()):
        raise ValueError(
            f"`initial_masks` keep none of the {layout.weights:,} prunable weights; at least some must be True."
        )


def check_average(config: SwampConfig, steps_per_epoch: int) -> None:
    """Raise ValueError if the average would have no sample, because its window is shorter than `average_every`."""
    if config.average == "none" or average_samples(config, steps_per_epoch, config.epochs * steps_per_epoch) > 0:
        return
    window = (config.epochs - swa_first_epoch(config)) * steps_per_epoch
    raise ValueError(
        f"`average_every` = {config.average_every} steps is longer than the averaging window of {window} steps; "
        "take samples more often, or lower `swa_start`."
    )


def check_cycles(config: SwampConfig, kept: int, prunable: int) -> None:
    """Raise ValueError if, starting with `kept` of the `prunable` weights, a cycle would prune or leave nothing."""
    left = kept
    for cycle in range(1, config.cycles + 1):
        before, left = left, kept_at(config, cycle, left, prunable)
        reached = (
            config.target_density is not None and cycle == config.cycles
        )  # on the way, a small model may round down
        if left < 1 or (left == before and not reached):
            what = "nothing would be left to keep" if left < 1 else f"nothing would be pruned of {before}"
            raise ValueError(
                f"{config.cycles} cycles at prune = {config.prune} are more than {kept} weights allow: "
                f"in cycle {cycle} {what}. Set cycles to at most {cycle - 1}."
            )


def check_layers(layout: Layout, mask: Tensor, layer_kept: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if `layer_kept` keeps more weights of a layer than the cycle before, or none at all.

    mask  [Q]  the mask of cycle 0
    """
    before = by_layer(layout, mask)
    for cycle, kept in enumerate(layer_kept, 1):
        if len(kept) != len(before) or not sum(kept) or any(not 0 <= k <= b for k, b in zip(kept, before, strict=True)):
            raise ValueError(
                f"`layer_kept`: cycle {cycle} has {list(kept)}, but needs one number for each of {len(before)} "
                f"prunable parameters. They must be at most {before}, the weights that are left, and not all 0."
            )
        before = list(kept)
