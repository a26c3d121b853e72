"""How many blocks of a kernel a GPU runs at once, and how to divide tiles among blocks so that no processor idles."""

from __future__ import annotations

import functools

import torch

from swamp_fast.engines.fused.cuda.nvrtc import THREADS_PER_BLOCK

DEFAULT_PROCESSORS = 132  # of an H100 or H200, which is planned for where there is no GPU
REGISTERS_PER_PROCESSOR = 64 * 1024  # of one processor
REGISTER_STEP = 8  # the hardware allots the registers of a thread in multiples of this
SHARED_BYTES_PER_PROCESSOR = 228 * 1024  # shared memory of one processor
RESERVED_BYTES_PER_BLOCK = 1024  # of it, taken by the system for each block
BLOCK_START_COST = 1  # the start of a block costs about as much time as this many tiles


def processors(device: torch.device) -> int:
    """The number of processors (SMs) of a GPU; without a GPU, of the one that is planned for."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def blocks_at_once(registers: int, shared_bytes: int) -> int:
    """How many blocks one processor of an H100 holds, by the registers of a thread and a block's shared memory."""
    allotted = -(-registers // REGISTER_STEP) * REGISTER_STEP
    return min(REGISTERS_PER_PROCESSOR // (THREADS_PER_BLOCK * allotted), blocks_by_shared(shared_bytes))


def blocks_by_shared(shared_bytes: int) -> int:
    """How many blocks the shared memory of one processor of an H100 is enough for."""
    return SHARED_BYTES_PER_PROCESSOR // (shared_bytes + RESERVED_BYTES_PER_BLOCK)


@functools.cache
def tiles_per_block(tiles: int, rows: int, at_once: int) -> int:
    """How many tiles each block computes so that all are done soonest.

    Blocks run in waves, and the last wave may leave most processors idle.

    tiles    in one row; a block takes tiles of one row only
    rows     how many rows of tiles there are
    at_once  how many blocks the GPU runs at once
    """

    def time(block_tiles: int) -> int:
        blocks = rows * -(-tiles // block_tiles)
        waves = -(-blocks // at_once)
        return waves * (block_tiles + BLOCK_START_COST)

    return min(range(1, tiles + 1), key=time)
