"""The self-check of the fused engine before the first step: forward, gradients and statistics against autograd's."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.data.streams import generators_left_alone, lane_keys, stream_of
from swamp_fast.engines.check import close, different_weights, few_samples, in_float64
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.lanes import CpuLanes
from swamp_fast.engines.fused.cuda.lanes import CudaLanes
from swamp_fast.engines.fused.engine import programs_of
from swamp_fast.engines.lanes import LaneByLane
from swamp_fast.plan import Plan
from swamp_fast.problem import Problem

KEPT = 0.5  # of the weights, at random, besides a mask of all
TOLERANCE = 1e-9


def differs_from_autograd(problem: Problem, plan: Plan, mask: Tensor | None = None) -> str | None:
    """Where a plan's results differ from the model's own, on a few samples in float64; None if nowhere.

    Under a mask [Q], or one at random.
    """
    try:
        return _difference(in_float64(problem), plan, mask)
    except Exception as error:
        return f"the check of it raises {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _difference(problem: Problem, plan: Plan, mask: Tensor | None) -> str | None:
    lanes = 2
    keys = lane_keys([problem.config.seed] * lanes, [stream_of(None, lane) for lane in range(lanes)], problem.device)
    batch = few_samples(problem, keys)
    if mask is None:
        drawn = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(0))
        mask = problem.mask & (drawn < KEPT).to(problem.device)
    compact = Compact(problem.layout, mask)
    weights = compact.expand(compact.compact(different_weights(problem)[:lanes]))
    results = []
    with generators_left_alone():
        for fused in (False, True):
            size = compact.P if fused else problem.layout.P
            grads = torch.zeros(lanes, size, dtype=torch.float64, device=problem.device)
            way: CpuLanes | CudaLanes | LaneByLane
            if fused:
                way = programs_of(problem, plan, compact, {}).lanes(compact.compact(weights), grads)
            else:
                way = LaneByLane(problem, weights.clone(), grads, False)
            for module in way.modules:
                module.train()
            found: dict[str, Tensor] = {"losses": way.backward(batch, keys)}
            found["gradients"] = grads if fused else compact.compact(grads)
            found |= {f"buffer {name}": buffer.clone() for name, buffer in way.buffers().items()}
            for module in way.modules:
                module.eval()
            with torch.no_grad():
                found["outputs"] = torch.stack(way.outputs(batch.lane(0)[0], keys))
            results.append(found)
    for name, expected in results[0].items():
        if not close(results[1][name], expected, TOLERANCE):
            return f"its {name} differ from autograd's"
    return None
