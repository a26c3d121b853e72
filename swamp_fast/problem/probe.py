"""Runs the model on one small batch before anything is trained, to learn its properties and its cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from swamp_fast.common.copying import attribute_tensors, attributes_with_graphs
from swamp_fast.common.fingerprint import callable_parts, changed_parts, state_fingerprint
from swamp_fast.common.format import dtype_name
from swamp_fast.common.modes import KEPT_MODES
from swamp_fast.common.tree import tensors, tree_clone
from swamp_fast.config import SwampConfig
from swamp_fast.data.labels import check_labels
from swamp_fast.data.store import Data, Stored
from swamp_fast.particles.dropout import DropoutStream, refused_in_backward
from swamp_fast.particles.random import generators_left_alone, generators_state, lane_keys, seed_generators, stream_of
from swamp_fast.problem.arguments import BatchTransform, Forward, Loss, Transform, cross_entropy, takes_targets
from swamp_fast.problem.checks import check_recomputed, other_batch_size, particle_of
from swamp_fast.problem.embeddings import NoSuchRow, indices_checked
from swamp_fast.problem.gradients import check_gradients, gradients_restored, leaves_of
from swamp_fast.problem.loss_mixing import warn_if_mixed
from swamp_fast.problem.mixing import check_mixing
from swamp_fast.problem.precision import weight_dtype
from swamp_fast.problem.prunable import Prunable, Pruned, select_prunable
from swamp_fast.problem.shapes import (
    check_class_axis,
    check_for_cross_entropy,
    check_losses,
    could_be_chance,
    is_of_torch,
    shapes_of,
)
from swamp_fast.problem.uses import counted_uses
from swamp_fast.problem.value_reads import ValueReads

MAX_SAMPLES = 8  # in the batch on which the model is run
TOLERANCE = 1e-4  # relative and absolute: on a GPU, two identical forward passes may differ by rounding
# The errors that a forward or a loss may raise if it doesn't fit the data.
MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True)
class Probe:
    """The properties of a model that running it forward and backward showed.

    pruned           the parameters to prune, and why others aren't pruned
    draws_elsewhere  whether the forward pass draws from torch's, Python's or NumPy's generator, other than by dropout
    changed          the names of the weights and buffers that a forward pass changes, without norms' running statistics
    keeps_state      whether a forward pass changes plain attributes of the model, or draws from a generator in them
    call_state       name of a callable argument -> its parts that calls change, such as a log or a counter
    without_gradient  the names of the trained parameters for which the loss of these samples has no gradient
    outside          the shapes of the tensors outside the model for which the loss has gradients
    repeats          whether the augmentation repeats its draws if torch's, Python's and NumPy's generators are seeded
    reads_values     the operation by which the forward pass or the loss reads values of tensors, so that it may branch
                     on them; None if there is none
    convolves        whether the model convolves pictures [B, C, H, W]
    dense_flops      the FLOPs of one sample's forward pass: 2 per multiply-add of matrix products and convolutions
    uses             parameter name -> multiply-adds per weight in one sample's forward pass
    """

    pruned: Pruned
    draws_elsewhere: bool
    changed: tuple[str, ...]
    keeps_state: bool
    call_state: dict[str, frozenset[str]]
    without_gradient: tuple[str, ...]
    outside: tuple[tuple[int, ...], ...]
    repeats: bool
    reads_values: str | None
    convolves: bool
    dense_flops: int
    uses: dict[str, float]

    @property
    def prunable(self) -> frozenset[str]:
        """The names of the parameters to prune."""
        return self.pruned.names

    @property
    def uncounted(self) -> list[str]:
        """The prunable parameters whose multiply-adds are not counted, because no counted layer uses them."""
        return [name for name, times in self.uses.items() if name in self.prunable and not times]

    def flops(self, kept: dict[str, int], sizes: dict[str, int]) -> int:
        """Return the FLOPs of one sample's forward pass if the pruned weights cost nothing.

        Pruning `uncounted` parameters doesn't lower the result. Some of them, such as those of nn.LSTM on a CPU, are
        not counted in `dense_flops` either.

        kept   parameter name -> number of kept weights
        sizes  parameter name -> number of weights
        """
        saved = sum(2 * self.uses.get(name, 0.0) * (sizes[name] - kept[name]) for name in kept)
        return round(self.dense_flops - saved)


def probe_model(
    original: nn.Module,
    template: nn.Module,
    data: Data,
    config: SwampConfig,
    forward: Forward,
    loss: Loss,
    transform: BatchTransform | None,
    prunable: Prunable,
) -> Probe:
    """Run a copy of the model on the first few samples, forward and backward, in train mode.

    original  the user's model, of which the template is a copy

    Raises ValueError or TypeError if the model, the data, `forward`, `loss`, `transform` and `prunable` don't fit
    together.
    """
    keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
    trial = Trial(data, min(MAX_SAMPLES, data.length, config.batch_size), keys, forward, loss, transform)
    check_mixing(config, trial.inputs, trial.targets, trial.samples)
    model = particle_of(template).train()
    with generators_left_alone(), _modes_kept():
        effects = _side_effects(original, model, trial, keys)
        with counted_uses(model, trial.samples) as uses, torch.no_grad(), FlopCounterMode(display=False) as counter:
            trial.run(model)
        trial.confirm(model)
    model.zero_grad()
    outputs = effects.outputs
    repeats = trial.transform_repeats()
    convolves = any("convolution" in str(op) for op in counter.get_flop_counts().get("Global", {}))
    return Probe(
        pruned=select_prunable(model, prunable, outputs, effects.loss),
        draws_elsewhere=effects.draws_elsewhere,
        changed=effects.changed,
        keeps_state=effects.keeps_state,
        call_state=trial.call_state(),
        without_gradient=effects.without_gradient,
        outside=effects.outside,
        repeats=repeats,
        reads_values=trial.reads.operation,
        convolves=convolves and any(leaf.dim() == 4 for leaf in tensors(trial.inputs)),
        dense_flops=counter.get_total_flops() // trial.samples,
        uses=uses,
    )


def check_single_sample(
    template: nn.Module, data: Data, config: SwampConfig, forward: Forward, loss: Loss, transform: BatchTransform | None
) -> None:
    """Raise ValueError if the model can't be trained on a batch of one sample, though it can be on two.

    That is so of BatchNorm, unless a sample has several values per channel, as a feature map does.
    """
    keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)

    def error_with(samples: int) -> ValueError | None:
        model = particle_of(template).train()
        try:
            with generators_left_alone(), DropoutStream(keys):
                Trial(data, samples, keys, forward, loss, transform).run(model)
        except ValueError as error:
            return error
        return None

    error = error_with(1)
    if error is not None and (data.length == 1 or error_with(2) is None):
        raise ValueError(
            "the last batch of a pass through all training data, such as the one that re-estimates norms, would hold "
            f"one sample ({data.length} samples, batch_size = {config.batch_size}), but on one "
            f"{error.__cause__ or error}. {other_batch_size(data.length, config.batch_size)}"
        ) from error


class Trial:
    """One small batch on which a model and the loss are run. Errors say which of them doesn't fit which data.

    reads      records operations of `forward` and `loss` that read the values of tensors
    uncertain  whether the shape of the loss may be right by chance; see `confirm`
    parts      the callables' parts after their first call; see `call_state`
    """

    def __init__(
        self, data: Data, samples: int, keys: Tensor, forward: Forward, loss: Loss, transform: BatchTransform | None
    ) -> None:
        self.data, self.samples, self.keys = data, samples, keys
        self.forward, self.loss, self.transform = forward, loss, transform
        self.untransformed = _first_samples(data, samples, keys)
        self.inputs, self.targets = self.untransformed
        if transform is not None:
            self.inputs, self.targets = _transformed(transform, *self.untransformed)
        self.reads = ValueReads()
        self.uncertain = False
        self.parts: dict[str, dict[str, str]] = {}

    def run(self, model: nn.Module) -> tuple[Any, Tensor]:
        """Return the model's outputs and the sum of the losses."""
        outputs = self._outputs(model)
        losses = self._losses(outputs)
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError(
                "the loss does not depend on any trained parameter; check for detach() and no_grad() in the model, "
                "`forward` and `loss`."
            )
        return outputs, losses.sum()

    def transform_repeats(self) -> bool:
        """Whether the transform gives the same batch again after the same seeding of the global generators."""
        if self.transform is None:
            return True
        return _same((self.inputs, self.targets), _seeded_transform(self.transform, *self.untransformed))

    def callable_parts(self) -> dict[str, dict[str, str]]:
        """Return the hashes of the parts of `forward`, `loss` and `transform` as they are now."""
        transform = None if self.transform is None else self.transform.function
        named = {"forward": self.forward, "loss": self.loss, "transform": transform}
        return {name: callable_parts(function) for name, function in named.items()}

    def call_state(self) -> dict[str, frozenset[str]]:
        """Return, for each callable, the parts that changed after its first call."""
        now = self.callable_parts()
        return {name: changed_parts(before, now[name]) for name, before in self.parts.items()}

    def confirm(self, model: nn.Module) -> None:
        """If the shape of the loss may be right by chance, run the model on a batch of another size.

        Raises ValueError if the shape was right by chance.
        """
        other = other_size(self.samples, self.data.length)
        if self.uncertain and other is not None:
            with torch.no_grad():
                Trial(self.data, other, self.keys, self.forward, self.loss, self.transform).run(model)

    def warn_if_mixed(self, outputs: Any) -> None:
        """Warn if the loss of a sample depends on the other samples of the batch."""
        if self.loss is cross_entropy or is_of_torch(self.loss):
            return
        others = self.targets
        as_stored = self.transform is None or not self.transform.takes_targets
        if isinstance(self.data, Stored) and as_stored:
            evenly = torch.arange(self.samples, device=self.data.device) * (self.data.length - 1) // self.samples
            others = self.data.targets[self.data.length - 1 - evenly]
        try:
            warn_if_mixed(self.loss, outputs, self.targets, others, self.samples, self.keys)
        except MISFITS:  # the loss takes only the batch that belongs to its inputs, so it can't be tested
            return

    def _check_finite(self, outputs: Any, losses: Tensor) -> None:
        """Raise ValueError if the losses are NaN or infinite before anything is trained, naming where that begins."""
        if not torch.is_grad_enabled() or bool(losses.isfinite().all()):
            return  # what an untrained model gives in evaluation doesn't matter
        stages = {
            "`transform` returns": self.inputs,
            "the targets are": self.targets,
            "the model's outputs are": outputs,
        }
        first = next((stage for stage, tree in stages.items() if not _is_finite(tree)), "the loss returns")
        raise ValueError(
            f"{first} NaN or infinite values for the first samples, before any training. Check the data, the model's "
            "weights, `transform`, `forward` and `loss`."
        )

    def _outputs(self, model: nn.Module) -> Any:
        batch = tensors(self.inputs)
        whole = tensors(self.data.inputs) if isinstance(self.data, Stored) and self.transform is None else batch
        try:
            with self.reads, indices_checked(model, self.data.described, batch, whole, self.reads):
                outputs = self.forward(model, self.inputs)
        except NoSuchRow:
            raise
        except MISFITS as error:
            raise ValueError(
                f"the model can't run on a batch of inputs {shapes_of(self.inputs)}: {error}\nCheck the data's shape, "
                "or pass `forward(model, inputs)`, which must run the module that it is given."
                f"{_hint_on_integers(self.inputs)}"
            ) from error
        if self.loss is cross_entropy:
            check_for_cross_entropy(outputs, self.targets)
            if self.transform is not None and self.transform.takes_targets:
                check_labels("the targets that `transform` returns", self.targets, outputs.shape[1])
            else:
                self.data.check_labels(outputs.shape[1])
        elif is_of_torch(self.loss):
            check_class_axis(outputs, self.targets)
        return outputs

    def _losses(self, outputs: Any) -> Tensor:
        try:
            with self.reads:
                losses = self.loss(outputs, self.targets)
        except MISFITS as error:
            raise ValueError(
                f"the loss can't take outputs {shapes_of(outputs)} with targets {shapes_of(self.targets)}: {error}"
            ) from error
        check_losses(losses, outputs, self.targets, self.samples)
        self._check_finite(outputs, losses)
        if could_be_chance(losses, outputs, self.targets):
            self.uncertain = True
        return losses


