"""The self-checks that the fused engine runs before its first step.

A plan's outputs, gradients and running statistics are compared with autograd's. The results of the CUDA kernels in
csrc/cuda are compared with those of the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from swamp_fast.common.format import described
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cuda.halo import MAX_BLOCKS_PER_LANE, Halo, Prologue, Statistics
from swamp_fast.engines.fused.cuda.nvrtc import Launch, launcher
from swamp_fast.engines.fused.cuda.runner import CudaPrograms
from swamp_fast.engines.fused.engine import programs_of
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.engines.self_check import (
    check_keys,
    close,
    different_weights,
    few_samples,
    in_float64,
    results_of,
)
from swamp_fast.ops.backends import why_no_nvrtc
from swamp_fast.ops.contracts import triton_kernels
from swamp_fast.particles.random import generators_left_alone
from swamp_fast.problem.problem import Problem

CHECKED_LANES = 2
MASK_DENSITY = 0.5  # density of the random mask that a plan is checked with
EPS = 1e-5
# The tolerance for a convolution's bfloat16 outputs, relative to 1 + their largest magnitude. One rounding to bfloat16
# changes a number by at most 2^-9 of its size.
BFLOAT16_TOLERANCE = 2**-6
# The tolerance for a convolution's gradients, relative to their largest magnitude, however small it is. Two correct
# sums may be rounded to neighbouring bfloat16 numbers, which differ by at most 2^-7 of the larger one.
GRADIENT_TOLERANCE = 2**-7


def differs_from_autograd(problem: Problem, plan: Plan, mask: Tensor | None = None) -> str | None:
    """Return the reason why a plan's results are wrong, or None if they agree with autograd's.

    The comparison runs on a few samples in float64.

    mask  [Q]  the mask to use; a random mask by default
    """
    try:
        return _difference(in_float64(problem), plan, mask)
    except Exception as error:
        return f"its self-check raises {described(error)}"


def _difference(problem: Problem, plan: Plan, mask: Tensor | None) -> str | None:
    keys = check_keys(problem, CHECKED_LANES)
    batch = few_samples(problem, keys)
    if mask is None:
        drawn = torch.rand(problem.mask.shape, generator=torch.Generator().manual_seed(0))
        mask = problem.mask & (drawn < MASK_DENSITY).to(problem.device)
    compact = Compact(problem.layout, mask)
    weights = compact.expand(compact.compact(different_weights(problem)[:CHECKED_LANES]))
    with generators_left_alone():
        grads = torch.zeros_like(weights)
        expected = results_of(LaneByLane(problem, weights.clone(), grads, False), grads, batch, keys)
        programs = programs_of(problem, plan, mask, {})
        compact_weights = programs.compact.compact(weights)
        compact_grads = torch.zeros_like(compact_weights)
        results = results_of(programs.lanes(compact_weights, compact_grads), compact_grads, batch, keys)
    # Autograd computes gradients for pruned weights too, so only those of the kept weights are compared.
    expected["gradients"] = compact.compact(expected["gradients"])
    results["gradients"] = compact.compact(programs.compact.expand(compact_grads))
    expected_buffers, buffers = expected.pop("buffers"), results.pop("buffers")
    if isinstance(programs, CudaPrograms) and programs.columns is not None:  # not updated for dead channels
        expected_buffers = {
            name: buffer
            for name, buffer in expected_buffers.items()
            if not name.endswith(("running_mean", "running_var"))
        }
    expected |= {f"buffer {name}": buffer for name, buffer in expected_buffers.items()}
    results |= {f"buffer {name}": buffer for name, buffer in buffers.items()}
    for name, value in expected.items():
        if not close(results[name], value):
            return f"its {name} differ from autograd's"
    return None


def tensor_cores(problem: Problem, plan: Plan) -> Launch | str:
    """Return the launcher of the CUDA kernels in csrc/cuda if they pass their check, or the reason not to use them."""
    if problem.device.type != "cuda":
        return "not on CUDA"
    if problem.config.precision != "bfloat16":
        return "they need bfloat16"
    if torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "they need compute capability 8.0"
    missing = why_no_nvrtc()
    if missing is not None:
        return missing
    launch = launcher(problem.device)
    program = CudaPrograms(problem, plan, problem.mask, launch).program
    return tensor_cores_differ(program.halos.values(), launch, problem.device) or launch


def tensor_cores_differ(halos: Iterable[Halo], launch: Launch, device: torch.device) -> str | None:
    """Return which result of the CUDA kernels differs from the Triton kernels' result on random data, or None.

    Each convolution is compared alone, because rounding differences between two correct kernels grow over a network.
    """
    for halo in dict.fromkeys(halos):
        try:
            results = _of_halo(halo, launch, device)
            expected = _of_halo(halo, None, device)
        except Exception as error:
            return f"they raise {described(error)}"
        names = ("outputs", "input gradients", "weight gradients", "statistics")
        for name, ours, tritons in zip(names, results, expected, strict=True):
            is_gradient = name.endswith("gradients")
            tolerance, floor = (GRADIENT_TOLERANCE, 0.0) if is_gradient else (BFLOAT16_TOLERANCE, 1.0)
            if not close(ours, tritons, tolerance, floor):
                return f"their {name} differ from those of the Triton kernels: {halo}"
    return None


def _of_halo(halo: Halo, launch: Launch | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs, input gradients, weight gradients and statistics of a convolution that stands between two norms.

    launch  launches the CUDA kernels; None computes the same with the Triton kernels
    """
    lanes, samples, inputs, outputs = 2, halo.pictures + 1, halo.inputs, halo.outputs
    if device.type == "cuda":  # enough samples that as many blocks merge their statistics as for a large batch
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
    mean, variance, norm_scale, norm_offset = measured = torch.empty(
        4, lanes, outputs, dtype=torch.float32, device=device
    )
    norm_weights = normal(lanes, 2 * outputs)
    arrivals = torch.zeros(lanes, outputs, dtype=torch.int32, device=device)
    to = Statistics(mean, variance, norm_scale, norm_offset, 0, norm_weights, 0, outputs, EPS, arrivals)
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
    return out.double(), in_grad.double(), partial.view(lanes, parts, -1).double().sum(1), measured.double()
