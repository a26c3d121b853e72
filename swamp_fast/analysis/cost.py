"""What does a sparse model cost at inference? FLOPs, bytes and kept parameters by layer, and measured latency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swamp_fast.analysis.evaluator import Analysis
from swamp_fast.common.checked import checked, checked_count
from swamp_fast.common.copying import copy_of
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.timing import seconds_in_turn
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.engines.lane_by_lane import channels_last
from swamp_fast.problem.solutions import state_of
from swamp_fast.runs.result import module_of


@dataclass(frozen=True)
class LayerCost:
    """The cost of one parameter: FLOPs of one sample's forward pass (2 per multiply-add) and bytes, sparse and dense.

    FLOPs are None for a prunable parameter that is not a weight of a convolution, linear or attention layer.
    kept, size  number of kept weights and of all weights
    """

    flops: int | None
    dense_flops: int | None
    bytes: int
    dense_bytes: int
    kept: int
    size: int


@dataclass(frozen=True)
class InferenceCost(LayerCost):
    """The cost of one model, sparse and dense.

    flops                  of one sample's forward pass, including products of activations, as in attention; None if
                           the FLOPs of any layer are None
    dense_flops            the same for the dense model, as torch counts FLOPs; torch omits nn.LSTM
    bytes                  size of the kept values, plus one bit per prunable weight for the mask; without buffers
    kept                   number of kept parameters, including those that are never pruned
    sparse_ms, dense_ms    median latency of one batch on this CPU in milliseconds; if one is None, `why` is the reason
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
    """FLOPs, bytes and kept parameters of a sparse model, and its latency on this CPU compared with the dense module.

    The sparse model runs on the kernels of this project, with its mask. The dense model is the plain module with the
    same weights, in eval mode; it is timed in both memory formats, and the faster one counts. After one warm-up run
    each, the models are timed in turns, with as many threads as torch is set to use. FLOPs count matrix products and
    convolutions. They don't predict latency: below some density, the memory traffic of activations dominates.

    batch_size  the number of samples that are timed; None takes that of the settings
    repeats     how often each model is timed; with 0 no latency is measured

    Raises TypeError or ValueError for a state or masks that don't fit the model, and for other numbers.
    """
    checked("on", on, Analysis).checked_state("state", state)
    checked_count("repeats", repeats, 0)
    problem, mask = on.problem, on.mask(masks)
    kept = problem.kept(mask)
    layers = {}
    for name, parameter in problem.template.named_parameters():
        size, itemsize = parameter.numel(), parameter.element_size()
        count, uses = kept.get(name, size), problem.probe.uses.get(name, 0.0)
        mask_bytes = -(-size // 8) if name in kept else 0
        unknown = name in problem.probe.uncounted
        flops, dense_flops = (None if unknown else round(2 * uses * number) for number in (count, size))
        layers[name] = LayerCost(flops, dense_flops, count * itemsize + mask_bytes, size * itemsize, count, size)
    batch = problem.config.batch_size if batch_size is None else checked_count("batch_size", batch_size, 1)
    sparse, dense, why = _latency(on, state, mask, batch, repeats)
    return InferenceCost(
        flops=None if problem.probe.uncounted else problem.flops(mask),
        dense_flops=problem.probe.dense_flops,
        bytes=sum(layer.bytes for layer in layers.values()),
        dense_bytes=sum(layer.dense_bytes for layer in layers.values()),
        kept=sum(layer.kept for layer in layers.values()),
        size=sum(layer.size for layer in layers.values()),
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
    """Median milliseconds per batch of the sparse and the dense model, and the reason if one of them is None."""
    problem = on.problem
    if problem.device.type != "cpu":
        return None, None, f"latency is measured on a CPU, and the analysis is on {problem.device}"
    if repeats < 1:
        return None, None, "no repeats were requested"
    inputs, _, count = next(pass_in_stored_order(on.train, batch_size))
    if count < batch_size:
        return None, None, f"there are {count} samples, fewer than a batch of {batch_size}"
    engine, point, keys = on.fused, on.solution(state), on.keys(1)
    module = module_of(problem.template, state_of(problem, point))

    def plain(module: nn.Module, inputs: Tensor) -> Callable[[], object]:
        def run() -> object:
            with problem.autocast():
                return problem.forward(module, inputs)

        return run

    contenders = [plain(module, inputs)]
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        last = copy_of(module).to(memory_format=torch.channels_last)
        contenders.append(plain(last, channels_last(inputs)))
    if isinstance(engine, str):
        with torch.no_grad():
            return None, min(medians(contenders, repeats)) * 1e3, engine
    engine.spawn(point, mask, range(1), None)
    models = engine.side_by_side(point.weights[None], {name: buffer[None] for name, buffer in point.buffers.items()})
    with torch.no_grad():
        sparse, *dense = medians([lambda: models.outputs(inputs, keys), *contenders], repeats)
    engine.release()
    return sparse * 1e3, min(dense) * 1e3, None


def medians(contenders: list[Callable[[], object]], repeats: int) -> list[float]:
    """The median seconds of each contender on the CPU. After one warm-up run each, they are timed in turns."""
    for run in contenders:
        run()
    return [statistics.median(seconds) for seconds in seconds_in_turn(contenders, torch.device("cpu"), repeats)]