def _is_finite(tree: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tensors(tree) if leaf.is_floating_point())


def _hint_on_integers(inputs: Any) -> str:
    kinds = {dtype_name(leaf.dtype) for leaf in tensors(inputs) if not leaf.is_floating_point()}
    return f" The inputs are {', '.join(sorted(kinds))}; if the model needs numbers, pass .float()." if kinds else ""


def other_size(samples: int, available: int) -> int | None:
    """Return the size of another small batch: an even one if possible, and not a single sample; None without any."""
    if samples >= 4:
        return samples - 2
    if samples < available:
        return samples + 1
    return samples - 1 if samples == 3 else None


def batch_transform(transform: Transform | None, data: Data, config: SwampConfig) -> BatchTransform | None:
    """Return a user's transform in the form that takes inputs and targets; see `takes_targets`.

    A transform of *args is called with the inputs of a few samples. If that raises, as with mixup and CutMix of
    torchvision, it is given the targets, too.
    """
    if transform is None:
        return None
    takes, dtype = takes_targets(transform), weight_dtype(config)
    if takes is None:
        keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
        first = _first_samples(data, min(MAX_SAMPLES, data.length, config.batch_size), keys)
        try:
            _seeded_transform(BatchTransform(transform, False, dtype), *first)
            takes = False
        except MISFITS:
            takes = True
    return BatchTransform(transform, takes, dtype)


