"""Selects the parameters to prune: by default, all convolution and linear weights except the output layer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swamp_fast.common.tree import tensors, tree_leaves
from swamp_fast.common.warn import warn_user
from swamp_fast.problem.gradients import listed
from swamp_fast.problem.layer_weights import direction_of, weight_of

Prunable = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

OUTPUT_LAYER = "the output layer"
EMBEDDING = "an embedding"
WEIGHT_NORM = "under weight_norm; remove it before the call to prune it"
PARAMETRIZED = "under a parametrization; remove it before the call to prune it"
RECURRENT = "recurrent"
BARE = "not a layer's"
NOT_SELECTED = "not selected by `prunable`"
SELECTABLE = (EMBEDDING, RECURRENT, BARE)  # `prunable` can select these


@dataclass(frozen=True)
class Pruned:
    """The names of the parameters to prune, and why the other trained weights aren't pruned: their names by reason."""

    names: frozenset[str]
    others: dict[str, list[str]]

    @property
    def line(self) -> str:
        """The console's line that says what is pruned and what isn't."""
        count = len(self.names)
        text = f"pruned   {count} of {count + sum(map(len, self.others.values()))} weights"
        if not self.others:
            return text
        parts = [
            f"{listed(names)} ({reason}{'; pruned if `prunable` names it' if reason in SELECTABLE else ''})"
            for reason, names in self.others.items()
        ]
        return f"{text}; not: {', '.join(parts)}"


def select_prunable(model: nn.Module, prunable: Prunable, outputs: Any, loss: Tensor) -> Pruned:
    """Return the parameters to prune.

    prunable  None for the default; a name or pattern (`layer*.weight`) of parameters, or several; the name of a
              module selects its `weight`; or a predicate (name, parameter) -> bool
    outputs   the outputs of one forward pass with gradients; following their autograd graph back finds the output layer
    loss      computed from the outputs, and followed back where these hold objects other than tensors

    Warns if a pattern or a predicate also selects biases or norms. Raises ValueError if a name matches nothing, or if
    there is nothing to prune.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter for name, parameter in trained.items() if parameter.dim() > 1}
    if prunable is None:
        reasons = _reasons_not_to_prune(model, outputs, loss)
        names = {name for name in weights if name not in reasons}
        if not names:
            raise ValueError(
                "the model has nothing to prune: there is no trained convolution or linear weight except in the "
                "layer that produces the output. Pass `prunable` with names of parameters, or unfreeze some. Not "
                f"pruned are {', '.join(f'{name} ({reasons[name]})' for name in weights if reasons[name])}."
            )
    else:
        names = _selected(trained, prunable)
        reasons = dict.fromkeys(weights, NOT_SELECTED)
    others: dict[str, list[str]] = {}
    for name in weights:
        if name not in names and reasons[name]:
            others.setdefault(reasons[name], []).append(name)
    return Pruned(frozenset(names), others)


def _selected(trained: dict[str, nn.Parameter], prunable: Any) -> set[str]:
    """Return the names of the parameters that the user's `prunable` selects."""
    if callable(prunable) and not isinstance(prunable, nn.Module):
        names = {name for name, parameter in trained.items() if _is_chosen(name, prunable(name, parameter))}
        by_pattern = names
    else:
        patterns = _patterns(prunable)
        names = _matching(trained, patterns)
        by_pattern = names - set(patterns)
    if not names:
        raise ValueError(f"`prunable` selects none of the trained parameters: {', '.join(trained)}.")
    vectors = [name for name in trained if name in by_pattern and trained[name].dim() < 2]
    if vectors:
        warn_user(
            f"`prunable` also selects {listed(vectors)}, which are biases or the weights of norms. To leave them out, "
            "pass prunable=lambda name, parameter: parameter.dim() > 1 or other names."
        )
    return names


def _is_chosen(name: str, answer: object) -> bool:
    """Whether the user's predicate selects a parameter. Raises TypeError for an answer that isn't a truth value."""
    several = isinstance(answer, Tensor | np.ndarray) and math.prod(answer.shape) != 1
    if several or isinstance(answer, str):
        kind = f"a {type(answer).__name__} {list(answer.shape)}" if several else repr(answer)  # type: ignore[attr-defined]
        raise TypeError(f"`prunable` must return True or False for each parameter, got {kind} for {name}.")
    return bool(answer)


def _patterns(prunable: Any) -> list[str]:
    """Return names and patterns as a list. Raises TypeError for anything else."""
    kind = type(prunable).__name__
    if isinstance(prunable, str):
        return [prunable]
    if isinstance(prunable, Iterable) and not isinstance(prunable, Mapping | bytes | Tensor | np.ndarray | nn.Module):
        patterns = list(prunable)
        wrong = next((each for each in patterns if not isinstance(each, str)), None)
        if wrong is None:
            return patterns
        kind = f"{type(prunable).__name__} with {type(wrong).__name__}"
    raise TypeError(
        "`prunable` must be None, the name of a parameter or a pattern, several of them, or a function (name, "
        f"parameter) -> bool; got {kind}."
    )


