"""Recomputes what depends on averaged parameters: the singular vectors of spectral norms, and normalized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

POWER_ITERATIONS = 100  # from a trained particle's vectors; more would no longer change a spectral norm


def spectral_vectors(module: nn.Module) -> set[str]:
    """Return the names of the buffers that hold singular vectors, for both of torch's kinds of spectral norm."""
    own = {id(vector) for vectors, _ in _spectral_norms(module) for vector in vectors}
    return {name for name, buffer in module.named_buffers() if id(buffer) in own}


@torch.no_grad()
def find_spectral_norms(modules: Iterable[nn.Module]) -> None:
    """Recompute the singular vectors of all spectral norms in the modules, by power iterations on their weights."""
    for module in modules:
        for _, iterate in _spectral_norms(module):
            for _ in range(POWER_ITERATIONS):
                iterate()


@torch.no_grad()
def compute_weights(module: nn.Module) -> None:
    """Compute the weights that torch's old spectral_norm and weight_norm would compute in the next forward pass."""
    for child in module.modules():
        for hook in child._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(child, hook.name, hook.compute_weight(child, do_power_iteration=False))
            elif isinstance(hook, WeightNorm):
                setattr(child, hook.name, hook.compute_weight(child))


def _spectral_norms(module: nn.Module) -> Iterator[tuple[list[Tensor], Callable[[], object]]]:
    """Yield each spectral norm's vectors, and a function that updates them by power iteration."""
    for child in module.modules():
        if isinstance(child, ParametrizationList):
            for each in child:
                if isinstance(each, _SpectralNorm) and hasattr(each, "_u"):
                    yield [each._u, each._v], lambda each=each, weight=child: _iterate(each, weight)  # type: ignore[misc]
        for hook in child._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                vectors = [getattr(child, f"{hook.name}_{kind}") for kind in "uv"]
                yield vectors, lambda hook=hook, child=child: hook.compute_weight(child, True)  # type: ignore[misc]


def _iterate(norm: _SpectralNorm, weight: ParametrizationList) -> None:
    """Run a spectral norm's power iterations. It runs them whenever it is called in train mode."""
    norm.train()
    weight()
    norm.eval()
