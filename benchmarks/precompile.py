"""Compiles without a GPU: `machine_code --fill` fills the caches that a process with a GPU will read.

FOLDER/triton   Triton's cache (TRITON_CACHE_DIR); for Triton up to 3.6 also the C modules that launch its kernels
FOLDER/cubins   the kernels of csrc/cuda (SWAMP_FAST_CACHE)
FOLDER/_C.*.so  the extension, for another Python
FOLDER/.commit  the commit from which all of this was made

Triton's cache key contains the versions of Triton and ptxas and a kernel's source, specialisation and options, but no
path. To compile the right specialisations, launchers are called with the arguments of a real step, with CPU tensors in
place of the GPU's. No kernel is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.first_contact import NOT_CARRIED, relocate
from benchmarks.measuring import ROOT, commit
from benchmarks.steps import problem_of
from swamp_fast import ops
from swamp_fast.engines.fused.check import differs_from_autograd, tensor_cores_differ
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.params import Params
from swamp_fast.engines.fused.cuda.runner import CudaPrograms, lanes_in_cache
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.trainer import first_handle
from swamp_fast.ops.backends import why_no_nvrtc
from swamp_fast.ops.contracts import triton_kernels
from swamp_fast.problem.problem import Problem
from swamp_fast.problem.solutions import initial

GPU = torch.device("cuda", 0)
L2_CACHE_BYTES = 50 << 20  # size of the L2 cache of an H100 and an H200, which decides the lanes per branch


class NamedTarget:
    """The part of a Triton driver that is needed to compile."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(arch: str, on_kernel: Callable[[Any, Any, Any, Any], None] | None = None) -> Iterator[None]:
    """A context in which Triton's launches only compile, for an `arch` such as "sm_90" or "gfx942", and run nothing.

    on_kernel(function, arguments, named arguments, compiled kernel) is called at each launch.

    Raises RuntimeError if this process interprets Triton, because then it can't compile.
    """
    from swamp_fast.kernels import masked_sgd
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if not isinstance(masked_sgd.masked_sgd_kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: unset it to compile the kernels.")
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    before, run = driver._active, JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if on_kernel is not None:
            on_kernel(self, args, kwargs, kernel)
        return kernel

    driver.set_active(NamedTarget(target))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = before


class OnGpu(Problem):
    """A problem that claims to be on a GPU, while its tensors are on the CPU."""

    device = GPU


class _Factories(TorchFunctionMode):
    """A mode in which tensors that are created on the GPU, or moved there, are on the CPU instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


class _Ops(TorchDispatchMode):
    """A mode in which this project's ops launch their Triton kernels although their tensors are on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "swamp_fast":
            return func(*args, **(kwargs or {}))
        return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))


class _Compile:
    """Replaces the launcher of the csrc/cuda kernels: compiles a kernel instead of launching it."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def __call__(
        self,
        name: str,
        constants: nvrtc.Constants,
        grid: tuple[int, int, int],
        shared_bytes: int,
        params: Params,
    ) -> None:
        """Compile the kernel that nvrtc.Launch would launch with these arguments."""
        nvrtc.compile_kernel(name, constants, self.arch)


def fill(
    folder: Path, arch: str, models: Sequence[str], particles: Sequence[int], batch: int, precisions: Sequence[str]
) -> dict[str, int]:
    """Compile the kernels that a run launches, for each model, number of particles and precision.

    They are those of the fused engine's checks before the first step, of a step, and of the end of a cycle. Returns how
    many kernels were found in the folder and how many were compiled. Raises RuntimeError if the fused engine doesn't
    cover a model.
    """
    from triton import knobs

    missing = why_no_nvrtc()
    if missing is not None and "bfloat16" in precisions:
        raise RuntimeError(f"the CUDA kernels can't be compiled here: {missing}.")
    folder = folder.resolve()
    os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "SWAMP_FAST_CACHE": str(folder / "cubins")}
    relocate(folder / "triton")
    count = {"triton_found": 0, "triton_compiled": 0}

    def seen(*, cache_hit: bool, **_: object) -> None:
        count["triton_found" if cache_hit else "triton_compiled"] += 1

    kernels: dict[str, Any] = {}

    def keep(function: Any, args: Any, kwargs: Any, kernel: Any) -> None:
        kernels[kernel.hash] = kernel

    cubins = len(list((folder / "cubins").glob("*.cubin")))
    with mock.patch.object(knobs.compilation, "listener", seen), compiling(arch, keep):
        for model in models:
            for precision in precisions:
                _fill(arch, model, particles, batch, precision)
    _build_launchers(kernels.values())
    for path in (folder / "triton").rglob("*"):
        if path.suffix in NOT_CARRIED:
            path.unlink()
    relocate(folder / "triton")
    (folder / ".commit").write_text(commit() + "\n")
    now = len(list((folder / "cubins").glob("*.cubin")))
    return {**count, "cubins_found": cubins, "cubins_compiled": now - cubins}


def _fill(arch: str, model: str, particles: Sequence[int], batch: int, precision: str) -> None:
    tensor_cores = _Compile(arch) if precision == "bfloat16" else None
    for place, count in enumerate(particles):
        made = problem_of(model, count, batch, precision=precision)
        problem = OnGpu(**{field.name: getattr(made, field.name) for field in dataclasses.fields(made)})
        with _Factories(), _Ops(), mock.patch.object(CudaPrograms, "measure"):  # type: ignore[no-untyped-call]
            plan = fused_plan(problem)
            if not isinstance(plan, Plan):
                raise RuntimeError(f"the fused engine doesn't cover {model}: {plan}")
            if place == 0:
                _checks(problem, plan, tensor_cores)
            _cycle(problem, plan, count, tensor_cores)


def _checks(problem: Problem, plan: Plan, launch: nvrtc.Launch | None) -> None:
    """Run the fused engine's checks before its first step. Their results are ignored, because no kernel runs."""
    differences = [differs_from_autograd(problem, plan)]
    if launch is not None:
        halos = CudaPrograms(problem, plan, problem.mask, launch).program.halos.values()
        differences += [
            tensor_cores_differ([halo], launch, GPU) for halo in halos
        ]  # one per call, because a call ends at its first difference
    for difference in differences:
        if difference is not None and "differ from" not in difference:
            raise RuntimeError(difference)


