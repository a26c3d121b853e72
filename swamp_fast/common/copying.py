"""Copies modules that keep tensors with an autograd graph, such as features of the last forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swamp_fast.common.tree import tensors


def copy_of(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module. Tensors with an autograd graph are copied without it, wherever they are."""
    with _WithoutGraphs():
        return copy.deepcopy(module)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return a model without torch.compile's wrappers around it or its layers. Return any other object as it is.

    Modules that hold a wrapped layer are replaced by shallow copies, with the same parameters and buffers.
    """
    return _uncompiled(model, {})


def _uncompiled(model: nn.Module, copied: dict[int, nn.Module]) -> nn.Module:
    while is_compiled(model):
        model = model._orig_mod  # type: ignore[assignment]
    if not isinstance(model, nn.Module) or not any(is_compiled(module) for module in model.modules()):
        return model
    if id(model) not in copied:
        plain = copied[id(model)] = copy.copy(model)
        vars(plain)["_modules"] = {
            name: None if child is None else _uncompiled(child, copied) for name, child in model._modules.items()
        }
    return copied[id(model)]


def is_compiled(module: object) -> bool:
    """Whether torch.compile has wrapped a module. The wrapper's class isn't imported, which would take a second."""
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")


class _WithoutGraphs(TorchFunctionMode):
    """A mode in which the deep copy of a tensor with an autograd graph is a plain tensor with the same values."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def attributes_with_graphs(model: nn.Module) -> dict[str, list[int]]:
    """Return the names of the attributes that hold tensors with an autograd graph, also in lists and dicts.

    Each name comes with the places of these tensors among all tensors of the attribute.
    """
    found: dict[str, list[int]] = {}
    for name, held in attribute_tensors(model).items():
        places = [place for place, tensor in enumerate(held) if not tensor.is_leaf]
        if places:
            found[name] = places
    return found


def attribute_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the tensors in each attribute and buffer of a model's modules, by the attribute's name."""
    found: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if name not in _REGISTRIES:
                found[f"{path}.{name}".lstrip(".")] = tensors(value)
    return found


_REGISTRIES = set(vars(nn.Module()))
