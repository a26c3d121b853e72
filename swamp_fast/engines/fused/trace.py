"""Traces a model's forward with torch.fx and translates it into a Plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from swamp_fast.common.copying import copy_of
from swamp_fast.engines.fused.nodes import FUNCTIONAL_DROPOUTS, dropout_arguments, source_of
from swamp_fast.engines.fused.plan import Add, Convolution, Norm, Op, Plan, Pointwise
from swamp_fast.engines.fused.reader import NotCovered, Reader

__all__ = ["NotCovered", "plan_of"]


def plan_of(model: nn.Module, forward: Callable[[nn.Module, Any], Any], inputs: Tensor) -> Plan:
    """Return the plan of forward(model, inputs), traced with example inputs [B, ...].

    Raises NotCovered if the fused engine can't run the model.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() not in (2, 4) or not inputs.is_floating_point():
        raise NotCovered("its input is not a tensor [B, channels, height, width] or [B, features]")
    for path, module in model.named_modules():
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            raise NotCovered(f"{path or 'the model'} has hooks")
    called = _Called(copy_of(model), forward)
    training, evaluation = _trace(called.train()), _trace(called.eval())
    if _text(training) != _text(evaluation):
        raise NotCovered("its forward differs between training and evaluation")
    if any(node.target in FUNCTIONAL_DROPOUTS and dropout_arguments(node)[1] for node in evaluation.nodes):
        raise NotCovered("its dropout stays on in evaluation")
    reader = Reader(called, training, inputs)
    output = reader.run()
    _refuse_what_kernels_cannot_do(reader.ops, output)
    ops, norms = _with_fused_norms(reader.ops, reader.norms, output)
    return Plan(tuple(ops), tuple(reader.shapes), 0, output, norms)


class _Called(nn.Module):
    """Wraps forward(model, inputs) in a module, because torch.fx traces modules."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self.model, inputs)


def _trace(module: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(module)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotCovered(f"its forward can't be traced ({reason})") from error


def _text(graph: fx.Graph) -> list[str]:
    """One line of text per node, by which the graphs of training and evaluation are compared.

    The lines omit dropout's argument `training`, the only one that may differ between the two.
    """
    lines = []
    for node in graph.nodes:
        if node.target in FUNCTIONAL_DROPOUTS:
            p, _, inplace = dropout_arguments(node)
            lines.append(f"{node.op} {node.target} {source_of(node)} {p} {inplace}")
            continue
        lines.append(f"{node.op} {node.target} {node.args} {node.kwargs}")
    return lines


def _refuse_what_kernels_cannot_do(ops: list[Op], output: int) -> None:
    """Raise NotCovered for shared parameters, unused values, or a model without convolutions and linear layers."""
    if not any(isinstance(op, Convolution) for op in ops):
        raise NotCovered("it has neither convolutions nor linear layers")
    seen: set[str] = set()
    for op in ops:
        for kind in ("weight", "bias"):
            name = getattr(op, kind, None)
            if name in seen:
                raise NotCovered(f"{op.place} shares its {kind} with another layer")
            seen |= {name} if name else set()
    read = {output} | {number for op in ops for number in op.inputs}
    for op in ops:
        if op.output not in read:
            raise NotCovered(f"{op.place} computes a value that is not used")


def _with_fused_norms(ops: list[Op], paths: dict[int, str], output: int) -> tuple[list[Op], tuple[str, ...]]:
    """Merge each Norm with the Add and the ReLU that follow it; returns the operations and each Norm's module path.

    A Norm is merged with the operation after it only if nothing else reads the Norm's output.

    paths  the module path of each Norm, by the number of the Norm's output
    """
    readers = Counter(number for op in ops for number in op.inputs)
    readers[output] += 1
    paths = dict(paths)
    merged: list[Op] = []
    places: dict[int, int] = {}  # the index in `merged` of each Norm without ReLU, by the number of its output
    for op in ops:
        norm = next((merged[places[n]] for n in reversed(op.inputs) if n in places and readers[n] == 1), None)
        if isinstance(norm, Norm) and isinstance(op, Add) and len(norm.inputs) == 1:
            others = tuple(n for n in op.inputs if n != norm.output)
            # The Norm moves to where the Add was, because the Add's other input may be computed only after the Norm.
            removed = places.pop(norm.output)
            del merged[removed]
            places = {n: place - (place > removed) for n, place in places.items()}
            places[op.output] = len(merged)
            merged.append(replace(norm, inputs=(*norm.inputs, *others), output=op.output))
            paths[op.output] = paths[norm.output]
        elif isinstance(norm, Norm) and isinstance(op, Pointwise) and op.kind == "relu":
            merged[places.pop(norm.output)] = replace(norm, output=op.output, relu=True)
            paths[op.output] = paths[norm.output]
        else:
            if isinstance(op, Norm):
                places[op.output] = len(merged)
            merged.append(op)
    return merged, tuple(paths[op.output] for op in merged if isinstance(op, Norm))
