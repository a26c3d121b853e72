"""Functions on trees of tensors: nested dicts, tuples and lists, as models take and return them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Return the tree of the results of `function(leaf, *other_leaves)`, over the leaves of trees of one structure."""
    if isinstance(first, dict):
        out = {} if type(first) is dict else copy.copy(first)  # the user's subclass of dict is kept
        for key, value in first.items():
            out[key] = tree_map(function, value, *(other[key] for other in others))
        return out
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(tree_map(function, *items) for items in zip(first, *others, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(tree_map(function, *items) for items in zip(first, *others, strict=True))
    return function(first, *others)


def tree_leaves(tree: Any) -> Iterator[Any]:
    """Yield the leaves of a tree in order."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from tree_leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tree_leaves(value)
    else:
        yield tree


def tensors(tree: Any) -> list[Tensor]:
    """Return the leaves of a tree that are tensors."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tree_clone(tree: Any) -> Any:
    """Return the tree with clones of its tensors; other leaves are the same."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def tree_stack(trees: Sequence[Any]) -> Any:
    """Stack trees of tensors along a new first axis into one tree."""
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def tree_to(tree: Any, device: torch.device) -> Any:
    """Return the tree with its tensors on the device; other leaves are unchanged."""
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, tree)
