"""What a sparse model costs at inference: FLOPs, bytes and kept parameters by layer, and measured latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamp_fast.analysis.evaluator import Analysis
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.engines.lane_by_lane import channels_last
from swamp_fast.problem.solutions import state_of
from swamp_fast.runs.result import module_of


@dataclass(frozen=True)
class LayerCost:
    """One parameter's part in a forward of one sample: FLOPs (2 a multiply-add) and bytes, as kept and dense.

    FLOPs are None where it is prunable, but no weight of a convolution, linear or attention layer.
    """

    flops: int | None
    dense_flops: int | None
    bytes: int
    dense_bytes: int
    kept: int
    size: int


@dataclass(frozen=True)
class InferenceCost(LayerCost):
    """The cost of one model, as kept and dense.

    flops                  None if a layer's are; products without weights, as attention's, are in no layer's
    dense_flops            as torch counts them, which leaves nn.LSTM's out
    bytes                  of the kept values and of the masks' bits; buffers are not counted
    kept                   parameters, those that are never pruned included
    sparse_ms, dense_ms    median latency of one batch on this CPU; None for the reason in `why`
    """

    batch_size: int
    sparse_ms: float | None
    dense_ms: float | None
    why: str | None
    layers: dict[str, LayerCost]


def inference_cost(
    on: Analysis,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    batch_size: int | None = None,
    repeats: int = 15,
) -> InferenceCost:
    """FLOPs, bytes and kept parameters of a sparse model, and how long it takes on this CPU beside the dense module.

    The sparse model runs on this project's kernels under its mask; the dense one is the plain module with the same
    weights, in eval mode, with channels first or last in memory, whichever is faster. They take turns, after one run
    each to warm up. FLOPs count matrix products and convolutions. They are not time: below some density the traffic of
    activations rules. Both run with torch's number of threads.
    """
    problem, mask = on.problem, on.mask(masks)
    kept = problem.kept(mask)
    layers = {}
    for name, parameter in problem.template.named_parameters():
        size, itemsize = parameter.numel(), parameter.element_size()
        own, uses = kept.get(name, size), problem.probe.uses.get(name, 0.0)
        bits = -(-size // 8) if name in kept else 0
        unknown = name in problem.probe.uncounted
        flops, dense_flops = (None if unknown else round(2 * uses * number) for number in (own, size))
        layers[name] = LayerCost(flops, dense_flops, own * itemsize + bits, size * itemsize, own, size)
    batch = batch_size or problem.config.batch_size
    sparse, dense, why = _latency(on, state, mask, batch, repeats)
    return InferenceCost(
        flops=None if problem.probe.uncounted else problem.flops(mask),
        dense_flops=problem.probe.dense_flops,
        bytes=sum(each.bytes for each in layers.values()),
        dense_bytes=sum(each.dense_bytes for each in layers.values()),
        kept=sum(each.kept for each in layers.values()),
        size=sum(each.size for each in layers.values()),
        batch_size=batch,
        sparse_ms=sparse,
        dense_ms=dense,
        why=why,
        layers=layers,
    )


@one_at_a_time
def _latency(
    on: Analysis, state: Mapping[str, Tensor], mask: Tensor, batch_size: int, repeats: int
) -> tuple[float | None, float | None, str | None]:
    """Median milliseconds of a batch, sparse and dense, or why they aren't measured."""
    problem = on.problem
    if problem.device.type != "cpu":
        return None, None, f"it is measured on a CPU, and the analysis is on {problem.device}"
    if repeats < 1:
        return None, None, "no repeats were asked for"
    inputs, _, count = next(pass_in_stored_order(on.train, batch_size))
    if count < batch_size:
        return None, None, f"there are {count} samples, less than a batch of {batch_size}"
    engine, point, keys = on.fused, on.solution(state), on.keys(1)
    module = module_of(problem.template, state_of(problem, point))

    def plain(module: nn.Module, inputs: Tensor) -> Callable[[], object]:
        def run() -> object:
            with problem.autocast():
                return problem.forward(module, inputs)

        return run

    contenders = [plain(module, inputs)]
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        last = copy.deepcopy(module).to(memory_format=torch.channels_last)
        contenders.append(plain(last, channels_last(inputs)))
    if isinstance(engine, str):
        with torch.no_grad():
            return None, min(medians(contenders, repeats)) * 1e3, engine
    engine.spawn(point, mask, range(1), None)
    models = engine.side_by_side(point.weights[None], {name: each[None] for name, each in point.buffers.items()})
    with torch.no_grad():
        sparse, *dense = medians([lambda: models.outputs(inputs, keys), *contenders], repeats)
    engine.release()
    return sparse * 1e3, min(dense) * 1e3, None


def medians(contenders: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each, taking turns, after one run each to warm up."""
    taken: list[list[float]] = [[] for _ in contenders]
    for turn in range(repeats + 1):
        for own, run in zip(taken, contenders, strict=True):
            began = time.perf_counter()
            run()
            if turn:
                own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in taken]
