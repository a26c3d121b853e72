"""Counts the multiply-adds of a forward pass per weight; pruning a weight saves its multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from swamp_fast.problem.layer_weights import weight_of

Count = Callable[[Tensor | None, float], None]  # (a parameter, multiply-adds per weight)


@contextmanager
def counted_uses(model: nn.Module, samples: int) -> Iterator[dict[str, float]]:
    """A context that counts the multiply-adds of the forward passes in it.

    Yields parameter name -> multiply-adds per weight and sample. Convolutions, linear layers and attention projections
    are counted; a parameter that none of them uses has 0.

    samples  the batch size of each forward pass
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    uses = dict.fromkeys(names.values(), 0.0)

    def count(parameter: Tensor | None, multiply_adds: float) -> None:
        if id(parameter) in names:
            uses[names[id(parameter)]] += multiply_adds / samples

    handles = [module.register_forward_hook(_hook(count), with_kwargs=True) for module in model.modules()]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _hook(count: Count) -> Callable[..., None]:
    """Return a forward hook that counts the multiply-adds of one call of a module."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, _ConvTransposeNd):
            count(weight_of(module), args[0].numel() / module.in_channels)
        elif isinstance(module, _ConvNd):
            count(weight_of(module), output.numel() / module.out_channels)
        elif isinstance(module, nn.Linear):
            count(weight_of(module), output.numel() / module.out_features)
        elif isinstance(module, nn.MultiheadAttention):
            _count_attention(module, args, kwargs, count)

    return hook


def _count_attention(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], count: Count
) -> None:
    """Count the projections of one attention call: each uses every weight once per token."""
    query, key, value = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])][:3]
    tokens = [tensor.numel() / tensor.shape[-1] for tensor in (query, key, value)]
    count(module.in_proj_weight, sum(tokens) / 3)
    for name, times in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
        count(getattr(module, name), times)
    count(module.out_proj.weight, tokens[0])
