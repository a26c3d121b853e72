"""What is to be done, checked before anything runs: the model, the data, the callables, the settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast.config import SwampConfig
from swamp_fast.data.sources import Opened, Source, hold_out, open_source
from swamp_fast.data.standardise import Standardise
from swamp_fast.data.store import Built, Data, batch_bounds, build
from swamp_fast.data.streams import LANE_SEED, lane_keys, seed_generators, seeds_for, stream_of
from swamp_fast.fingerprint import callable_fingerprint, model_fingerprint, tensor_fingerprint
from swamp_fast.layout import Layout
from swamp_fast.probe import Probe, has_batchnorm, probe
from swamp_fast.prunable import Prunable, select_prunable
from swamp_fast.prune import check_cycles
from swamp_fast.tree import tree_map

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]
OnCycle = Callable[[dict[str, Any]], object]

PROBED_SAMPLES = 8
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Problem:
    """One call's arguments, checked and made ready; both drivers start from it."""

    config: SwampConfig
    original: nn.Module  # the user's, never touched
    template: nn.Module  # its copy on the device, to copy particles from
    layout: Layout
    mask: Tensor  # [Q] bool, what the first cycle keeps
    train: Data
    val: Data | None
    test: Data | None
    standardise: Standardise | None
    forward: Forward
    loss: Loss
    transform: Callable[[Any], Any] | None
    on_cycle: OnCycle | None
    classifies: bool  # outputs [B, C, ...] and integer targets: accuracies make sense
    drop_last: bool
    probe: Probe
    lines: tuple[str, ...]  # what to tell the user about it
    fingerprints: dict[str, Any]  # of what the settings don't tell

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.mask.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return weight_dtype(self.config)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where the batches of an epoch begin and end."""
        return batch_bounds(self.train.length, self.config.batch_size, self.drop_last)

    def autocast(self) -> torch.autocast:
        """bfloat16 activations over float32 weights, where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def transformed(self, inputs: Any, step_key: Tensor) -> Any:
        """The user's own augmentation of one particle's batch, under a seed from its step's key [1, 3]."""
        if self.transform is None:
            return inputs
        seed_generators(int(seeds_for(step_key, LANE_SEED)[0, 0]))
        return self.transform(inputs)

    def seeded(self, step_key: Tensor) -> None:
        """Seed what a model draws besides dropout, if it does, from its step's key [1, 3]."""
        if self.probe.draws_elsewhere:
            seed_generators(int(seeds_for(step_key, LANE_SEED, 2)[0, 1]))

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of every sample, [B] float32 or float64."""
        each = self.loss(outputs, targets)
        return each.flatten(1).mean(1) if each.dim() > 1 else each

    def kept(self, mask: Tensor) -> dict[str, int]:
        """How many weights a mask [Q] keeps, by parameter."""
        return {name: int(view.sum()) for name, view in self.layout.mask_views(mask).items()}

    def flops(self, mask: Tensor) -> int:
        """FLOPs of one sample's forward under a mask [Q]."""
        return self.probe.flops(self.kept(mask), {entry.name: entry.size for entry in self.layout.prunable})


def prepare(
    model: nn.Module,
    train: object,
    test: object = None,
    *,
    val: object = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    transform: Callable[[Any], Any] | None = None,
    prunable: Prunable = None,
    initial_masks: Mapping[str, Tensor] | None = None,
    on_cycle: OnCycle | None = None,
    config: SwampConfig | None = None,
    settings: Mapping[str, Any],
) -> Problem:
    """Check every argument of a call, and make the model's copy, the data and the layout of the weights.

    Raises ValueError, TypeError, FileNotFoundError or RuntimeError that say what was expected, what came, and what
    to do; nothing has been trained or written by then.
    """
    config = SwampConfig.of(config, settings)
    for name, function in (("forward", forward), ("loss", loss), ("transform", transform), ("on_cycle", on_cycle)):
        if function is not None and not callable(function):
            raise TypeError(f"`{name}` must be callable, got {type(function).__name__}.")
    check_model(model)
    device, dtype = choose_device(config.device), weight_dtype(config)

    opened = open_source(train, "train", config.data_dir)
    config = _with_loader(config, opened, settings)
    builts = _build_splits(opened, test, val, config, device, dtype)
    train_data, val_data, test_data = (built.data if built else None for built in builts)
    assert train_data is not None and builts[0] is not None
    forward, loss = forward or _call, loss or _cross_entropy
    _check_batches(config, opened.drop_last, train_data, model)

    template = _copy(model).to(device, dtype)
    for buffer in template.buffers():
        buffer.requires_grad_(False)
    found, classifies = _probe(template, train_data, forward, loss, config)
    for data in (train_data, val_data, test_data):
        if data is not None and loss is _cross_entropy:
            data.check_labels(found.outputs.shape[1])

    names = select_prunable(found.model, prunable, found.outputs)
    layout = Layout.of(((n, p) for n, p in template.named_parameters() if p.requires_grad), names)
    mask = layout.full_mask(device)
    if initial_masks is not None:
        _put_in(layout, mask, initial_masks)
    check_cycles(int(mask.sum()), config.prune, config.cycles)

    return Problem(
        config=config,
        original=model,
        template=template,
        layout=layout,
        mask=mask,
        train=train_data,
        val=val_data,
        test=test_data,
        standardise=builts[0].standardise,
        forward=forward,
        loss=loss,
        transform=transform,
        on_cycle=on_cycle,
        classifies=classifies,
        drop_last=opened.drop_last,
        probe=found,
        lines=(_model_line(template, layout), *(f"data     {built.line}" for built in builts if built)),
        fingerprints={
            "model": model_fingerprint(model),
            "mask": tensor_fingerprint(mask),
            **{name: data and data.fingerprint() for name, data in zip(SPLITS, (train_data, val_data, test_data))},
            **{
                name: callable_fingerprint(function)
                for name, function in (("forward", forward), ("loss", loss), ("transform", transform))
            },
            "prunable": sorted(names),
            "drop_last": opened.drop_last,
        },
    )


