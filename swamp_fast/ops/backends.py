"""Reports which backends of swamp_fast are active on this machine, and why."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def backends() -> dict[str, dict[str, Any]]:
    """A description of each backend, by its name.

    "cpp"     the CPU kernels; the description also has `instruction_set`, `available` and `threads`
    "triton"  the GPU kernels of the ops and of the fused engine; also `version` if Triton is installed
    "cuda"    the GPUs that torch finds; also `version` if torch is built for GPUs
    "nvrtc"   the compiler of the fused engine's bfloat16 convolutions on NVIDIA GPUs

    Each description has `active` (bool) and `why`, the reason why the backend is active or not.
    """
    return {"cpp": _cpp(), "triton": _triton(), "cuda": _cuda(), "nvrtc": _nvrtc()}


def has_amx() -> bool:
    """Whether the processor has AMX, Intel's matrix instructions, which compute products of bfloat16 matrices."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def why_no_nvrtc() -> str | None:
    """The reason why NVRTC can't compile the kernels of csrc/cuda here; None if it can. Compiling needs no GPU."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-bindings, which torch's CUDA builds bring, is missing ({error})"
    try:
        (error_code,) = nvrtc.nvrtcVersion()[:1]
    except Exception as error:  # the shared library was not found
        return f"NVRTC doesn't load ({str(error).splitlines()[0]})"
    return None if int(error_code) == 0 else f"NVRTC fails with {error_code}"


def _cpp() -> dict[str, Any]:
    try:
        import swamp_fast._C as _C
    except ImportError as error:
        return {"active": False, "why": f"the extension swamp_fast._C is not built: {error}"}
    return {
        "active": True,
        "why": f"the widest of {', '.join(_C.available())} that this processor runs",
        "instruction_set": _C.active(),
        "available": _C.available(),
        "threads": torch.get_num_threads(),
    }


def _triton() -> dict[str, Any]:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return {"active": False, "why": "the package triton is not installed (Linux: pip install triton)"}
    if not torch.cuda.is_available():
        why = "installed, but there is no CUDA device to run its kernels"
        return {"active": False, "why": why, "version": installed}
    return {"active": True, "why": "runs the ops on CUDA devices", "version": installed}


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None and torch.version.hip is None:
        return {"active": False, "why": f"this torch ({torch.__version__}) is built without CUDA"}
    built = {"version": torch.version.cuda or torch.version.hip}
    if not torch.cuda.is_available():
        return {"active": False, "why": "torch has CUDA, but finds no device or driver here", **built}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"active": True, "why": ", ".join(names), **built}


def _nvrtc() -> dict[str, Any]:
    missing = why_no_nvrtc()
    if missing is not None:
        return {"active": False, "why": missing}
    if not torch.cuda.is_available():
        return {"active": False, "why": "installed, but there is no CUDA device to run what it compiles"}
    return {"active": True, "why": "compiles the fused engine's bfloat16 convolutions"}
