"""Which parameters are pruned: by default every convolution and linear weight but the output layer's."""

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


def select_prunable(model: nn.Module, wanted: Prunable, outputs: Any) -> set[str]:
    """The names of the parameters to prune.

    wanted   None for the default; names or patterns (`layer*.weight`) of parameters or of modules whose `weight`
             is meant; or a predicate of (name, parameter)
    outputs  of one forward with gradients, from which the output layer is found

    Raises ValueError if a name matches nothing, or nothing is left to prune.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wanted is None:
        candidates = _default_candidates(model)
        output_layer = _output_weights(outputs, candidates)
        names = {name for name, p in trained.items() if id(p) in candidates and id(p) not in output_layer}
        if not names:
            raise ValueError(
                "the model has nothing to prune: there is no trained convolution or linear weight besides the layer "
                "that produces the output. Pass `prunable` with names of parameters, or unfreeze some."
            )
        return names
    if callable(wanted):
        names = {name for name, parameter in trained.items() if wanted(name, parameter)}
    else:
        names = _matching(trained, [wanted] if isinstance(wanted, str) else list(wanted))
    if not names:
        raise ValueError(f"`prunable` selects none of the trained parameters: {', '.join(trained)}.")
    return names


def _default_candidates(model: nn.Module) -> set[int]:
    """The ids of convolution, linear and attention weights that are not an embedding's too."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            found.add(id(module.weight))
        if isinstance(module, nn.MultiheadAttention):
            found.update(id(getattr(module, name)) for name in ATTENTION if getattr(module, name) is not None)
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag))
    return found - {id(table) for table in tables}


def _output_weights(outputs: Any, candidates: set[int]) -> set[int]:
    """The ids of the weights met first on the way back from the outputs through the autograd graph.

    One that another of them builds upon (hidden features among the outputs, or added to them) is no output layer's.
    """
    start = [output.grad_fn for output in tensors(outputs) if output.grad_fn is not None]
    found, below = _met_first(start, candidates)
    built_upon: set[int] = set()
    while below:
        weights, below = _met_first(below, candidates, built_upon)
        built_upon |= weights
    return found - built_upon or found


def _met_first(
    start: list[Any], candidates: set[int], known: AbstractSet[int] = frozenset()
) -> tuple[set[int], list[Any]]:
    """The candidates met first on the way back from some nodes, and what the layers that they belong to take in."""
    found: set[int] = set()
    below: list[Any] = []
    seen: set[Any] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [child for child, _ in node.next_functions if child is not None]
        weights = {id(weight) for weight in map(_bare_weight, inputs) if weight is not None} & candidates
        found |= weights
        if not weights:
            todo += inputs
        elif not weights <= known:
            below += [each for each in inputs if _bare_weight(each) is None]
    return found, below


def _bare_weight(node: Any) -> Tensor | None:
    """The parameter that a node hands on, as it is or through views (a transpose, a slice)."""
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
        found = {name for name in trained if fnmatchcase(name, pattern) or name == f"{pattern}.weight"}
        if not found:
            raise ValueError(f'`prunable`: "{pattern}" matches no trained parameter; there are {", ".join(trained)}.')
        names |= found
    return names
