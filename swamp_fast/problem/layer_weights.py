"""Finds the parameter behind a layer's `weight`, which a reparametrization such as spectral_norm may compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def weight_of(module: Any) -> Tensor | None:
    """Return the parameter whose zeros are also zeros of `module.weight`; None if there is no such parameter.

    It is `weight` itself, or the parameter that spectral_norm divides by its norm to compute `weight`.
    """
    if "weight" in module._parameters:
        weight: Tensor | None = module._parameters["weight"]
        return weight
    if all(isinstance(each, _SpectralNorm) for each in _parametrizations(module)):
        return _original(module)
    return None


def direction_of(module: Any) -> Tensor | None:
    """Return the parameter that weight_norm scales to give `module.weight`; None if there is none.

    It isn't pruned by default: when all weights of a row are pruned, weight_norm divides by 0.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            direction: Tensor = module.weight_v
            return direction
    parametrizations = _parametrizations(module)
    if len(parametrizations) == 1 and isinstance(parametrizations[0], _WeightNorm):
        original: Tensor = module.parametrizations.weight.original1
        return original
    return None


def _original(module: Any) -> Tensor | None:
    """Return the parameter from which torch's spectral_norm, new or old, computes `weight`."""
    original: Tensor | None = None
    if _parametrizations(module):
        original = getattr(module.parametrizations.weight, "original", None)
    elif any(isinstance(hook, SpectralNorm) and hook.name == "weight" for hook in module._forward_pre_hooks.values()):
        original = module.weight_orig
    return original


def _parametrizations(module: Any) -> list[nn.Module]:
    """Return the parametrizations of `weight` from torch.nn.utils.parametrize."""
    return list(module.parametrizations.weight) if "weight" in getattr(module, "parametrizations", ()) else []
