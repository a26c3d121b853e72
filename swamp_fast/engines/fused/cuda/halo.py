"""The 3x3 convolutions that csrc/cuda runs: which ones, with which constants, over which grid."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swamp_fast.engines.fused.cuda.nvrtc import THREADS, Launch
from swamp_fast.engines.fused.plan import Convolution, Shape

PIXELS = 256  # of a tile
PAD = 8  # as csrc/cuda/tile.h
MAX_BLOCKS_PER_LANE = 64  # of a convolution of one lane with statistics, if there are as many tiles
MOST_TILES = 8  # that a block of it takes
STARTED = 1  # tiles, whose time the beginning of a block takes about
PROCESSORS = 132  # of an H100 or H200, which is planned for where there is no GPU
REGISTERS, SHARED = 64 * 1024, 228 * 1024  # of a processor, and bytes; each block takes RESERVED of them besides
RESERVED = 1024
PARTS = 32  # of a weight gradient, at most
PART_TILES = 8
LEAST_BLOCKS = 16  # of a weight gradient of one lane, if there are as many tiles
MOST_OUT = 64  # channels that a block of a convolution gives
MOST_OUT_WITH_MORE = 32  # with statistics or a prologue, which take registers
QUADRANTS = 8  # of 16 by 16 weights that a block of a weight gradient gives, at most
MOST_SHARED = 99 * 1024  # bytes: what every GPU from sm_80 on has


@dataclass(frozen=True)
class Prologue:
    """BatchNorm and ReLU at the load: scale and offset [L, channels of all norms], and the norm's first channel."""

    scale: Tensor
    offset: Tensor
    first: int


@dataclass(frozen=True)
class Statistics:
    """Where a map's statistics go, once the last block has come: [L, channels of all norms], at the norm's first.

    mean, variance  of the batch, biased
    scale, offset   of the norm as in * scale + offset
    weights         a bank [L, P'] with the norm's weight at first_weight and its bias at first_bias; -1 for none
    arrivals        [L, ...] int32, zeros before and after: how many blocks have come
    """

    mean: Tensor
    variance: Tensor
    scale: Tensor
    offset: Tensor
    first: int
    weights: Tensor
    first_weight: int
    first_bias: int
    eps: float
    arrivals: Tensor


