"""The self-check of the fused engine before the first step: forward, gradients and statistics against autograd's."""

from __future__ import annotations

import torch
from torch import Tensor

from swamp_fast.data.streams import generators_left_alone, lane_keys, stream_of
from swamp_fast.engines.check import close, different_weights, few_samples, in_float64
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.lanes import CpuLanes
from swamp_fast.engines.fused.cuda.lanes import CudaLanes, CudaPrograms
from swamp_fast.engines.fused.engine import programs_of
from swamp_fast.engines.lanes import LaneByLane
from swamp_fast.nvrtc import Launch, launcher, why_missing
from swamp_fast.plan import Plan
from swamp_fast.problem import Problem

KEPT = 0.5  # of the weights, at random, besides a mask of all
TOLERANCE = 1e-9
LOW_TOLERANCE = 0.05  # of bfloat16's gradients by two ways to sum: a few roundings of 2^-9 a layer
LEAST_SHARE = 1e-3  # of all gradients: a layer whose own are smaller is compared with that


def differs_from_autograd(problem: Problem, plan: Plan, mask: Tensor | None = None) -> str | None:
    """Where a plan's results differ from the model's own, on a few samples in float64; None if nowhere.

    Under a mask [Q], or one at random.
    """
    try:
        return _difference(in_float64(problem), plan, mask)
    except Exception as error:
        return f"the check of it raises {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def tensor_cores(problem: Problem, plan: Plan) -> Launch | str:
    """The launcher of the kernels of csrc/cuda, after a look at what they give; or why they aren't used."""
    if problem.device.type != "cuda":
        return "not on CUDA"
    if problem.config.precision != "bfloat16":
        return "they take bfloat16"
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "they need compute capability 8.0"
    missing = why_missing()
    if missing is not None:
        return missing
    launch = launcher(problem.device)
    return tensor_cores_differ(problem, plan, launch) or launch


def tensor_cores_differ(problem: Problem, plan: Plan, launch: Launch) -> str | None:
    """Where gradients of a few samples are far from those of the Triton kernels, in the run's own precision."""
    keys = lane_keys([problem.config.seed] * 2, [stream_of(None, lane) for lane in range(2)], problem.device)
    batch = few_samples(problem, keys)
    compact = Compact(problem.layout, problem.mask)
    weights = compact.compact(different_weights(problem)[:2]).to(problem.dtype)
    results = []
    try:
        for each in (None, launch):
            grads = torch.zeros_like(weights)
            way = CudaPrograms(problem, plan, compact, each).lanes(weights, grads)
            for module in way.modules:
                module.train()
            way.backward(batch, keys)
            results.append(grads)
    except Exception as error:
        return f"they raise {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
    expected, found = (compact.expand(each) for each in results)
    least = float(expected.norm()) * LEAST_SHARE
    for entry in problem.layout.prunable:
        own, other = (problem.layout.view(each, entry) for each in (expected, found))
        apart = float((other - own).norm()) / max(float(own.norm()), least)
        if not apart <= LOW_TOLERANCE:
            return f"the gradient of {entry.name} is {apart:.1%} away from that of the Triton kernels"
    return None


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