def _first_samples(data: Data, samples: int, keys: Tensor) -> tuple[Any, Any]:
    """Return the inputs and targets of the first samples, without augmentation."""
    order = torch.arange(samples, device=data.device)[None]
    handle = next(iter(data.batches(order, keys, [(0, samples)])))
    return data.fetch(handle, None).lane(0)


def _transformed(transform: BatchTransform, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return a batch after the user's transform. Raises ValueError if it can't take it or changes its length."""
    form = "`transform(inputs, targets)`" if transform.takes_targets else "`transform(inputs)`"
    try:
        out = _seeded_transform(transform, inputs, targets)
    except MISFITS as error:
        raise ValueError(
            f"{form} raises {type(error).__name__} for inputs {shapes_of(inputs)} and targets {shapes_of(targets)}: "
            f"{error}"
        ) from error
    for given, returned in zip((inputs, targets), out, strict=True):
        expected, got = ({len(leaf) for leaf in tensors(tree) if leaf.dim()} for tree in (given, returned))
        if got != expected:
            raise ValueError(
                f"{form} must return the same number of samples, got {shapes_of(returned)} from {shapes_of(given)}."
            )
    return out


def _seeded_transform(transform: BatchTransform, inputs: Any, targets: Any) -> tuple[Any, Any]:
    with generators_left_alone():
        seed_generators(0)
        return transform(tree_clone(inputs), tree_clone(targets))


@contextmanager
def _modes_kept() -> Iterator[None]:
    """A context that raises ValueError if the user's callables change a mode on which all that follows depends."""
    before = {mode: mode.read() for mode in KEPT_MODES}
    yield
    for mode, value in before.items():
        now = mode.read()
        if now != value:
            mode.write(value)
            raise ValueError(
                f"the model, `forward`, `loss` or `transform` changes {mode.name} of the whole process from {value} to "
                f"{now}, which would change the results of what follows; set it before the call instead."
            )


@dataclass(frozen=True)
class _SideEffects:
    """The outputs and the loss of a forward pass, and its side effects as Probe describes them."""

    outputs: Any
    loss: Tensor
    draws_elsewhere: bool
    changed: tuple[str, ...]
    keeps_state: bool
    without_gradient: tuple[str, ...]
    outside: tuple[tuple[int, ...], ...]


def _side_effects(original: nn.Module, model: nn.Module, trial: Trial, keys: Tensor) -> _SideEffects:
    """Find the side effects of a model's forward pass by running it twice with the same random draws.

    The second run also goes backward. Then the model and the generators are compared with their earlier state.
    """
    norms = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held, graphs = attribute_tensors(model), attributes_with_graphs(original)
    generators, attributes = generators_state(), state_fingerprint(model)
    with generators_left_alone(), DropoutStream(keys):
        first, first_loss = trial.run(model)
    trial.parts = trial.callable_parts()
    with DropoutStream(keys):
        outputs, loss = trial.run(model)
    attributes_change = attributes != state_fingerprint(model)
    check_recomputed(model, held, graphs)
    own = {id(parameter) for parameter in model.parameters()}
    outside = [leaf for leaf in leaves_of(loss) if id(leaf) not in own]
    with refused_in_backward(), gradients_restored([*outside, *original.parameters()]):
        loss.backward(retain_graph=True)
    without_gradient = check_gradients(model, original, outside)
    changed = tuple(
        name for name, buffer in model.named_buffers() if name not in norms and not _same_bits(buffer, buffers[name])
    )
    changed += tuple(name for name, p in model.named_parameters() if not _same_bits(p, weights[name]))
    draws_elsewhere = generators != generators_state()
    if _same(first_loss, loss):  # a loss that changes from call to call can't be tested, and more calls would change it
        trial.warn_if_mixed(outputs)
    return _SideEffects(
        outputs=outputs,
        loss=loss,
        draws_elsewhere=draws_elsewhere,
        changed=changed,
        keeps_state=attributes_change or not (changed or _same(first, outputs)),
        without_gradient=tuple(without_gradient),
        outside=tuple(tuple(leaf.shape) for leaf in outside),
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape have the same bits; NaNs with the same bits are equal."""
    a, b = (tensor.detach().contiguous().flatten() for tensor in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True


def _same(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == torch.bool else torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True)
