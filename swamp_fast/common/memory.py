"""Measures the memory that a process has used and the memory that is free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

UNKNOWN_MEMORY = 4 << 30  # bytes assumed to be free if the system doesn't report it


def peak_memory(device: torch.device) -> int:
    """Return the peak number of bytes that torch has allocated on a GPU or, for the CPU, of this process's memory.

    Returns 0 on a system that doesn't report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def known_free_memory(device: torch.device) -> int | None:
    """Return the number of free bytes on a GPU or, for the CPU, the host; None on a system that doesn't report it.

    Caches that can be dropped count as free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return None


def free_memory(device: torch.device) -> int:
    """Return the number of free bytes as `known_free_memory` does, or an assumption if it isn't known."""
    known = known_free_memory(device)
    if known is not None:
        return known
    if hasattr(os, "sysconf"):  # macOS reports only the total memory, of which half is assumed to be free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return UNKNOWN_MEMORY
