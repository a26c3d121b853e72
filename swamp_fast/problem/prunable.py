"""Selects the parameters to prune: by default, all convolution and linear weights except the output layer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from swamp_fast.common.tree import tensors

Prunable = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None

ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def select_prunable(model: nn.Module, prunable: Prunable, outputs: Any) -> set[str]:
    """Return the names of the parameters to prune.

    prunable  None for the default; a name or pattern (`layer*.weight`) of parameters, or several; the name of a
              module selects its `weight`; or a predicate (name, parameter) -> bool
    outputs   the outputs of one forward pass with gradients; following their autograd graph back finds the output layer

    Raises ValueError if a name matches nothing, or if there is nothing to prune.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if prunable is None:
        candidates = _default_candidates(model)
        output_layer = _output_weights(outputs, candidates)
        names = {name for name, p in trained.items() if id(p) in candidates and id(p) not in output_layer}
        if not names:
            raise ValueError(
                "the model has nothing to prune: there is no trained convolution or linear weight except in the "
                "layer that produces the output. Pass `prunable` with names of parameters, or unfreeze some."
            )
        return names
    if callable(prunable):
        names = {name for name, parameter in trained.items() if prunable(name, parameter)}
    else:
        names = _matching(trained, [prunable] if isinstance(prunable, str) else list(prunable))
    if not names:
        raise ValueError(f"`prunable` selects none of the trained parameters: {', '.join(trained)}.")
    return names


def _default_candidates(model: nn.Module) -> set[int]:
    """Return the ids of the convolution, linear and attention weights that are not shared with an embedding."""
    weights: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            weights.add(id(module.weight))
        if isinstance(module, nn.MultiheadAttention):
            weights.update(id(getattr(module, name)) for name in ATTENTION if getattr(module, name) is not None)
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    return weights - {id(table) for table in tables}


def _output_weights(outputs: Any, candidates: set[int]) -> set[int]:
    """Return the ids of the output layers' weights.

    They are the first candidate weights that are met when the autograd graph is followed back from the outputs. A
    layer that also feeds another of these layers is left out: it is a hidden layer whose features are also returned or
    added to an output.
    """
    start = [output.grad_fn for output in tensors(outputs) if output.grad_fn is not None]
    first, inputs = _first_weights(start, candidates)
    deeper: set[int] = set()
    while inputs:
        weights, inputs = _first_weights(inputs, candidates, deeper)
        deeper |= weights
    return first - deeper or first


def _first_weights(
    start: list[Any], candidates: set[int], known: AbstractSet[int] = frozenset()
) -> tuple[set[int], list[Any]]:
    """Follow the autograd graph back from some nodes to the first candidate weight on each path.

    Returns the ids of these weights, and the nodes that compute the inputs of their layers.

    candidates  the ids of the weights to look for
    known       the ids of weights whose layers' inputs are left out of the returned nodes
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
        weights = {id(weight) for weight in map(_bare_weight, inputs) if weight is not None} & candidates
        first |= weights
        if not weights:
            todo += inputs
        elif not weights <= known:
            feeding += [child for child in inputs if _bare_weight(child) is None]
    return first, feeding


def _bare_weight(node: Any) -> Tensor | None:
    """Return the parameter from which operations with one input, such as a transpose or a slice, lead to a node.

    Returns None if an operation on the way back has several inputs or none.
    """
    while not hasattr(node, "variable"):
        if len(node.next_functions) != 1 or node.next_functions[0][0] is None:
            return None
        node = node.next_functions[0][0]
    parameter: Tensor = node.variable
    return parameter


def _matching(trained: dict[str, nn.Parameter], patterns: list[str]) -> set[str]:
    names: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`prunable` must hold names or patterns, got {pattern!r}.")
        matches = {name for name in trained if fnmatchcase(name, pattern) or name == f"{pattern}.weight"}
        if not matches:
            raise ValueError(f'`prunable`: "{pattern}" matches no trained parameter; there are {", ".join(trained)}.')
        names |= matches
    return names
