"""What of swamp_fast is active on this machine, what is missing, and why."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def backends() -> dict[str, dict[str, Any]]:
    """A dict a backend: "cpp" (the CPU kernels), "triton", "cuda".

    Each has `active` (bool) and `why`; cpp also `instruction_set` and `available`, triton and cuda their versions.
    """
    return {"cpp": _cpp(), "triton": _triton(), "cuda": _cuda()}


def has_amx() -> bool:
    """Whether the processor has Intel's AMX: products of bfloat16 in tiles."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


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
        found = version("triton")
    except PackageNotFoundError:
        return {"active": False, "why": "the package triton is not installed (Linux: pip install triton)"}
    if not torch.cuda.is_available():
        return {
            "active": False,
            "why": "installed, but there is no CUDA device to run its kernels",
            "version": found,
        }
    return {"active": True, "why": "runs the ops on CUDA devices", "version": found}


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None and torch.version.hip is None:
        return {"active": False, "why": f"this torch ({torch.__version__}) is built without CUDA"}
    built = {"version": torch.version.cuda or torch.version.hip}
    if not torch.cuda.is_available():
        return {"active": False, "why": "torch has CUDA, but finds no device or driver here", **built}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"active": True, "why": ", ".join(names), **built}


def why_no_nvrtc() -> str | None:
    """Why kernels can't be compiled here; None if they can."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda-bindings, which torch's CUDA builds bring, is missing ({error})"
    try:
        (error_code,) = nvrtc.nvrtcVersion()[:1]
    except Exception as error:  # of a library that isn't found
        return f"NVRTC doesn't load ({str(error).splitlines()[0]})"
    return None if int(error_code) == 0 else f"NVRTC fails with {error_code}"
