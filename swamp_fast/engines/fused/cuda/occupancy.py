"""How many blocks of a kernel a GPU runs at once, and how to divide tiles among blocks so that no SM idles."""

from __future__ import annotations

import functools

import torch

from swamp_fast.engines.fused.cuda.nvrtc import THREADS_PER_BLOCK

# A processor is a streaming multiprocessor (SM). These are the numbers of an H100 or H200.
DEFAULT_PROCESSORS = 132  # assumed if there is no GPU
REGISTERS_PER_PROCESSOR = 64 * 1024
REGISTER_STEP = 8  # the registers of a thread are allocated in multiples of this number
SHARED_BYTES_PER_PROCESSOR = 228 * 1024
RESERVED_BYTES_PER_BLOCK = 1024  # shared memory that CUDA reserves for each block
BLOCK_START_COST = 1  # starting a block takes about as long as computing this many tiles


def processors(device: torch.device) -> int:
    """The number of processors (SMs) of a GPU, or DEFAULT_PROCESSORS if the device is not a GPU."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def blocks_at_once(registers: int, shared_bytes: int) -> int:
    """How many blocks one processor of an H100 runs at once.

    registers     per thread
    shared_bytes  bytes of shared memory per block
    """
    allotted = -(-registers // REGISTER_STEP) * REGISTER_STEP
    return min(REGISTERS_PER_PROCESSOR // (THREADS_PER_BLOCK * allotted), blocks_by_shared(shared_bytes))


def blocks_by_shared(shared_bytes: int) -> int:
    """How many blocks with `shared_bytes` bytes of shared memory each fit one processor of an H100."""
    return SHARED_BYTES_PER_PROCESSOR // (shared_bytes + RESERVED_BYTES_PER_BLOCK)


@functools.cache
def tiles_per_block(tiles: int, rows: int, at_once: int) -> int:
    """The number of tiles per block with which a launch is estimated to finish soonest.

    Blocks run in waves, and the last wave may leave most processors idle.

    tiles    tiles in one row; all tiles of a block are in the same row
    rows     the number of rows of tiles
    at_once  the number of blocks that the GPU runs at once
    """

    def time(block_tiles: int) -> int:
        blocks = rows * -(-tiles // block_tiles)
        waves = -(-blocks // at_once)
        return waves * (block_tiles + BLOCK_START_COST)

    return min(range(1, tiles + 1), key=time)
