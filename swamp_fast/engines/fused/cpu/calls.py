"""The kernel calls of each operation: its forward pass in training and in evaluation, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from swamp_fast.engines.fused.cpu.convolution import convolution_backward_calls, convolution_calls
from swamp_fast.engines.fused.cpu.maps import Map
from swamp_fast.engines.fused.cpu.workspace import Call, Workspace
from swamp_fast.engines.fused.plan import (
    KINDS,
    Add,
    Concatenate,
    Convolution,
    Dropout,
    Flatten,
    Norm,
    Op,
    Pointwise,
    Pool,
)


def forward_calls(workspace: Workspace, op: Op) -> tuple[list[Call], list[Call]]:
    """The calls of an operation's forward pass in training, and those in evaluation; they differ only for dropout."""
    if isinstance(op, Dropout):
        return _dropout(workspace, op)
    calls = _FORWARD[type(op)](workspace, op)
    return calls, calls


def backward_calls(workspace: Workspace, op: Op) -> list[Call]:
    """The calls that compute the gradients of an operation's inputs and parameters from its output's gradient."""
    return _BACKWARD[type(op)](workspace, op)


def _norm(workspace: Workspace, op: Norm) -> list[Call]:
    source, target = workspace.values[op.inputs[0]], workspace.values[op.output]
    residual = workspace.values[op.inputs[-1]].handle(absent=len(op.inputs) == 1)
    begin = workspace.first_channel[op.output]
    count = workspace.samples * source.height * (1 if source.flat else source.width)
    workspace.unbiased[begin : begin + source.channels] = count / max(1, count - 1)
    weight, bias = (workspace.address(workspace.weights, name) for name in (op.weight, op.bias))
    workspace.norms[op.output] = workspace.kernels.Norm(
        *(source.handle(), target.handle(), residual, weight, bias),
        *(workspace.mean[begin:].data_ptr(), workspace.variance[begin:].data_ptr(), op.eps, True, op.relu),
    )
    return [workspace.call("norm", workspace.norms[op.output])]


def _norm_backward(workspace: Workspace, op: Norm) -> list[Call]:
    out_grad = workspace.grad_maps[op.output]
    needed = op.inputs[0] in workspace.needed
    # Request the residual's gradient first, because the kernel writes it first. If both inputs are the same value, the
    # second request then returns accumulate=True.
    side, accumulate_side = workspace.grad_of(op.inputs[1]) if len(op.inputs) > 1 else (out_grad, False)
    in_grad, accumulate = workspace.grad_of(op.inputs[0]) if needed else (out_grad, False)
    weight_grad, bias_grad = (workspace.address(workspace.grads, name) for name in (op.weight, op.bias))
    argument = workspace.kernels.NormGrad(
        *(workspace.norms[op.output], in_grad.handle(absent=not needed), out_grad.handle(), side.handle()),
        *(weight_grad, bias_grad, accumulate, accumulate_side),
    )
    return [workspace.call("norm_grad", argument)]


def _pointwise(workspace: Workspace, op: Pointwise) -> list[Call]:
    source, target = workspace.values[op.inputs[0]].handle(), workspace.values[op.output].handle()
    argument = workspace.kernels.Pointwise(source, target, source, target, KINDS[op.kind], op.parameter, False)
    return [workspace.call("pointwise", argument)]


def _pointwise_backward(workspace: Workspace, op: Pointwise) -> list[Call]:
    in_grad, accumulate = workspace.grad_of(op.inputs[0])
    argument = workspace.kernels.Pointwise(
        *(workspace.values[op.inputs[0]].handle(), workspace.values[op.output].handle()),
        *(in_grad.handle(), workspace.grad_maps[op.output].handle(), KINDS[op.kind], op.parameter, accumulate),
    )
    return [workspace.call("pointwise_grad", argument)]


def _channels(
    workspace: Workspace, source: Map, target: Map, source_begin: int, target_begin: int, count: int, accumulate: bool
) -> Call:
    """The call that copies `count` channels of one map into another, or adds them there if `accumulate` is set."""
    argument = workspace.kernels.Channels(
        *(source.handle(), target.handle(), source_begin, target_begin, count, accumulate)
    )
    return workspace.call("channels", argument)


def _add(workspace: Workspace, op: Add) -> list[Call]:
    target = workspace.values[op.output]
    return [
        _channels(workspace, workspace.values[number], target, 0, 0, target.channels, place > 0)
        for place, number in enumerate(op.inputs)
    ]


