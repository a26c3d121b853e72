"""Helpers for the nodes of a graph traced by torch.fx: a node's arguments and the value it computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

FUNCTIONAL_DROPOUTS = {F.dropout, F.dropout2d}


def values_of(module: nn.Module, graph: fx.Graph, inputs: Tensor) -> dict[fx.Node, Any]:
    """The value that each node of a module's graph computes on inputs [B, ...].

    The graph is interpreted. A GraphModule would write the names of layers into source code and execute it.
    """
    values = _Values(module, graph)
    with torch.no_grad():
        values.run(inputs.clone())
    return values.by_node


class _Values(fx.Interpreter):
    """Runs a graph and remembers the value of every node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.by_node: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.by_node[n] = super().run_node(n)
        return self.by_node[n]


def holds_tensors(value: Any) -> bool:
    """Whether a node's value is a tensor, or may contain one."""
    return isinstance(value, Tensor | dict | list) or (isinstance(value, tuple) and any(map(holds_tensors, value)))


def source_of(node: fx.Node) -> Any:
    """A node's first argument: its input, or for a concatenation the list of its inputs."""
    return node.args[0] if node.args else node.kwargs["tensors" if "tensors" in node.kwargs else "input"]


def arguments_of(node: fx.Node, *names: str) -> dict[str, Any]:
    """A node's arguments except the first, by name.

    names  the parameter names that positional arguments are given, in order
    """
    return dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)


def dropout_arguments(node: fx.Node) -> tuple[float, bool, bool]:
    """The arguments (p, training, inplace) of a call of F.dropout or F.dropout2d."""
    arguments = arguments_of(node, "p", "training", "inplace")
    return arguments.get("p", 0.5), arguments.get("training", True), arguments.get("inplace", False)
