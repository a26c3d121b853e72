"""The kernel calls of a masked convolution. Timing chooses how many of its output channels share their loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.engines.fused.cpu.taps import MAX_CHUNK_SUMS, SAMPLES_PER_BLOCK, Taps
from swamp_fast.engines.fused.cpu.workspace import Call, Workspace
from swamp_fast.engines.fused.plan import Convolution

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)  # the index of each pass in the lists of a Rows

MAX_WASTE = 2.5  # sharing loads is not tried if it multiplies the number of products by more than this
TIMING_ROUNDS = 3
MIN_TASKS = 16  # a weight gradient is split into at least this many tasks if the batch has enough blocks


def convolution_calls(workspace: Workspace, op: Convolution) -> list[Call]:
    """The calls of the forward pass."""
    source, target = workspace.values[op.inputs[0]], workspace.values[op.output]
    bias, mask = workspace.address(workspace.weights, op.bias), workspace.masks[op.output]

    def convolve(taps: Taps) -> Call:
        argument = (source.handle(), target.handle(), _kernel_taps(workspace, taps), bias, op.stride, 1, False)
        return workspace.call("convolve", workspace.kernels.Convolve(*argument))

    return [_fastest(workspace, op, FORWARD, lambda rows: mask.forward_taps(rows, source.geometry), convolve)]


def convolution_backward_calls(workspace: Workspace, op: Convolution) -> list[Call]:
    """The calls that compute the weight gradient and, if it is needed, the input gradient."""
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
        if workspace.scratch.numel() < size * workspace.threads * SAMPLES_PER_BLOCK:
            workspace.scratch = torch.zeros(size * workspace.threads * SAMPLES_PER_BLOCK, dtype=workspace.dtype)
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

    return _fastest(workspace, op, WEIGHT_GRADIENT, lambda rows: mask.forward_taps(rows, source.geometry), weight_grad)


def _by_input(workspace: Workspace, op: Convolution) -> Call:
    out_grad, mask = workspace.grad_maps[op.output], workspace.masks[op.output]
    in_grad, accumulate = workspace.grad_of(op.inputs[0])

    def convolve(taps: Taps) -> Call:
        argument = (out_grad.handle(), in_grad.handle(), _kernel_taps(workspace, taps), 0, 1, op.stride, accumulate)
        return workspace.call("convolve", workspace.kernels.Convolve(*argument))

    return _fastest(workspace, op, INPUT_GRADIENT, lambda rows: mask.backward_taps(rows, out_grad.geometry), convolve)


def _fastest(
    workspace: Workspace, op: Convolution, which: int, taps_of: Callable[[int], Taps], call_of: Callable[[Taps], Call]
) -> Call:
    """Return the call of one pass, with the recorded number of outputs that share loads.

    If no number is recorded, the fastest of 1, 2 and 4 is chosen by timing and recorded. If the chosen call needs
    gathered weights, the call that gathers them and the tensors of the chosen call are added to the workspace.

    which    FORWARD, INPUT_GRADIENT or WEIGHT_GRADIENT
    taps_of  makes the taps for a number of outputs that share loads
    call_of  makes the call for given taps
    """
    recorded = workspace.rows.setdefault(op.weight, [0, 0, 0])
    tried: list[tuple[int, Call, list[Call], list[Tensor]]] = []
    for rows in [recorded[which]] if recorded[which] else [1, 2, 4]:
        if rows > workspace.masks[op.output].most_rows(which == INPUT_GRADIENT):
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
    (seconds,) = seconds_in_turn([call], torch.device("cpu"), TIMING_ROUNDS)
    return min(seconds)


def _kernel_taps(workspace: Workspace, taps: Taps) -> Any:
    """The taps as the argument object of a kernel.

    The kernel reads the weights in place if they are already in the taps' order; otherwise a call is added to the
    workspace that gathers them in that order.
    """
    start = int(taps.index[0, 0]) if taps.count else 0
    if taps.rows == 1 and torch.equal(taps.index.flatten(), torch.arange(start, start + taps.count).int()):
        values = workspace.weights[start:].data_ptr()
    else:
        values = workspace.keep_alive(torch.zeros(max(1, taps.count), dtype=workspace.dtype))
        workspace.gather_calls.append(workspace.gather_call(workspace.keep_alive(taps.index), values, taps.count))
    starts, offsets = workspace.keep_alive(taps.starts), workspace.keep_alive(taps.offsets)
    return workspace.kernels.Taps(starts, offsets, values, taps.groups, taps.rows)


def parts_of(kept: int) -> int:
    """The number of parts into which the blocks of samples are divided for the sums of a weight gradient.

    It depends only on the number of kept weights, not on the number of threads, so that threads don't affect the bits.
    """
    parts = 1
    while parts * max(1, kept // MAX_CHUNK_SUMS) < MIN_TASKS:
        parts *= 2
    return parts