def _cycle(problem: Problem, plan: Plan, particles: int, launch: nvrtc.Launch | None) -> None:
    """Launch what a cycle launches: a step with all lanes together and one in branches, and the cycle's evaluation."""
    engine = FusedEngine(problem, plan, "", {}, launch)
    bank = engine.spawn(initial(problem), problem.mask, range(particles), 1)
    trainer, programs = engine.trainer, engine.programs
    assert trainer is not None
    assert isinstance(programs, CudaPrograms)
    for module in trainer.runner.modules:
        module.train()
    handle = first_handle(problem, bank)
    itemsize = 2 if problem.config.precision == "bfloat16" else problem.dtype.itemsize
    for lanes in (None, lanes_in_cache(plan, problem.bounds[0][1], itemsize, L2_CACHE_BYTES)):
        programs.at_once = lanes
        trainer._step(handle)
    weights, keys = bank.solutions(averaged=True), bank.keys
    mean = ops.particle_mean(weights, bank.run_of_lane, 1)
    buffers = {name: torch.cat([each, each[:1]]) for name, each in trainer.runner.buffers().items()}
    runner = engine.side_by_side(torch.cat([weights, mean]), buffers)
    inputs, _ = problem.train.fetch(handle, None).lane(0)
    for trains in (True, False):  # training mode re-estimates BatchNorm, eval mode evaluates the models
        for module in runner.modules:
            module.train(trains)
        runner.outputs(inputs, torch.cat([keys, keys[-1:]]))
    masks = problem.mask[None]
    triton_kernels("global_threshold").global_threshold(mean[:, : masks.shape[1]], masks, masks.sum(1))


def _build_launchers(kernels: Iterable[Any]) -> None:
    """Build the C modules that Triton up to 3.6 builds at a kernel's first launch, which takes about a second each."""
    from triton import knobs
    from triton.backends.nvidia import driver
    from triton.runtime import build

    if not hasattr(driver, "compile_module_from_src"):
        return
    with tempfile.TemporaryDirectory() as stub, mock.patch.object(build, "_load_module_from_path"):
        # Only the GPU's machine has the driver's library. An empty library of the same name suffices to link against.
        library = ["-o", f"{stub}/libcuda.so.1", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", *library], check=True)
        with knobs.nvidia.scope():
            knobs.nvidia.libcuda_path = stub
            driver.libcuda_dirs.cache_clear()
            driver.library_dirs.cache_clear()
            driver.CudaUtils()
            for kernel in kernels:
                driver.CudaLauncher(kernel.src, kernel.metadata)


def build_extension(folder: Path, python: str) -> Path:
    """Build the extension swamp_fast._C for another Python, without symbols, unless it is newer than its sources."""
    tag = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    extension = folder / f"_C{tag}"
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc" / "cpu").rglob("*") if path.is_file())]
    if extension.exists() and extension.stat().st_mtime >= max(path.stat().st_mtime for path in sources):
        return extension
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", made, str(ROOT)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (wheel,) = Path(made).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extension.write_bytes(archive.read(f"swamp_fast/_C{tag}"))
    subprocess.run(["strip", str(extension)], check=True)
    return extension
