"""The learning rate and weight decay of each parameter, from the settings `groups` and `decay_norms_and_biases`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from swamp_fast.common.parameter_group import ParameterGroup
from swamp_fast.config import SwampConfig
from swamp_fast.particles.layout import Rates
from swamp_fast.problem.gradients import listed

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rates_of_parameters(model: nn.Module, config: SwampConfig) -> dict[str, Rates]:
    """Return the rates of each trained parameter by name.

    Raises ValueError if a group matches no trained parameter, or if two groups match the same parameter.
    """
    parameters = trained_parameters(model)
    group_of = _group_of_parameters(config.groups, parameters)
    undecayed = set() if config.decay_norms_and_biases else _norms_and_biases(model, parameters)
    rates = {}
    for name in parameters:
        group = group_of.get(name)
        factor = 1.0 if group is None or group.lr is None else group.lr
        decay = None if group is None else group.weight_decay
        rates[name] = Rates(factor, 0.0 if decay is None and name in undecayed else decay)
    return rates


def rates_lines(rates: Mapping[str, Rates]) -> list[str]:
    """Return the console's lines about the parameters with rates of their own."""
    by_rates: dict[Rates, list[str]] = {}
    for name, own in rates.items():
        by_rates.setdefault(own, []).append(name)
    lines = []
    for own, names in by_rates.items():
        texts = [f"learning rate x {own.lr_factor:g}"] if own.lr_factor != 1 else []
        texts += [f"weight decay {own.weight_decay:g}"] if own.weight_decay is not None else []
        lines += [f"rates    {', '.join(texts)}: {listed(names)}"] if texts else []
    return lines


def _group_of_parameters(groups: Iterable[ParameterGroup], names: Iterable[str]) -> dict[str, ParameterGroup]:
    places: dict[str, int] = {}
    found: dict[str, ParameterGroup] = {}
    for place, group in enumerate(groups):
        matched = [name for name in names if group.matches(name)]
        if not matched:
            raise ValueError(
                f"`groups[{place}]` with params = {list(group.params)} matches none of the trained parameters "
                f"{listed(list(names))}. Correct its patterns, or remove the group."
            )
        for name in matched:
            if name in places:
                raise ValueError(
                    f"`groups[{places[name]}]` and `groups[{place}]` both match {name}, but a parameter belongs to at "
                    "most one group. Make their patterns narrower."
                )
            places[name], found[name] = place, group
    return found


def _norms_and_biases(model: nn.Module, parameters: dict[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters that have fewer than two axes or belong to a norm layer."""
    of_norms = {
        id(parameter) for module in model.modules() if isinstance(module, NORMS) for parameter in module.parameters()
    }
    return {name for name, parameter in parameters.items() if parameter.dim() < 2 or id(parameter) in of_norms}
