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

from swamp_fast.common.fingerprint import state_fingerprint
from swamp_fast.common.modes import KEPT_MODES
from swamp_fast.common.tree import tensors, tree_map
from swamp_fast.config import SwampConfig
from swamp_fast.data.store import Data
from swamp_fast.particles.dropout import DropoutStream, refused_in_backward
from swamp_fast.particles.random import generators_left_alone, generators_state, lane_keys, stream_of
from swamp_fast.problem.arguments import Forward, Loss, Transform, cross_entropy
from swamp_fast.problem.checks import copy_of
from swamp_fast.problem.prunable import Prunable, select_prunable
from swamp_fast.problem.uses import counted_uses
from swamp_fast.problem.value_reads import ValueReads

MAX_SAMPLES = 8  # in the batch on which the model is run
TOLERANCE = 1e-4  # relative and absolute: on a GPU, two identical forward passes may differ by rounding
# The errors that a forward or a loss may raise if it doesn't fit the data.
MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True)
class Probe:
    """The properties of a model that running it forward and backward showed.

    prunable         the names of the parameters to prune
    classes          the size of axis 1 of the outputs if they are a tensor [B, classes, ...], else None
    classifies       whether the outputs are logits and the targets are labels, so that accuracies make sense
    draws_elsewhere  whether the forward pass draws from torch's, Python's or NumPy's generator, other than by dropout
    changed          the names of the weights and buffers that a forward pass changes, without norms' running statistics
    keeps_state      whether a forward pass changes plain attributes of the model, or draws from a generator in them
    reads_values     the operation by which the forward pass or the loss reads values of tensors, so that it may branch
                     on them; None if there is none
    convolves        whether the model convolves pictures [B, C, H, W]
    dense_flops      the FLOPs of one sample's forward pass: 2 per multiply-add of matrix products and convolutions
    uses             parameter name -> multiply-adds per weight in one sample's forward pass
    """

    prunable: frozenset[str]
    classes: int | None
    classifies: bool
    draws_elsewhere: bool
    changed: tuple[str, ...]
    keeps_state: bool
    reads_values: str | None
    convolves: bool
    dense_flops: int
    uses: dict[str, float]

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
    template: nn.Module,
    data: Data,
    config: SwampConfig,
    forward: Forward,
    loss: Loss,
    transform: Transform | None,
    prunable: Prunable,
) -> Probe:
    """Run a copy of the model on the first few samples, forward and backward, in train mode.

    Raises ValueError or TypeError if the model, the data, `forward`, `loss`, `transform` and `prunable` don't fit
    together.
    """
    keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
    trial = _Trial(data, min(MAX_SAMPLES, data.length, config.batch_size), keys, forward, loss, transform)
    model = copy_of(template).train()
    with generators_left_alone(), _modes_kept():
        effects = _side_effects(model, trial, keys)
        with counted_uses(model, trial.samples) as uses, torch.no_grad(), FlopCounterMode(display=False) as counter:
            trial.run(model)
    model.zero_grad()
    outputs = effects.outputs
    convolves = any("convolution" in str(op) for op in counter.get_flop_counts().get("Global", {}))
    return Probe(
        prunable=frozenset(select_prunable(model, prunable, outputs)),
        classes=outputs.shape[1] if isinstance(outputs, Tensor) and outputs.dim() >= 2 else None,
        classifies=trial.classifies(outputs),
        draws_elsewhere=effects.draws_elsewhere,
        changed=effects.changed,
        keeps_state=effects.keeps_state,
        reads_values=trial.reads.operation,
        convolves=convolves and any(leaf.dim() == 4 for leaf in tensors(trial.inputs)),
        dense_flops=counter.get_total_flops() // trial.samples,
        uses=uses,
    )


