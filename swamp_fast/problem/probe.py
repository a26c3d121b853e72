"""The model is run on one batch before anything is trained, to learn what it needs and what it would cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.flop_counter import FlopCounterMode

from swamp_fast.common.fingerprint import state_fingerprint
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

MOST_SAMPLES = 8  # of the batch
TOLERANCE = 1e-4  # relative, between two equal forwards: GPU kernels needn't repeat their bits
# What a forward or a loss raises that was written for other inputs or outputs.
MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True)
class Probe:
    """What one forward and backward of the model showed."""

    prunable: frozenset[str]  # names of parameters
    classes: int | None  # the second axis of outputs that are a tensor [B, classes, ...]
    classifies: bool  # the targets are labels of those classes: accuracies make sense
    draws_elsewhere: bool  # it draws from torch's, Python's or NumPy's generators, not just by dropout
    changed: tuple[str, ...]  # buffers that a forward changes, besides the running statistics of norms, and weights
    keeps_state: bool  # a forward changes plain attributes of the model, or draws from a generator that it holds
    reads_values: str | None  # the operation by which the forward looks at values; it may branch on them
    convolves: bool  # pictures [B, C, H, W] go through a convolution
    dense_flops: int  # of one sample's forward, 2 per multiply-add of matrix products and convolutions
    uses: dict[str, float]  # parameter name -> multiply-adds of one sample per weight

    @property
    def uncounted(self) -> list[str]:
        """Prunable parameters of which it is not known how often they are multiplied by."""
        return [name for name, times in self.uses.items() if name in self.prunable and not times]

    def flops(self, kept: dict[str, int], sizes: dict[str, int]) -> int:
        """FLOPs of one sample's forward when only `kept` weights of the prunable parameters count.

        `uncounted` parameters count as in the dense model, where they may be missing too (as nn.LSTM's on a CPU).
        """
        saved = sum(2 * self.uses.get(name, 0.0) * (sizes[name] - kept[name]) for name in kept)
        return round(self.dense_flops - saved)


def look_at(
    template: nn.Module,
    data: Data,
    config: SwampConfig,
    forward: Forward,
    loss: Loss,
    transform: Transform | None,
    prunable: Prunable,
) -> Probe:
    """Run a copy of the model on the first few samples, forward and backward, in train mode.

    Raises ValueError or TypeError if the model, the data, `forward`, `loss`, `transform` or `prunable` don't fit.
    """
    keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
    trial = _Trial(data, min(MOST_SAMPLES, data.length, config.batch_size), keys, forward, loss, transform)
    model = copy_of(template).train()
    with generators_left_alone():
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
    """One small batch, and the model and the loss on it; errors say which of them doesn't fit the other.

    reads  notes operations of `forward` and `loss` that look at values
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
        """Outputs, and the sum of the losses."""
        outputs = self._outputs(model)
        losses = self._losses(outputs)
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError(
                "the loss does not depend on any trained parameter; is something detached, or run under no_grad?"
            )
        return outputs, losses.sum()

    def classifies(self, outputs: Any) -> bool:
        """Whether the outputs are logits [B, classes, ...] and the targets labels of those classes."""
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
    """The user's augmentation of a batch [B, ...]. Raises ValueError if that has another number of samples."""
    with generators_left_alone():
        out = transform(inputs)
    expected, got = ({len(leaf) for leaf in tensors(tree) if leaf.dim()} for tree in (inputs, out))
    if got != expected:
        raise ValueError(
            f"`transform(inputs)` must return inputs of as many samples, got {_shapes(out)} from {_shapes(inputs)}."
        )
    return out


@dataclass(frozen=True)
class _SideEffects:
    """The outputs of a forward, and what else it did; see Probe."""

    outputs: Any
    draws_elsewhere: bool
    changed: tuple[str, ...]
    keeps_state: bool


def _side_effects(model: nn.Module, trial: _Trial, keys: Tensor) -> _SideEffects:
    """Run the model twice under the same draws, the second time also backward, and compare it with itself before."""
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
    """Whether two tensors of one shape are equal, NaN equal to NaN."""
    a, b = (tensor.detach().contiguous().flatten() for tensor in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True


def _same(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True) for a, b in pairs)


def _shapes(tree: Any) -> Any:
    return tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)
