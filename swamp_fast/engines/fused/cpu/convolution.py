"""The kernel calls of a convolution under a mask, and how many of its outputs share loads, by a stopwatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.engines.fused.cpu.taps import CHUNK, SAMPLES, Taps
from swamp_fast.engines.fused.cpu.workspace import Call, Workspace
from swamp_fast.engines.fused.plan import Convolution

FORWARD, BY_INPUT, BY_WEIGHTS = range(3)  # the passes, as Rows numbers them

MAX_WASTE = 2.5  # sharing loads is not tried where it multiplies the number of products by more
TIMINGS = 3
MIN_TASKS = 16  # into which a weight gradient is split, if it can be


def convolution_calls(workspace: Workspace, op: Convolution) -> list[Call]:
    """The forward pass."""
    source, target = workspace.values[op.inputs[0]], workspace.values[op.output]
    bias, mask = workspace.address(workspace.weights, op.bias), workspace.masks[op.output]

    def convolve(taps: Taps) -> Call:
        argument = (source.handle(), target.handle(), _kernel_taps(workspace, taps), bias, op.stride, 1, False)
        return workspace.call("convolve", workspace.kernels.Convolve(*argument))

    return [_fastest(workspace, op, FORWARD, lambda rows: mask.forward_taps(rows, source.geometry), convolve)]


def convolution_backward_calls(workspace: Workspace, op: Convolution) -> list[Call]:
    """The gradient by the weights, and that by the input if it is needed."""
    calls = [_by_weights(workspace, op)]
    if op.inputs[0] in workspace.needed:
        calls.append(_by_input(workspace, op))
    return calls


def _by_weights(workspace: Workspace, op: Convolution) -> Call:
    source, out_grad = workspace.values[op.inputs[0]], workspace.grad_maps[op.output]
    mask, bias_grad = workspace.masks[op.output], workspace.address(workspace.grads, op.bias)
    parts = min(parts_of(int(mask.kept.sum())), out_grad.blocks)

    def weight_grad(taps: Taps) -> Call:
        size = max(1, taps.largest_chunk)
        if workspace.scratch.numel() < size * workspace.threads * SAMPLES:
            workspace.scratch = torch.zeros(size * workspace.threads * SAMPLES, dtype=workspace.dtype)
        if workspace.partial.numel() < parts * taps.count:
            workspace.partial = torch.zeros(parts * taps.count, dtype=workspace.dtype)
        kept = workspace.keep_alive
        kernel_taps = workspace.kernels.Taps(kept(taps.starts), kept(taps.offsets), 0, taps.groups, taps.rows)
        argument = workspace.kernels.WeightGrad(
            *(source.handle(), out_grad.handle(), kernel_taps, kept(taps.chunks), len(taps.chunks) - 1, parts),
            *(op.stride, kept(taps.index), kept(workspace.partial), kept(workspace.scratch), size),
            *(workspace.grads.data_ptr(), bias_grad),
        )
        return workspace.call("weight_grad", argument)

    return _fastest(workspace, op, BY_WEIGHTS, lambda rows: mask.forward_taps(rows, source.geometry), weight_grad)


def _by_input(workspace: Workspace, op: Convolution) -> Call:
    out_grad, mask = workspace.grad_maps[op.output], workspace.masks[op.output]
    in_grad, accumulate = workspace.grad_of(op.inputs[0])

    def convolve(taps: Taps) -> Call:
        argument = (out_grad.handle(), in_grad.handle(), _kernel_taps(workspace, taps), 0, 1, op.stride, accumulate)
        return workspace.call("convolve", workspace.kernels.Convolve(*argument))

    return _fastest(workspace, op, BY_INPUT, lambda rows: mask.backward_taps(rows, out_grad.geometry), convolve)


def _fastest(
    workspace: Workspace, op: Convolution, which: int, taps_of: Callable[[int], Taps], call_of: Callable[[Taps], Call]
) -> Call:
    """The call of a pass in which as many outputs share loads as is recorded, or else as is fastest.

    Also adds the call that gathers its weights, if it needs one, and its tensors to the workspace.
    """
    recorded = workspace.rows.setdefault(op.weight, [0, 0, 0])
    tried: list[tuple[int, Call, list[Call], list[Tensor]]] = []
    for rows in [recorded[which]] if recorded[which] else [1, 2, 4]:
        if rows > workspace.masks[op.output].most_rows(which == BY_INPUT):
            break
        taps = taps_of(rows)
        if tried and taps.waste > MAX_WASTE:
            break
        gathers, kept = len(workspace.gather_calls), len(workspace.kept_alive)
        call = call_of(taps)
        tried.append((rows, call, workspace.gather_calls[gathers:], workspace.kept_alive[kept:]))
        del workspace.gather_calls[gathers:], workspace.kept_alive[kept:]
    if len(tried) > 1:
        tried.sort(key=lambda candidate: _least_seconds(candidate[1]))
    recorded[which], call, gather_calls, tensors = tried[0]
    workspace.gather_calls += gather_calls
    workspace.kept_alive += tensors
    return call


def _least_seconds(call: Call) -> float:
    (seconds,) = seconds_in_turn([call], torch.device("cpu"), TIMINGS)
    return min(seconds)


def _kernel_taps(workspace: Workspace, taps: Taps) -> Any:
    """The kernels' form of taps, which reads the weights in place if they are in the taps' order, or gathered."""
    start = int(taps.index[0, 0]) if taps.count else 0
    if taps.rows == 1 and torch.equal(taps.index.flatten(), torch.arange(start, start + taps.count).int()):
        values = workspace.weights[start:].data_ptr()
    else:
        values = workspace.keep_alive(torch.zeros(max(1, taps.count), dtype=workspace.dtype))
        workspace.gather_calls.append(workspace.gather_call(workspace.keep_alive(taps.index), values, taps.count))
    starts, offsets = workspace.keep_alive(taps.starts), workspace.keep_alive(taps.offsets)
    return workspace.kernels.Taps(starts, offsets, values, taps.groups, taps.rows)


def parts_of(kept: int) -> int:
    """The number of parts in which the blocks of a weight gradient are summed.

    It depends on the number of kept weights alone, not on threads, so that the sum's bits do too.
    """
    parts = 1
    while parts * max(1, kept // CHUNK) < MIN_TASKS:
        parts *= 2
    return parts