class _Trial:
    """One small batch on which a model and the loss are run. Errors say which of them doesn't fit which data.

    reads  records operations of `forward` and `loss` that read the values of tensors
    """

    def __init__(
        self, data: Data, samples: int, keys: Tensor, forward: Forward, loss: Loss, transform: Transform | None
    ) -> None:
        self.data, self.samples, self.forward, self.loss = data, samples, forward, loss
        order = torch.arange(samples, device=data.device)[None]
        handle = next(iter(data.batches(order, keys, [(0, samples)])))
        self.inputs, self.targets = data.fetch(handle, None).lane(0)
        if transform is not None:
            self.inputs = _transformed(transform, self.inputs)
        self.reads = ValueReads()

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

    def classifies(self, outputs: Any) -> bool:
        """Whether the outputs are logits [B, classes, ...] and the targets are labels in [0, classes)."""
        targets = self.targets
        return (
            _are_logits(outputs)
            and isinstance(targets, Tensor)
            and targets.dtype == torch.int64
            and targets.shape == (self.samples, *outputs.shape[2:])
            and outputs.shape[1] > 1
            and 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]
        )

    def _outputs(self, model: nn.Module) -> Any:
        try:
            with self.reads:
                outputs = self.forward(model, self.inputs)
        except MISFITS as error:
            raise ValueError(
                f"the model can't run on a batch of inputs {_shapes(self.inputs)}: {error}\nCheck the data's shape, or "
                "pass `forward(model, inputs)`."
            ) from error
        if self.loss is cross_entropy:
            if not _are_logits(outputs):
                raise ValueError(
                    f"the model's output must be a tensor [B, classes] for cross-entropy, got {_shapes(outputs)}. Pass "
                    "`forward(model, inputs)` that returns the logits, or a `loss` of your own."
                )
            self.data.check_labels(outputs.shape[1])
        return outputs

    def _losses(self, outputs: Any) -> Tensor:
        try:
            with self.reads:
                losses = self.loss(outputs, self.targets)
        except MISFITS as error:
            raise ValueError(
                f"the loss can't take outputs {_shapes(outputs)} with targets {_shapes(self.targets)}: {error}"
            ) from error
        if not isinstance(losses, Tensor) or losses.dim() == 0 or losses.shape[0] != self.samples:
            raise ValueError(
                f"`loss(outputs, targets)` must return one number per sample, [B] = [{self.samples}], got "
                f'{_shapes(losses)}; use reduction="none".'
            )
        return losses


def _transformed(transform: Transform, inputs: Any) -> Any:
    """Return a batch [B, ...] after the user's augmentation. Raises ValueError if the number of samples changed."""
    with generators_left_alone():
        out = transform(inputs)
    expected, got = ({len(leaf) for leaf in tensors(tree) if leaf.dim()} for tree in (inputs, out))
    if got != expected:
        raise ValueError(
            f"`transform(inputs)` must return the same number of samples, got {_shapes(out)} from {_shapes(inputs)}."
        )
    return out


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
    """The outputs of a forward pass, and its side effects as Probe describes them."""

    outputs: Any
    draws_elsewhere: bool
    changed: tuple[str, ...]
    keeps_state: bool


def _side_effects(model: nn.Module, trial: _Trial, keys: Tensor) -> _SideEffects:
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
    generators, attributes = generators_state(), state_fingerprint(model)
    with generators_left_alone(), DropoutStream(keys):
        first, _ = trial.run(model)
    with DropoutStream(keys):
        outputs, loss = trial.run(model)
    keeps_state = attributes != state_fingerprint(model) or not _same(first, outputs)
    with refused_in_backward():
        loss.backward(retain_graph=True)
    changed = tuple(
        name for name, buffer in model.named_buffers() if name not in norms and not _same_bits(buffer, buffers[name])
    )
    changed += tuple(name for name, p in model.named_parameters() if not _same_bits(p, weights[name]))
    return _SideEffects(outputs, generators != generators_state(), changed, keeps_state and not changed)


def _are_logits(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.dim() >= 2 and outputs.is_floating_point()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape have the same bits; NaNs with the same bits are equal."""
    a, b = (tensor.detach().contiguous().flatten() for tensor in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True


def _same(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True) for a, b in pairs)


def _shapes(tree: Any) -> Any:
    return tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)
