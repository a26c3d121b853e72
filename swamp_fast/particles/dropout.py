"""Dropout from the particle's own stream: the same draws alone, among others, folded or not, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from swamp_fast import ops
from swamp_fast.particles.random import DROPOUT

# SELU's negative saturation value, which alpha dropout sets a dropped unit to: Klambauer et al. 2017, 1706.02515.
SATURATION = -1.7580993408473766
_DROPOUT, _ATTENTION = F.dropout, F.scaled_dot_product_attention


class DropoutStream(TorchFunctionMode):
    """While it is active every dropout of torch draws from Philox: element e of the call's c-th dropout in a lane
    is dropped if word e of that lane's stream, purpose DROPOUT + 256 c, is below p.

    keys  [L, 3]  int64: seed, stream, step. With L > 1 the first axis of what is dropped holds the lanes.
    rows          L times the samples of a lane, if L > 1; the first axis of what is dropped must be a multiple

    Backward runs outside: torch's autograd engine knows no modes. What drops there is refused by `refused_in_backward`.
    """

    def __init__(self, keys: Tensor, rows: int | None = None) -> None:
        super().__init__()
        self.keys, self.rows = keys, rows or len(keys)
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Send dropout to the stream and everything else on."""
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, *args, **(kwargs or {}))

    def __enter__(self) -> DropoutStream:
        """Start a step: the first dropout call is number 0."""
        self.calls = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def keep(self, input: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
        """Which units stay: a bool mask of `shape`, whose first axis holds the lanes."""
        lanes, count = self.keys.shape[0], math.prod(shape)
        if lanes > 1 and (not shape or shape[0] % self.rows):
            raise RuntimeError(f"dropout over {list(input.shape)}: the first axis does not hold {lanes} lanes.")
        words = ops.philox(self.keys, DROPOUT + (self.calls << 8), count // lanes)
        self.calls += 1
        if p >= 1:
            return torch.zeros(shape, dtype=torch.bool, device=input.device)
        return (words >= round(p * 2**32) - 2**31).view(shape).to(input.device)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """F.dropout."""
        return self._drop(input, tuple(input.shape), p, training, inplace)

    def feature_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """F.dropout1d, 2d, 3d: whole channels."""
        return self._drop(input, _channels(input), p, training, inplace)

    def alpha_dropout(self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
        """F.alpha_dropout."""
        return self._drop_to_saturation(input, tuple(input.shape), p, training, inplace)

    def feature_alpha_dropout(
        self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        """F.feature_alpha_dropout: whole channels."""
        return self._drop_to_saturation(input, _channels(input), p, training, inplace)

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """F.scaled_dot_product_attention; with dropout the weights are formed, as no fused kernel takes our draws."""
        if dropout_p == 0:
            return _ATTENTION(
                query,
                key,
                value,
                attn_mask=attn_mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, -math.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.dropout(scores.softmax(-1), dropout_p) @ value

    def multi_head_attention_forward(self, *args: Any, **kwargs: Any) -> Any:
        """F.multi_head_attention_forward, whose inner calls a mode doesn't see: they are pointed here meanwhile."""
        F.dropout, F.scaled_dot_product_attention = self.dropout, self.scaled_dot_product_attention
        try:
            return F.multi_head_attention_forward(*args, **kwargs)
        finally:
            F.dropout, F.scaled_dot_product_attention = _DROPOUT, _ATTENTION

    def _drop(self, input: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool) -> Tensor:
        _check_probability(p)
        if not training or p == 0:
            return input
        scale = self.keep(input, shape, p).to(input.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(scale) if inplace else input * scale

    def _drop_to_saturation(
        self, input: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool
    ) -> Tensor:
        _check_probability(p)
        if not training or p == 0:
            return input
        keep = self.keep(input, shape, p).to(input.dtype)
        scale = ((1 - p) * (1 + p * SATURATION**2)) ** -0.5 if p < 1 else 0.0
        shift = (1 - keep) * (SATURATION * scale) - scale * SATURATION * p
        return input.mul_(keep * scale).add_(shift) if inplace else input * (keep * scale) + shift


@contextmanager
def refused_in_backward() -> Iterator[None]:
    """Raise where a backward runs dropout again, as activation checkpointing does: it would draw other numbers."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "a dropout ran during backward, as activation checkpointing makes it: it would draw other numbers than in "
            "the forward. Turn checkpointing off, or dropout."
        )

    def refuse_weights(*args: Any, **kwargs: Any) -> Any:
        drops = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return refuse() if drops else _ATTENTION(*args, **kwargs)

    theirs = [(module, name, getattr(module, name)) for module, name in _DRAWING]
    for module, name, _ in theirs:
        setattr(module, name, refuse_weights if name == "scaled_dot_product_attention" else refuse)
    try:
        yield
    finally:
        for module, name, function in theirs:
            setattr(module, name, function)


_DRAWING = [
    *((F, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")),
    (F, "scaled_dot_product_attention"),
    *((F, "feature_alpha_dropout"), (torch, "dropout"), (torch, "feature_dropout"), (torch, "alpha_dropout")),
]


def _channels(input: Tensor) -> tuple[int, ...]:
    return (*input.shape[:2], *(1 for _ in input.shape[2:]))


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout's probability must lie in [0, 1], got {p}.")


def _native(handler: Callable[..., Tensor], inplace: bool = False) -> Callable[..., Tensor]:
    """The form torch.dropout and its like have: (input, p, train)."""
    return lambda stream, input, p, train: handler(stream, input, p, train, inplace)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.dropout: DropoutStream.dropout,
    F.dropout1d: DropoutStream.feature_dropout,
    F.dropout2d: DropoutStream.feature_dropout,
    F.dropout3d: DropoutStream.feature_dropout,
    F.alpha_dropout: DropoutStream.alpha_dropout,
    F.feature_alpha_dropout: DropoutStream.feature_alpha_dropout,
    F.scaled_dot_product_attention: DropoutStream.scaled_dot_product_attention,
    F.multi_head_attention_forward: DropoutStream.multi_head_attention_forward,
    torch.dropout: _native(DropoutStream.dropout),
    torch.dropout_: _native(DropoutStream.dropout, inplace=True),
    torch.feature_dropout: _native(DropoutStream.feature_dropout),
    torch.feature_dropout_: _native(DropoutStream.feature_dropout, inplace=True),
    torch.alpha_dropout: _native(DropoutStream.alpha_dropout),
    torch.feature_alpha_dropout: _native(DropoutStream.feature_alpha_dropout),
}
