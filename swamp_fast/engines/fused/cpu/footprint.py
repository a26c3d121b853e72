"""The memory of a program of the CPU kernels, found by planning the program without allocating its maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swamp_fast.engines.fused.compact import Compact
from swamp_fast.engines.fused.cpu.convolution import parts_of
from swamp_fast.engines.fused.cpu.program import Program
from swamp_fast.engines.fused.cpu.taps import MAX_CHUNK_SUMS, SAMPLES_PER_BLOCK
from swamp_fast.engines.fused.plan import Convolution, Plan
from swamp_fast.particles.layout import Layout

INDEX_BYTES = 8  # per weight in the taps of a pass: its offset and its place
BUILDING_BYTES = 60  # per weight while the taps of its convolution are made: masks, places and offsets in int64


def building_bytes(plan: Plan, layout: Layout) -> int:
    """The bytes that are needed only while a program is made, besides the program's own."""
    return BUILDING_BYTES * max(_sizes(plan, layout))


def program_bytes(
    plan: Plan, layout: Layout, samples: int, dtype: torch.dtype, storage: torch.dtype, trains: bool
) -> int:
    """The bytes of a program for batches of `samples` at density 1.

    The maps are counted in a program planned for a mask that keeps no weights, because its taps take no time to make.
    """
    nothing = Compact(layout, torch.zeros(layout.Q, dtype=torch.bool))
    rows = {op.weight: [1, 1, 1] for op in plan.ops if isinstance(op, Convolution)}
    program = Program(plan, nothing, samples, dtype, storage, rows, trains, allocate=_no_memory)
    maps = sum(each.bytes for each in program.workspace.maps)
    sizes, item = _sizes(plan, layout), dtype.itemsize
    inputs = max(math.prod(entry.shape[1:]) for entry in layout.entries)
    of_weight = INDEX_BYTES + 2 * (INDEX_BYTES + item) if trains else INDEX_BYTES
    partial = sum(_grown([parts_of(size) * size for size in reversed(sizes)])) if trains else 0
    scratch = (MAX_CHUNK_SUMS + inputs) * torch.get_num_threads() * SAMPLES_PER_BLOCK
    return maps + of_weight * sum(sizes) + item * (partial + scratch + 2 * layout.P)


def _sizes(plan: Plan, layout: Layout) -> list[int]:
    """The number of weights of each convolution, in order."""
    sizes = {entry.name: entry.size for entry in layout.entries}
    return [sizes[op.weight] for op in plan.ops if isinstance(op, Convolution)]


def _grown(sizes: list[int]) -> list[int]:
    """The sizes for which a shared buffer, which never shrinks, is allocated anew. Calls hold the earlier buffers."""
    return [size for place, size in enumerate(sizes) if size > max(sizes[:place], default=0)]


def _no_memory(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)
