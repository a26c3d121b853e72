"""Checks a new machine with a GPU: versions, the extension, NVRTC, a launch of each kind, a captured graph.

    python -m benchmarks.gpu_probe [--rehearse]

Each check prints one line; if one fails, the others still run. --rehearse runs the checks that need no GPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.measuring import commit
from swamp_fast import backends, ops
from swamp_fast.common.memory import free_memory
from swamp_fast.common.timing import Stopwatch
from swamp_fast.engines.fused.check import tensor_cores_differ
from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.halo import Halo
from swamp_fast.ops import reference
from swamp_fast.ops.backends import why_no_nvrtc

PACKAGES = ["torch", "triton", "numpy", "safetensors", "cuda-bindings", "nvidia-cuda-nvrtc", "packaging", "pytest"]
PACKAGES += ["pytest-xdist", "hypothesis", "scikit-learn", "pillow", "setuptools", "pybind11"]
HALO = Halo(8, 8, 16, 16)


def versions() -> str:
    """List the versions of all software that other steps use."""
    names = []
    for name in PACKAGES:
        try:
            names.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            names.append(f"{name} missing")
    return f"commit {commit()}, Python {platform.python_version()}, {', '.join(names)}"


def active() -> str:
    """Report which backends swamp_fast uses on this machine."""
    return "; ".join(f"{name}: {backend['why']}" for name, backend in backends().items())


def extension() -> str:
    """Call a CPU kernel of the extension, and compare it with its reference."""
    keys = torch.arange(6).view(2, 3)
    if not torch.equal(ops.philox(keys, 3, 1001), reference.philox(keys, 3, 1001)):
        raise RuntimeError("philox differs from its reference")
    return "philox equals its reference"


def compiles() -> str:
    """Compile a kernel with NVRTC, which needs no GPU."""
    reason = why_no_nvrtc()
    if reason is not None:
        raise RuntimeError(reason)
    watch = Stopwatch()
    arch = "sm_90"
    if torch.cuda.is_available():
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    size = len(nvrtc.compile_kernel("weight_grad", HALO.weight_grad_constants(True)[0], arch))
    return f"{size} bytes for {arch} in {watch.seconds:.2f} s"


def device() -> str:
    """Report the GPU and its free memory."""
    free = free_memory(torch.device("cuda"))
    return f"{torch.cuda.get_device_properties(0)}, {free / 1e9:.1f} GB free"


def triton_kernel() -> str:
    """Launch a Triton kernel, and compare it with its reference."""
    keys = torch.arange(6).view(2, 3)
    if not torch.equal(ops.philox(keys.cuda(), 3, 1001).cpu(), reference.philox(keys, 3, 1001)):
        raise RuntimeError("philox differs from its reference")
    return "philox equals its reference"


def cuda_kernel() -> str:
    """Launch each kernel of csrc/cuda and compare it with Triton's."""
    gpu = torch.device("cuda", 0)
    difference = tensor_cores_differ([HALO], nvrtc.launcher(gpu), gpu)
    if difference is not None:
        raise RuntimeError(difference)
    return "equal to Triton's convolutions"


def captured() -> str:
    """Capture a Triton launch in a CUDA graph, and replay it."""
    keys, out = torch.arange(6).view(2, 3).cuda(), torch.zeros(2, 1001, dtype=torch.int64, device="cuda")

    def step() -> None:
        out.add_(ops.philox(keys, 3, 1001))

    warm_up_stream = torch.cuda.Stream()
    warm_up_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up_stream):
        step()
    torch.cuda.current_stream().wait_stream(warm_up_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.zero_()
    for _ in range(3):
        graph.replay()
    if not torch.equal(out.cpu(), 3 * reference.philox(keys.cpu(), 3, 1001).long()):
        raise RuntimeError("three replays differ from three steps")
    return "three replays equal three steps"


ANYWHERE: tuple[Callable[[], str], ...] = (versions, active, extension, compiles)
ON_GPU: tuple[Callable[[], str], ...] = (device, triton_kernel, cuda_kernel, captured)


def main() -> None:
    """Run the checks. The exit status is 1 if any check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run only the checks that need no GPU")
    given = parser.parse_args()
    from_cache: Counter[bool] = Counter()
    if not given.rehearse:
        from triton import knobs

        knobs.compilation.listener = lambda *, cache_hit, **_: from_cache.update([cache_hit])
    failed = []
    for check in ANYWHERE if given.rehearse else (*ANYWHERE, *ON_GPU):
        watch = Stopwatch()
        try:
            report = check()
        except Exception as error:
            traceback.print_exc()
            failed.append(check.__name__)
            report = f"failed: {type(error).__name__}: {error}"
        print(f"{check.__name__}: {report} ({watch.seconds:.1f} s)", flush=True)
    if failed:
        sys.exit(f"benchmarks.gpu_probe: {', '.join(failed)} failed")
    if given.rehearse:
        print(f"needs a GPU: {', '.join(check.__name__ for check in ON_GPU)}")
    else:
        print(f"Triton: {from_cache[True]} kernels from the cache, {from_cache[False]} compiled")


if __name__ == "__main__":
    main()