def check_model(model: object) -> None:
    """Refuse what can't be copied into particles."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"`model` must be the plain module, got a {type(model).__name__}; pass model.module.")
    named = [*model.named_parameters(), *model.named_buffers()]
    if not any(True for _ in model.parameters()):
        raise ValueError("`model` has no parameters.")
    for name, tensor in named:
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"`model`: {name} has no shape yet; run one batch through the lazy module first.")
        if tensor.is_meta:
            raise ValueError(f"`model`: {name} is on the meta device and has no values; call model.to_empty and load it.")
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


def choose_device(wanted: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one."""
    if wanted == "auto":
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
        raise ValueError(f'`device`: "{wanted}" can\'t be had, this machine offers torch {count} CUDA devices.')
    return torch.device("cuda", index)


def weight_dtype(config: SwampConfig) -> torch.dtype:
    """Of weights, momentum and SWA."""
    return torch.float64 if config.precision == "float64" else torch.float32


def _with_loader(config: SwampConfig, opened: Opened, settings: Mapping[str, Any]) -> SwampConfig:
    """The settings with what a DataLoader decides."""
    if opened.batch_size is None:
        return config
    asked = settings.get("batch_size", opened.batch_size)
    if asked != opened.batch_size:
        raise ValueError(
            f"`batch_size` = {asked} contradicts the DataLoader's {opened.batch_size}; give one of them."
        )
    return config.replace(batch_size=opened.batch_size)


def _build_splits(
    opened: Opened, test: object, val: object, config: SwampConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Built, Built | None, Built | None]:
    """The splits train, val, test, ready on the device."""
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
    built = build(source, device, dtype, augment=config.augment)
    others = (split and build(split, device, dtype, like=built) for split in (val_source, tested))
    return built, *others  # type: ignore[return-value]


def _check_batches(config: SwampConfig, drop_last: bool, train: Data, model: nn.Module) -> None:
    samples, batch = train.length, config.batch_size
    if batch > samples:
        raise ValueError(f"`batch_size` = {batch} is more than the {samples} training samples; lower it.")
    if has_batchnorm(model) and (batch == 1 or (samples % batch == 1 and not drop_last)):
        raise ValueError(
            f"the last of an epoch's batches would hold one sample ({samples} samples, batch_size = {batch}), of "
            f"which BatchNorm has no statistics; take another batch_size, such as {max(batch - 1, 2)}."
        )


def _probe(
    template: nn.Module, data: Data, forward: Forward, loss: Loss, config: SwampConfig
) -> tuple[Probe, bool]:
    """Look at the model on the first few samples; also whether accuracies make sense."""
    batch = min(PROBED_SAMPLES, data.length, config.batch_size)
    keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
    order = torch.arange(batch, device=data.device)[None]
    handle = next(iter(data.batches(order, keys, [(0, batch)])))
    inputs, targets = data.fetch(handle, None).lane(0)
    classifies = False

    def run(model: nn.Module) -> tuple[Any, Tensor]:
        nonlocal classifies
        try:
            outputs = forward(model, inputs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise ValueError(
                f"the model can't run on a batch of inputs {_shapes(inputs)}: {error}\nCheck the data's shape, or pass "
                "`forward(model, inputs)`."
            ) from error
        plain = isinstance(outputs, Tensor) and outputs.dim() >= 2 and outputs.is_floating_point()
        if loss is _cross_entropy:
            if not plain:
                raise ValueError(
                    f"the model's output must be a tensor [B, classes] for cross-entropy, got {_shapes(outputs)}. Pass "
                    "`forward(model, inputs)` that returns the logits, or a `loss` of your own."
                )
            data.check_labels(outputs.shape[1])
        try:
            each = loss(outputs, targets)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise ValueError(
                f"the loss can't take outputs {_shapes(outputs)} with targets {_shapes(targets)}: {error}"
            ) from error
        if not isinstance(each, Tensor) or each.dim() == 0 or each.shape[0] != batch:
            raise ValueError(
                f"`loss(outputs, targets)` must return one number a sample, [B] = [{batch}], got {_shapes(each)}; use "
                'reduction="none".'
            )
        classifies = (
            plain
            and isinstance(targets, Tensor)
            and targets.dtype == torch.int64
            and targets.shape == (batch, *outputs.shape[2:])
            and outputs.shape[1] > 1
            and 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]
        )
        return outputs, each.sum()

    return probe(_copy(template), run, keys, batch), classifies


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(inputs)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"`model` can't be copied ({error}); a particle is a deep copy of it. Remove tensors that carry a graph, "
            "open files and the like from its attributes."
        ) from error


def _put_in(layout: Layout, mask: Tensor, initial: Mapping[str, Tensor]) -> None:
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
        raise ValueError("`initial_masks` keep no weight at all.")


def _model_line(model: nn.Module, layout: Layout) -> str:
    trained = sum(entry.size for entry in layout.entries)
    return (
        f"model    {type(model).__name__}: {layout.weights:,} prunable of {trained:,} trained weights, in "
        f"{len(layout.prunable)} of {len(layout.entries)} parameters"
    )


def _shapes(tree: Any) -> Any:
    return tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
