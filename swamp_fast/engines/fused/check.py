"""The self-check of the fused engine before the first step: forward, gradients and statistics against autograd's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from swamp_fast.engines.eager.check import close, different_weights, few_samples, in_float64
from swamp_fast.engines.eager.lane_by_lane import LaneByLane
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.runner import CpuLanes
from swamp_fast.engines.fused.cuda.halo import MAX_BLOCKS_PER_LANE, Halo, Prologue, Statistics
from swamp_fast.engines.fused.cuda.nvrtc import Launch, launcher
from swamp_fast.engines.fused.cuda.runner import CudaLanes, CudaPrograms
from swamp_fast.engines.fused.engine import programs_of
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.ops.backends import why_no_nvrtc
from swamp_fast.ops.contracts import triton_kernels
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.problem.problem import Problem

KEPT = 0.5  # of the weights, at random, besides a mask of all
TOLERANCE = 1e-9
EPS = 1e-5
LOW_TOLERANCE = 2**-6  # of bfloat16 results of one convolution, relative to 1 and the largest: a rounding is 2^-9
# Of its gradients, relative to the largest alone, however small that is: two right sums beside the middle between two
# bfloat16 numbers become those, which are at most 2^-7 of the larger apart.
GRADIENT_TOLERANCE = 2**-7


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
    missing = why_no_nvrtc()
    if missing is not None:
        return missing
    launch = launcher(problem.device)
    program = CudaPrograms(problem, plan, problem.mask, launch).program
    return tensor_cores_differ(program.halos.values(), launch, problem.device) or launch


def tensor_cores_differ(halos: Iterable[Halo], launch: Launch, device: torch.device) -> str | None:
    """Where the kernels of csrc/cuda differ from Triton's on random maps; None if nowhere.

    One convolution at a time: through a whole network two right ways to sum end far apart.
    """
    for halo in dict.fromkeys(halos):
        try:
            found = _of_halo(halo, launch, device)
            expected = _of_halo(halo, None, device)
        except Exception as error:
            return f"they raise {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
        names = ("outputs", "gradients by the input", "gradients by the weights", "statistics")
        for what, own, other in zip(names, found, expected, strict=True):
            is_gradient = what.startswith("gradients")
            tolerance, floor = (GRADIENT_TOLERANCE, 0.0) if is_gradient else (LOW_TOLERANCE, 1.0)
            if not close(own, other, tolerance, floor):
                return f"their {what} differ from those of the Triton kernels: {halo}"
    return None


def _of_halo(halo: Halo, launch: Launch | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A convolution between norms, its gradients and its statistics, by csrc/cuda, or without a launcher by Triton."""
    lanes, samples, inputs, outputs = 2, halo.pictures + 1, halo.inputs, halo.outputs
    if device.type == "cuda":  # as many blocks as arrive at the statistics of a large batch
        samples = max(samples, -(-MAX_BLOCKS_PER_LANE * halo.pictures * halo.rows // halo.height))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    source = normal(lanes, samples, halo.height, halo.width, inputs).bfloat16()
    out_grad = normal(lanes, samples, halo.height, halo.width, outputs).bfloat16()
    weights = (normal(lanes, 9, inputs, outputs) / (9 * inputs) ** 0.5).bfloat16()
    scale, offset = normal(lanes, inputs), normal(lanes, inputs)
    dense = torch.cat([weights.flatten(1), weights.transpose(2, 3).flatten(1)], 1)
    size, parts = 9 * inputs * outputs, halo.parts(samples)
    out, in_grad = torch.empty_like(out_grad), torch.empty_like(source)
    partial = torch.empty(lanes, parts * size, dtype=torch.float32, device=device)
    found = torch.empty(4, lanes, outputs, dtype=torch.float32, device=device)
    norm_weights = normal(lanes, 2 * outputs)
    arrivals = torch.zeros(lanes, outputs, dtype=torch.int32, device=device)
    to = Statistics(found[0], found[1], found[2], found[3], 0, norm_weights, 0, outputs, EPS, arrivals)
    if launch is not None:
        prologue = Prologue(scale, offset, 0)
        halo.convolve(launch, source, prologue, dense, 0, None, out, False, False, to)
        halo.convolve(launch, out_grad, None, dense, size, None, in_grad, True, False, None)
        halo.weight_grad(launch, source, prologue, out_grad, partial, 0)
    else:
        kernels, window = triton_kernels("convolution"), ((3, 3), 1, (1, 1), (1, 1), 1)
        scale, offset = (each[:, None, None, None] for each in (scale, offset))
        source = torch.relu(source * scale + offset).bfloat16()
        kernels.convolve(source, dense, 0, None, 0, out, window, False, False, to, "ieee")
        kernels.convolve(out_grad, dense, size, None, 0, in_grad, window, True, False, None, "ieee")
        kernels.weight_grad(source, out_grad, partial, 0, parts, window, "ieee")
    return out.double(), in_grad.double(), partial.view(lanes, parts, -1).double().sum(1), found.double()


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
            width = compact.P if fused else problem.layout.P
            grads = torch.zeros(lanes, width, dtype=torch.float64, device=problem.device)
            way: CpuLanes | CudaLanes | LaneByLane
            if fused:
                programs = programs_of(problem, plan, mask, {})
                way = programs.lanes(programs.compact.compact(weights), grads)
            else:
                way = LaneByLane(problem, weights.clone(), grads, False)
            for module in way.modules:
                module.train()
            found: dict[str, Tensor] = {"losses": way.backward(batch, keys)}
            found["gradients"] = compact.compact(programs.compact.expand(grads) if fused else grads)
            found |= {f"buffer {name}": buffer.clone() for name, buffer in way.buffers().items()}
            for module in way.modules:
                module.eval()
            with torch.no_grad():
                found["outputs"] = torch.stack(way.outputs(batch.lane(0)[0], keys))
            results.append(found)
    skips = isinstance(programs, CudaPrograms) and programs.columns is not None  # statistics of dead channels
    for name, expected in results[0].items():
        if skips and name.endswith(("running_mean", "running_var")):
            continue
        if not close(results[1][name], expected, TOLERANCE):
            return f"its {name} differ from autograd's"
    return None