def _reasons_not_to_prune(model: nn.Module, outputs: Any, loss: Tensor) -> dict[str, str]:
    """Return why parameters aren't pruned by default, by name. The reason is empty for magnitudes of weight_norm."""
    by_id: dict[int, str] = {}
    layers: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            by_id |= dict.fromkeys(map(id, module.parameters(recurse=False)), RECURRENT)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            by_id[id(module.weight)] = EMBEDDING
        else:
            layers |= _add_layer(module, by_id)
    output_layer = _output_weights(outputs, loss, layers)
    by_id |= dict.fromkeys(output_layer, OUTPUT_LAYER)
    return {
        name: by_id.get(id(parameter), BARE)
        for name, parameter in model.named_parameters()
        if id(parameter) in by_id or id(parameter) not in layers
    }


def _add_layer(module: nn.Module, reasons: dict[int, str]) -> set[int]:
    """Return the ids of a layer's weights; add to `reasons` why some of them aren't pruned."""
    if isinstance(module, nn.MultiheadAttention):
        return {id(weight) for weight in (getattr(module, name) for name in ATTENTION) if isinstance(weight, Tensor)}
    if not isinstance(module, _ConvNd | nn.Linear):
        return set()
    weight, direction = weight_of(module), direction_of(module)
    if weight is not None:
        return {id(weight)}
    if direction is not None:
        reasons |= {id(own): "" for own in module.parameters() if own is not module.bias}
        reasons[id(direction)] = WEIGHT_NORM
        return {id(direction)}
    reasons |= {id(own): PARAMETRIZED for own in module.parameters() if own is not module.bias}
    return set()


def _output_weights(outputs: Any, loss: Tensor, layers: set[int]) -> set[int]:
    """Return the ids of the output layers' weights.

    They are the first layers' weights that are met when the autograd graph is followed back from the outputs. A
    layer that also feeds another of these layers is left out: it is a hidden layer whose features are also returned or
    added to an output.
    """
    roots = tensors(outputs)
    if not roots or any(not isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(outputs)):
        roots = [*roots, loss]
    start = [root.grad_fn for root in roots if root.grad_fn is not None]
    first, inputs = _first_weights(start, layers)
    deeper: set[int] = set()
    while inputs:
        weights, inputs = _first_weights(inputs, layers, deeper)
        deeper |= weights
    return first - deeper or first


def _first_weights(
    start: list[Any], layers: set[int], known: AbstractSet[int] = frozenset()
) -> tuple[set[int], list[Any]]:
    """Follow the autograd graph back from some nodes to the first layer's weight on each path.

    Returns the ids of these weights, and the nodes that compute the inputs of their layers.

    layers  the ids of the weights to look for
    known   the ids of weights whose layers' inputs are left out of the returned nodes
    """
    first: set[int] = set()
    feeding: list[Any] = []
    seen: set[Any] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [child for child, _ in node.next_functions if child is not None]
        weights = {id(weight) for weight in map(_bare_weight, inputs) if weight is not None} & layers
        first |= weights
        if not weights:
            todo += inputs
        elif not weights <= known:
            feeding += [child for child in inputs if _bare_weight(child) is None]
    return first, feeding


def _bare_weight(node: Any) -> Tensor | None:
    """Return the parameter from which a node is computed without the model's inputs.

    The operations on the way have one input, such as a transpose or a slice, or they are a norm's that reparametrizes
    the weight: their first input is the parameter, and the others are computed from it and its scale. Otherwise returns
    None.
    """
    while not hasattr(node, "variable"):
        (first, _), *others = node.next_functions or ((None, 0),)
        if first is None or (others and not _computes_a_scale(first, others)):
            return None
        node = first
    parameter: Tensor = node.variable
    return parameter


def _computes_a_scale(weight: Any, others: list[Any]) -> bool:
    """Whether nodes are computed from a weight's leaf and a magnitude for each row, as by weight_norm."""
    todo = [child for child, _ in others]
    if not hasattr(weight, "variable") or None in todo:
        return False
    seen = {weight}
    while todo and len(seen) <= MAX_SCALE_NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and (leaf.dim() != weight.variable.dim() or 1 not in leaf.shape):
            return False
        todo += [child for child, _ in node.next_functions]
    return not todo


MAX_SCALE_NODES = 12  # of the graph by which a norm computes a weight's scale


def _matching(trained: dict[str, nn.Parameter], patterns: list[str]) -> set[str]:
    names: set[str] = set()
    for pattern in patterns:
        matches = {name for name in trained if fnmatchcase(name, pattern) or name == f"{pattern}.weight"}
        if not matches:
            raise ValueError(f'`prunable`: "{pattern}" matches no trained parameter; there are {", ".join(trained)}.')
        names |= matches
    return names