def _add_backward(workspace: Workspace, op: Add) -> list[Call]:
    out_grad = workspace.grad_maps[op.output]
    grads = [workspace.grad_of(number) for number in op.inputs]
    return [
        _channels(workspace, out_grad, in_grad, 0, 0, out_grad.channels, accumulate) for in_grad, accumulate in grads
    ]


def _concatenate(workspace: Workspace, op: Concatenate) -> list[Call]:
    calls, begin = [], 0
    for number in op.inputs:
        source = workspace.values[number]
        calls.append(_channels(workspace, source, workspace.values[op.output], 0, begin, source.channels, False))
        begin += source.channels
    return calls


def _concatenate_backward(workspace: Workspace, op: Concatenate) -> list[Call]:
    calls, begin = [], 0
    out_grad = workspace.grad_maps[op.output]
    for number in op.inputs:
        in_grad, accumulate = workspace.grad_of(number)
        calls.append(_channels(workspace, out_grad, in_grad, begin, 0, in_grad.channels, accumulate))
        begin += in_grad.channels
    return calls


def _pool_argument(workspace: Workspace, op: Pool, in_grad: Map, out_grad: Map, accumulate: bool) -> Any:
    kept = workspace.keep_alive
    divisors = 0 if op.divisors is None else kept(torch.tensor(op.divisors, dtype=torch.float64))
    return workspace.kernels.Pool(
        *(workspace.values[op.inputs[0]].handle(), workspace.values[op.output].handle()),
        *(in_grad.handle(), out_grad.handle(), kept(torch.tensor(op.rows)), kept(torch.tensor(op.columns))),
        *(divisors, accumulate),
    )


def _pool(workspace: Workspace, op: Pool) -> list[Call]:
    source, target = workspace.values[op.inputs[0]], workspace.values[op.output]
    return [workspace.call("pool", _pool_argument(workspace, op, source, target, False))]


def _pool_backward(workspace: Workspace, op: Pool) -> list[Call]:
    in_grad, accumulate = workspace.grad_of(op.inputs[0])
    argument = _pool_argument(workspace, op, in_grad, workspace.grad_maps[op.output], accumulate)
    return [workspace.call("pool_grad", argument)]


def _flatten(workspace: Workspace, op: Flatten) -> list[Call]:
    source, target = workspace.values[op.inputs[0]].handle(), workspace.values[op.output].handle()
    return [workspace.call("flatten", workspace.kernels.Flatten(source, target, False, False))]


def _flatten_backward(workspace: Workspace, op: Flatten) -> list[Call]:
    in_grad, accumulate = workspace.grad_of(op.inputs[0])
    argument = (in_grad.handle(), workspace.grad_maps[op.output].handle(), True, accumulate)
    return [workspace.call("flatten", workspace.kernels.Flatten(*argument))]


def _dropout(workspace: Workspace, op: Dropout) -> tuple[list[Call], list[Call]]:
    source, target = workspace.values[op.inputs[0]], workspace.values[op.output]
    factor = workspace.new_map(workspace.plan.shapes[op.output], 0)
    workspace.factors.append((op, factor))
    argument = workspace.kernels.Multiply(source.handle(), factor.handle(), target.handle(), False)
    copy = _channels(workspace, source, target, 0, 0, target.channels, False)
    return [workspace.call("multiply", argument)], [copy]


def _dropout_backward(workspace: Workspace, op: Dropout) -> list[Call]:
    factor = next(factor for dropout, factor in workspace.factors if dropout is op)
    in_grad, accumulate = workspace.grad_of(op.inputs[0])
    out_grad = workspace.grad_maps[op.output].handle()
    argument = workspace.kernels.Multiply(out_grad, factor.handle(), in_grad.handle(), accumulate)
    return [workspace.call("multiply", argument)]


_FORWARD: dict[type[Op], Callable[[Workspace, Any], list[Call]]] = {
    Convolution: convolution_calls,
    Norm: _norm,
    Pointwise: _pointwise,
    Add: _add,
    Concatenate: _concatenate,
    Pool: _pool,
    Flatten: _flatten,
}
_BACKWARD: dict[type[Op], Callable[[Workspace, Any], list[Call]]] = {
    Convolution: convolution_backward_calls,
    Norm: _norm_backward,
    Pointwise: _pointwise_backward,
    Add: _add_backward,
    Concatenate: _concatenate_backward,
    Pool: _pool_backward,
    Flatten: _flatten_backward,
    Dropout: _dropout_backward,
}
