"""Reads and writes the state of torch optimizers as named tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PLAIN = {bool: torch.bool, int: torch.int64, float: torch.float64}


class NotSaved(ValueError):
    """Raised for a value in an optimizer's state that is neither a tensor nor a number."""


def with_inner(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """Yield optimizers, each followed by the optimizers in its attributes, such as the one that SAM wraps."""
    for optimizer in optimizers:
        yield optimizer
        yield from with_inner(value for value in vars(optimizer).values() if isinstance(value, Optimizer))


def read_state(optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimizers' state for each parameter, and the numbers in their groups and attributes, as tensors.

    Names are NUMBER/state/PARAMETER/KEY, NUMBER/group/GROUP/KEY and NUMBER/attribute//KEY, followed by "#" and the kind
    of the value. Raises NotSaved if a parameter's state has a value of any other kind, such as a list.
    """
    named: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    for number, optimizer in enumerate(with_inner(optimizers)):
        for parameter, state in optimizer.state.items():
            if parameter not in named or not isinstance(state, dict):
                raise NotSaved("its state is not a dict for each parameter")
            for key, value in state.items():
                tensors |= _entry(f"{number}/state/{named[parameter]}/{key}", value)
        for place, group in enumerate(optimizer.param_groups):
            tensors |= _numbers(f"{number}/group/{place}", group)
        tensors |= _numbers(f"{number}/attribute/", vars(optimizer))
    return tensors


def write_state(
    optimizers: Iterable[Optimizer], parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore a result of `read_state` in optimizers that were made in the same way."""
    every = list(with_inner(optimizers))
    for path, tensor in tensors.items():
        number, part, name, rest = path.split("/", 3)
        key, _, kind = rest.rpartition("#")
        optimizer = every[int(number)]
        if part == "state":
            parameter = parameters[name]
            optimizer.state[parameter][key] = _value(tensor, kind, parameter.device)
        elif part == "group":
            optimizer.param_groups[int(name)][key] = _value(tensor, kind, torch.device("cpu"))
        else:
            setattr(optimizer, key, _value(tensor, kind, torch.device("cpu")))


def _numbers(path: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    plain = {key: value for key, value in values.items() if type(value) in PLAIN}
    return {name: entry for key, value in plain.items() for name, entry in _entry(f"{path}/{key}", value).items()}


def _entry(path: str, value: Any) -> dict[str, Tensor]:
    """Return a value as a tensor, under a name that ends with the kind of the value."""
    if isinstance(value, Tensor):
        return {f"{path}#{'cpu' if value.device.type == 'cpu' else 'device'}": value.detach()}
    if value is None:
        return {f"{path}#None": torch.zeros(())}
    if type(value) in PLAIN:
        return {f"{path}#{type(value).__name__}": torch.tensor(value, dtype=PLAIN[type(value)])}
    raise NotSaved(f"{path.split('/', 1)[1]} is a {type(value).__name__}")


def _value(tensor: Tensor, kind: str, device: torch.device) -> Any:
    if kind == "None":
        return None
    if kind in ("cpu", "device"):
        return tensor.to("cpu" if kind == "cpu" else device).clone()
    return tensor.item()
