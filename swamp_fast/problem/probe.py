"""One look at the model on one batch, before anything is trained: what it needs, and what it would cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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

PROBED_SAMPLES = 8
SAME = 1e-4  # two forwards of the same may differ by so much, relatively: GPU kernels needn't repeat their bits
# What looks at values, or makes shapes depend on them: as torch's dispatcher sees it, and what passes it by.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "_to_sparse")
PYTHON_READS = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr}


@dataclass(frozen=True)
class Probe:
    """What one forward and backward of the model showed."""

    prunable: frozenset[str]  # names of parameters
    classes: int | None  # the second axis of outputs that are a tensor [B, classes, ...]
    classifies: bool  # the targets are labels of those classes: accuracies make sense
    draws_elsewhere: bool  # random numbers that are not dropout's: from torch's, Python's or NumPy's generators
    changed: tuple[str, ...]  # buffers that a forward changes, besides the running statistics of norms, and weights
    keeps_state: bool  # plain attributes that a forward changes, or generators of its own
    reads_values: str | None  # by which function the forward looks at values, and may branch on them
    convolves: bool  # whether pictures [B, C, H, W] go through a convolution
    dense_flops: int  # of one sample's forward, 2 a multiply-add, matrix products and convolutions
    uses: dict[str, float]  # multiply-adds of one sample per weight of a parameter

    @property
    def uncounted(self) -> list[str]:
        """Prunable weights that no convolution, linear or attention layer uses: how often they multiply isn't known."""
        return [name for name, times in self.uses.items() if name in self.prunable and not times]

    def flops(self, kept: dict[str, int], sizes: dict[str, int]) -> int:
        """FLOPs of one sample's forward when only `kept` weights of the prunable parameters count.

        Those of `uncounted` weights stay as in the dense model, or are missing there too (as nn.LSTM's on a CPU).
        """
        saved = sum(2 * self.uses.get(name, 0.0) * (sizes[name] - kept[name]) for name in kept)
        return round(self.dense_flops - saved)


