"""Dropout that draws from a random stream of each particle.

A particle therefore drops the same units on any device, whether it is trained alone or among others.
"""

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

_DROPOUT, _ATTENTION = F.dropout, F.scaled_dot_product_attention


class DropoutStream(TorchFunctionMode):
    """A mode in which torch's dropout draws from Philox.

    In the c-th call of dropout, counted from 0, element e of a lane is dropped if word e of the lane's stream with
    purpose DROPOUT + 256 c, as a fraction of its range, is below p. Alpha dropout is not covered: it draws from torch's
    generator, like any other random operation. Nor is the backward pass, because torch's autograd engine ignores modes;
    see `refused_in_backward`.

    keys  [L, 3]  int64: seed, stream and step of each lane; if L > 1, axis 0 of dropout's inputs holds the lanes
    rows          L times the number of samples per lane; axis 0 of dropout's inputs must be a multiple of it
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
        """Replace calls of dropout and attention, and pass all other calls on."""
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, *args, **(kwargs or {}))

    def __enter__(self) -> DropoutStream:
        """Start a step; its first call of dropout has the number 0."""
        self.calls = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def keep(self, input: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
        """Draw a mask of `shape`, True for the elements to keep. Its axis 0 holds the lanes."""
        lanes, count = self.keys.shape[0], math.prod(shape)
        if lanes > 1 and (not shape or shape[0] % self.rows):
            raise RuntimeError(f"dropout over {list(input.shape)}: axis 0 must hold {lanes} lanes, but it doesn't.")
        words = ops.philox(self.keys, DROPOUT + (self.calls << 8), count // lanes)
        self.calls += 1
        if p >= 1:
            return torch.zeros(shape, dtype=torch.bool, device=input.device)
        return (words >= round(p * 2**32) - 2**31).view(shape).to(input.device)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Do what F.dropout does, with draws from the lanes' streams."""
        return self._drop(input, tuple(input.shape), p, training, inplace)

    def feature_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Do what F.dropout1d, 2d and 3d do, with draws from the lanes' streams: drop whole channels."""
        channels = (*input.shape[:2], *(1 for _ in input.shape[2:]))
        return self._drop(input, channels, p, training, inplace)

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
        """Do what F.scaled_dot_product_attention does, with draws from the lanes' streams.

        With dropout, plain operations compute it, because no fused kernel can use these random draws.
        """
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
        """Do what F.multi_head_attention_forward does, with draws from the lanes' streams.

        A mode doesn't see the calls that this function makes, so dropout and attention are patched while it runs.
        """
        F.dropout, F.scaled_dot_product_attention = self.dropout, self.scaled_dot_product_attention
        try:
            return F.multi_head_attention_forward(*args, **kwargs)
        finally:
            F.dropout, F.scaled_dot_product_attention = _DROPOUT, _ATTENTION

    def _drop(self, input: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool) -> Tensor:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout's probability must lie in [0, 1], got {p}.")
        if not training or p == 0:
            return input
        scale = self.keep(input, shape, p).to(input.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(scale) if inplace else input * scale


@contextmanager
def refused_in_backward() -> Iterator[None]:
    """A context for a backward pass, in which dropout raises ValueError.

    Activation checkpointing runs dropout again in the backward pass, where it would draw other numbers.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "dropout ran during the backward pass, probably because of activation checkpointing. It would draw other "
            "numbers there than in the forward pass. Turn off either checkpointing or dropout."
        )

    def refuse_with_dropout(*args: Any, **kwargs: Any) -> Any:
        dropout_p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return refuse() if dropout_p else _ATTENTION(*args, **kwargs)

    originals = [(module, name, getattr(module, name)) for module, name in _DRAWING]
    for module, name, _ in originals:
        setattr(module, name, refuse_with_dropout if name == "scaled_dot_product_attention" else refuse)
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


_DRAWING = [
    *((F, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "scaled_dot_product_attention")),
    *((torch, name) for name in ("dropout", "feature_dropout")),
]


def _native(handler: Callable[..., Tensor], inplace: bool = False) -> Callable[..., Tensor]:
    """Give a handler the signature of torch.dropout and torch.feature_dropout: (input, p, train)."""
    return lambda stream, input, p, train: handler(stream, input, p, train, inplace)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.dropout: DropoutStream.dropout,
    F.dropout1d: DropoutStream.feature_dropout,
    F.dropout2d: DropoutStream.feature_dropout,
    F.dropout3d: DropoutStream.feature_dropout,
    F.scaled_dot_product_attention: DropoutStream.scaled_dot_product_attention,
    F.multi_head_attention_forward: DropoutStream.multi_head_attention_forward,
    torch.dropout: _native(DropoutStream.dropout),
    torch.dropout_: _native(DropoutStream.dropout, inplace=True),
    torch.feature_dropout: _native(DropoutStream.feature_dropout),
    torch.feature_dropout_: _native(DropoutStream.feature_dropout, inplace=True),
}