@dataclass(frozen=True)
class Halo:
    """A convolution of L lanes over pictures of one size, and its gradients. Its kernels are csrc/cuda's.

    Maps are bfloat16 [L, B, H, W, C]; weights stand in dense rows as dense.py lays them out.
    """

    height: int
    width: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, op: Convolution, kernel: tuple[int, int], source: Shape, out: Shape) -> Halo | None:
        """The convolution of a plan, if the kernels cover it."""
        if len(source) != 3 or kernel != (3, 3):
            return None
        channels, height, width = source
        plain = (op.stride, op.padding, op.dilation, op.groups) == (1, (1, 1), (1, 1), 1)
        whole = all(size & (size - 1) == 0 for size in (height, width)) and 2 <= width <= PIXELS and height >= 2
        if not (plain and whole and channels % 16 == 0 and out[0] % 16 == 0):
            return None
        return cls(height, width, channels, out[0])

    @property
    def rows(self) -> int:
        """Of a tile, in one picture."""
        return self.height if self.height * self.width < PIXELS else PIXELS // self.width

    @property
    def pictures(self) -> int:
        """Of a tile."""
        return PIXELS // (self.rows * self.width)

    def tiles(self, samples: int) -> int:
        """Of a batch of one lane."""
        return -(-samples // self.pictures) * (self.height // self.rows)

    def block_tiles(self, samples: int) -> int:
        """That a block of a convolution with statistics takes; by the sizes alone, so that bits are too."""
        return max(1, min(MOST_TILES, self.tiles(samples) // MAX_BLOCKS_PER_LANE))

    def parts(self, samples: int) -> int:
        """Of a weight gradient; by the sizes alone, so that bits are too."""
        tiles, constants = self.tiles(samples), self.weight_grad_constants(False)[0]
        blocks = self.inputs * self.outputs // (constants["BLOCK_IN"] * constants["BLOCK_OUT"])
        return min(PARTS, tiles, max(tiles // PART_TILES, -(-LEAST_BLOCKS // blocks)))

    def convolve(
        self,
        launch: Launch,
        source: Tensor,
        prologue: Prologue | None,
        weights: Tensor,
        first: int,
        bias: tuple[Tensor, int] | None,
        out: Tensor,
        by_input: bool,
        accumulate: bool,
        to: Statistics | None,
    ) -> None:
        """Convolve relu(source * scale + offset), or of the source; by the input, of the output's gradient.

        weights  dense rows [L, T], this layer's at `first`
        bias     a bank [L, P'] and where this layer's begins
        to       where the statistics of `out` go
        """
        outputs = self.inputs if by_input else self.outputs
        constants, shared = self.convolve_constants(
            by_input, prologue is not None, bias is not None, accumulate, to is not None
        )
        lanes, samples = source.shape[:2]
        tiles, columns = self.tiles(samples), outputs // constants["BLOCK_OUT"]
        if to is not None:
            block_tiles = self.block_tiles(samples)
        else:  # no bit depends on it
            at_once = processors(out.device) * min(constants["MIN_BLOCKS"], blocks_by_shared(shared))
            block_tiles = in_waves(tiles, columns * lanes, at_once)
        blocks = -(-tiles // block_tiles)
        scratch = None if to is None else torch.empty(2, lanes, blocks, outputs, dtype=torch.float32, device=out.device)
        launch(
            "convolve",
            constants,
            (blocks, columns, lanes),
            shared,
            [
                *(_address(source), _address(weights, first), _long(weights.stride(0))),
                *_prologue(prologue),
                *((_address(None), _long(0)) if bias is None else (_address(*bias), _long(bias[0].stride(0)))),
                *(_address(out), _int(samples), _int(tiles), _int(block_tiles)),
                *(_address(scratch), *_statistics(to)),
            ],
        )

    def convolve_constants(
        self, by_input: bool, prologue: bool, bias: bool, accumulate: bool, statistics: bool
    ) -> tuple[dict[str, int], int]:
        """What is compiled in, and the bytes of shared memory."""
        inputs, outputs = (self.outputs, self.inputs) if by_input else (self.inputs, self.outputs)
        most = MOST_OUT_WITH_MORE if statistics or prologue else MOST_OUT
        block, chunk = next(
            (block, chunk)
            for block in range(most, 0, -16)
            for chunk in (64, 32, 16)
            if outputs % block == 0 and inputs % chunk == 0 and self._shared(inputs, chunk, block) <= MOST_SHARED
        )
        constants = {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "IN": inputs,
            "OUT": outputs,
            "BLOCK_OUT": block,
            "CHUNK": chunk,
            "BY_INPUT": int(by_input),
            "PROLOGUE": int(prologue),
            "HAS_BIAS": int(bias),
            "ACCUMULATE": int(accumulate),
            "STATISTICS": int(statistics),
        }
        constants["MIN_BLOCKS"] = _convolve_blocks(constants)
        return constants, self._shared(inputs, chunk, block)

    def weight_grad(
        self,
        launch: Launch,
        source: Tensor,
        prologue: Prologue | None,
        out_grad: Tensor,
        partial: Tensor,
        first: int,
    ) -> None:
        """The gradient by the weights in parts: [parts, 9, inputs, outputs] at `first` of a row of partial [L, ...]."""
        constants, shared = self.weight_grad_constants(prologue is not None)
        lanes, samples = source.shape[:2]
        blocks = (self.inputs // constants["BLOCK_IN"]) * (self.outputs // constants["BLOCK_OUT"])
        launch(
            "weight_grad",
            constants,
            (self.parts(samples), blocks, lanes),
            shared,
            [
                *(_address(source), *_prologue(prologue), _address(out_grad)),
                *(_address(partial, first), _long(partial.stride(0)), _int(9 * self.inputs * self.outputs)),
                *(_int(samples), _int(self.tiles(samples))),
            ],
        )

    def weight_grad_constants(self, prologue: bool) -> tuple[dict[str, int], int]:
        """As convolve_constants."""
        sizes = [
            (block_in, block_out)
            for block_in in (16, 32, 64, 128)
            for block_out in (16, 32, 64, 128)
            if self.inputs % block_in == 0 and self.outputs % block_out == 0
            if block_in * block_out <= QUADRANTS * 256 and self._weight_grad_shared(block_in, block_out) <= MOST_SHARED
        ]
        block_in, block_out = max(sizes, key=lambda each: (each[0] * each[1], -each[0]))
        constants = {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "IN": self.inputs,
            "OUT": self.outputs,
            "BLOCK_IN": block_in,
            "BLOCK_OUT": block_out,
            "PROLOGUE": int(prologue),
            "MIN_BLOCKS": 2 if block_in * block_out == 256 or (block_in * block_out <= 1024 and not prologue) else 1,
        }
        return constants, self._weight_grad_shared(block_in, block_out)

    @property
    def _halo_pixels(self) -> int:
        return self.pictures * (self.rows + 2) * (self.width + 2)

    def _weight_grad_shared(self, block_in: int, block_out: int) -> int:
        maps = 2 * (self._halo_pixels * (block_in + PAD) + PIXELS * (block_out + PAD))
        return max(maps, 0 if block_in * block_out == QUADRANTS * 256 else QUADRANTS // 2 * 9 * 256 * 4)

    def _shared(self, inputs: int, chunk: int, block: int) -> int:
        weights, rounded = 9 * chunk * (block + PAD), PIXELS * (block + PAD)
        numbers = weights + rounded if chunk == inputs else max(weights, rounded)
        return 2 * (self._halo_pixels * (chunk + PAD) + numbers) + 4 * 17 * block


def processors(device: torch.device) -> int:
    """Of a GPU; of the one that is planned for, without."""
    if device.type != "cuda":
        return PROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def blocks_at_once(registers: int, shared_bytes: int) -> int:
    """Blocks that a processor of an H100 holds, by the registers of a thread, of which each gets a multiple of 8."""
    return min(REGISTERS // (THREADS * -(-registers // 8) * 8), blocks_by_shared(shared_bytes))


def blocks_by_shared(shared_bytes: int) -> int:
    """Blocks for which the shared memory of a processor of an H100 is enough."""
    return SHARED // (shared_bytes + RESERVED)


@functools.cache
def in_waves(tiles: int, rows: int, at_once: int) -> int:
    """How many tiles a block takes, where `rows` rows of tiles are to be done and `at_once` blocks run at once.

    Blocks run in waves, of which the last may leave most processors idle.
    """

    def time(block_tiles: int) -> int:
        blocks = rows * -(-tiles // block_tiles)
        return -(-blocks // at_once) * (block_tiles + STARTED)

    return min(range(1, tiles + 1), key=time)


def _address(tensor: Tensor | None, first: int = 0) -> Any:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr() + first * tensor.element_size())


def _convolve_blocks(constants: dict[str, int]) -> int:
    """Blocks of a convolution that a processor shall hold at once: as many as NVRTC 13.0 spills no register for.

    Where another would, nvrtc.py takes fewer. A third one of 16 channels with statistics and a prologue fits, but takes
    more instructions for a pixel than an H200 issues while its memory is at work (see test_kernels_compile.py).
    """
    block_out = constants["BLOCK_OUT"]
    if block_out == 16:
        return 2 if constants["STATISTICS"] and (constants["HAS_BIAS"] or constants["PROLOGUE"]) else 3
    if block_out == 32 and constants["CHUNK"] == constants["IN"] and not constants["PROLOGUE"]:
        return 3 if constants["ACCUMULATE"] and constants["WIDTH"] <= 16 else 2
    return 1


def _prologue(prologue: Prologue | None) -> tuple[Any, Any, Any]:
    if prologue is None:
        return _address(None), _address(None), _long(0)
    first = prologue.first
    return _address(prologue.scale, first), _address(prologue.offset, first), _long(prologue.scale.stride(0))


def _statistics(to: Statistics | None) -> list[Any]:
    if to is None:
        return [_address(None)] * 4 + [
            _long(0),
            *[_address(None)] * 2,
            _long(0),
            ctypes.c_double(0),
            _address(None),
            _long(0),
        ]
    parameters = (_address(to.weights if first >= 0 else None, first) for first in (to.first_weight, to.first_bias))
    return [
        *(_address(each, to.first) for each in (to.mean, to.variance, to.scale, to.offset)),
        *(_long(to.mean.stride(0)), *parameters, _long(to.weights.stride(0)), ctypes.c_double(to.eps)),
        *(_address(to.arrivals), _long(to.arrivals.stride(0))),
    ]


def _long(value: int) -> Any:
    return ctypes.c_longlong(value)


def _int(value: int) -> Any:
    return ctypes.c_int(value)
