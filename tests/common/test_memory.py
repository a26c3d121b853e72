"""Free and peak memory, which only one module measures."""

from __future__ import annotations

import os

import torch
from paths import ROOT

from swamp_fast.common.memory import free_memory, peak_memory

CPU = torch.device("cpu")


def test_free_and_peak_memory_are_parts_of_what_there_is():
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(CPU) < whole
    assert 0 < peak_memory(CPU) < whole


def test_one_place_asks_for_free_memory():
    """Two functions that measured free memory once gave 11.9 and 23.7 GB in the same process."""
    asking = {
        path.relative_to(ROOT).as_posix()
        for folder in ("swamp_fast", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if any(word in path.read_text() for word in ("mem_get_info", "MemAvailable", "SC_AVPHYS_PAGES"))
    }
    assert asking == {"swamp_fast/common/memory.py"}