def look_at(
    template: nn.Module,
    data: Data,
    forward: Forward,
    loss: Loss,
    transform: Transform | None,
    prunable: Prunable,
    config: SwampConfig,
) -> Probe:
    """Look at the model on the first few samples."""
    batch = min(PROBED_SAMPLES, data.length, config.batch_size)
    keys = lane_keys([config.seed], [stream_of(None, 0)], data.device)
    order = torch.arange(batch, device=data.device)[None]
    handle = next(iter(data.batches(order, keys, [(0, batch)])))
    inputs, targets = data.fetch(handle, None).lane(0)
    if transform is not None:
        inputs = _transformed(transform, inputs)
    classifies, reads = False, _Reads()

    def run(model: nn.Module) -> tuple[Any, Tensor]:
        nonlocal classifies
        try:
            with reads:
                outputs = forward(model, inputs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise ValueError(
                f"the model can't run on a batch of inputs {_shapes(inputs)}: {error}\nCheck the data's shape, or pass "
                "`forward(model, inputs)`."
            ) from error
        plain = isinstance(outputs, Tensor) and outputs.dim() >= 2 and outputs.is_floating_point()
        if loss is cross_entropy:
            if not plain:
                raise ValueError(
                    f"the model's output must be a tensor [B, classes] for cross-entropy, got {_shapes(outputs)}. Pass "
                    "`forward(model, inputs)` that returns the logits, or a `loss` of your own."
                )
            data.check_labels(outputs.shape[1])
        try:
            with reads:
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
        if torch.is_grad_enabled() and not each.requires_grad:
            raise ValueError(
                "the loss does not depend on any trained parameter; is something detached, or run under no_grad?"
            )
        return outputs, each.sum()

    found = _probe(copy_of(template), run, keys, batch, prunable)
    convolves = found.convolves and any(leaf.dim() == 4 for leaf in tensors(inputs))
    return dataclasses.replace(found, classifies=classifies, reads_values=reads.found, convolves=convolves)


def _transformed(transform: Transform, inputs: Any) -> Any:
    """What the user's augmentation makes of a batch [B, ...]; refused if that is no batch of as many samples."""
    with generators_left_alone():
        out = transform(inputs)
    wanted, found = ({len(leaf) for leaf in tensors(tree) if leaf.dim()} for tree in (inputs, out))
    if found != wanted:
        raise ValueError(
            f"`transform(inputs)` must return inputs of as many samples, got {_shapes(out)} from {_shapes(inputs)}."
        )
    return out


def _probe(
    model: nn.Module, run: Callable[[nn.Module], tuple[Any, Tensor]], keys: Tensor, batch: int, prunable: Prunable
) -> Probe:
    """Run `run(model) -> (outputs, loss)` on a model that may be changed, forward and backward, in train mode.

    keys   [1, 3]  of the dropout stream
    batch          samples that `run` feeds
    """
    model.train()
    norms = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with generators_left_alone():
        state, own_state = generators_state(), state_fingerprint(model)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with generators_left_alone(), DropoutStream(keys):
            again, _ = run(model)
        with DropoutStream(keys):
            outputs, loss = run(model)
        keeps_state = own_state != state_fingerprint(model) or not _same(again, outputs)
        with refused_in_backward():
            loss.backward(retain_graph=True)
        draws_elsewhere = state != generators_state()
        changed = tuple(
            name for name, buffer in model.named_buffers() if name not in norms and not _same_bits(buffer, before[name])
        )
        changed += tuple(name for name, p in model.named_parameters() if not _same_bits(p, weights[name]))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        uses = dict.fromkeys(names.values(), 0.0)

        def count(parameter: Tensor | None, multiply_adds: float) -> None:
            if id(parameter) in names:
                uses[names[id(parameter)]] += multiply_adds / batch

        handles = [module.register_forward_hook(_uses_of(count), with_kwargs=True) for module in model.modules()]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(model)
        for handle in handles:
            handle.remove()
    model.zero_grad()
    classes = outputs.shape[1] if isinstance(outputs, Tensor) and outputs.dim() >= 2 else None
    chosen = frozenset(select_prunable(model, prunable, outputs))
    return Probe(
        prunable=chosen,
        classes=classes,
        classifies=False,
        draws_elsewhere=draws_elsewhere,
        changed=changed,
        keeps_state=keeps_state and not changed,
        reads_values=None,
        convolves=any("convolution" in str(op) for op in counter.get_flop_counts().get("Global", {})),
        dense_flops=counter.get_total_flops() // batch,
        uses=uses,
    )


class _Reads(TorchFunctionMode):
    """Notes by which function values are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None
        self.below = _DispatchedReads(self)

    def __enter__(self) -> _Reads:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.below.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.below.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PYTHON_READS:
            self.found = getattr(func, "__name__", str(func))
        return func(*args, **(kwargs or {}))


class _DispatchedReads(TorchDispatchMode):
    def __init__(self, reads: _Reads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or by_mask:
            self.reads.found = "a boolean index" if by_mask else name
        return func(*args, **(kwargs or {}))


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of a shape are equal, NaN to NaN too."""
    found, expected = (each.detach().contiguous().flatten() for each in (found, expected))
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) if found.numel() else True


def _same(found: Any, expected: Any) -> bool:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, SAME, SAME, equal_nan=True) for a, b in pairs)


def _uses_of(count: Callable[[Tensor | None, float], None]) -> Callable[..., None]:
    """A forward hook that counts how often a module multiplies by each weight of its parameters."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, _ConvTransposeNd):
            count(module.weight, args[0].numel() / module.in_channels)
        elif isinstance(module, _ConvNd):
            count(module.weight, output.numel() / module.out_channels)
        elif isinstance(module, nn.Linear):
            count(module.weight, output.numel() / module.out_features)
        elif isinstance(module, nn.MultiheadAttention):
            given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
            tokens = [tensor.numel() / tensor.shape[-1] for tensor in given]
            count(module.in_proj_weight, sum(tokens) / 3)
            for name, times in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
                count(getattr(module, name), times)
            count(module.out_proj.weight, tokens[0])

    return hook


def _shapes(tree: Any) -> Any:
    return tree_map(lambda leaf: list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__, tree)
