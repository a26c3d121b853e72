"""Launches the 3x3 convolutions of csrc/cuda, and chooses their compile-time constants and grids.

A block of these kernels works on tiles of 256 pixels. It keeps a tile and a border of one pixel around it (the halo) in
shared memory, so that all nine taps of the convolution read their pixels from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swamp_fast.engines.fused.cuda.nvrtc import Launch
from swamp_fast.engines.fused.cuda.occupancy import blocks_by_shared, processors, tiles_per_block
from swamp_fast.engines.fused.cuda.params import ConvolveParams, WeightGradParams, address
from swamp_fast.engines.fused.plan import Convolution, Shape

TAPS = 9
TILE_PIXELS = 256  # kPixels of csrc/cuda/tile.h
PAD = 8  # kPad of csrc/cuda/tile.h: unused numbers after each row in shared memory
WARPS = 8  # kWarps of csrc/cuda/tile.h
MAX_SHARED_BYTES = 99 * 1024  # shared memory that a block may use on every GPU from sm_80 on

# Limits of a convolution with statistics. The statistics of all its blocks must be merged, so few blocks are better.
MAX_BLOCKS_PER_LANE = 64  # exceeded if a block would otherwise compute more than MAX_BLOCK_TILES tiles
MAX_BLOCK_TILES = 8
# Limits of every convolution.
MAX_BLOCK_OUT = 64  # output channels that a block computes
MAX_BLOCK_OUT_WITH_NORM = 32  # the same if statistics or a prologue need registers too

# Limits of a weight gradient. It is summed in parts, and each part takes one block per group of weights.
MAX_PARTS = 32
MIN_PART_TILES = 8  # parts are smaller if a lane would otherwise have fewer than MIN_BLOCKS_PER_LANE blocks
MIN_BLOCKS_PER_LANE = 16
QUADRANT = 16  # a warp sums the gradients of 16 by 16 weights, called a quadrant
MAX_QUADRANTS = 8  # quadrants in a block


@dataclass(frozen=True)
class Prologue:
    """BatchNorm and ReLU that a kernel applies while it loads its input: relu(source * scale + offset).

    scale, offset  [L, channels of all norms]
    first          where this norm's channels begin in scale and offset
    """

    scale: Tensor
    offset: Tensor
    first: int


@dataclass(frozen=True)
class Statistics:
    """Where a kernel writes the statistics of its output, for the norm that reads that output.

    mean, variance  [L, channels of all norms]  of the batch; the variance is biased
    scale, offset   [L, channels of all norms]  such that the norm is input * scale + offset
    first           where this norm's channels begin in mean, variance, scale and offset
    weights         [L, P']  a bank
    first_weight    where the norm's weight begins in the bank; -1 if it has none
    first_bias      where the norm's bias begins in the bank; -1 if it has none
    eps             added to the variance
    arrivals        [L, ...]  int32, counts the blocks that have written their part; zero before and after each launch
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
    """A 3x3 convolution with stride 1 and padding 1, and its gradients, over all lanes.

    Feature maps are bfloat16 [L, B, H, W, C]. Weights are in the dense rows that dense.py lays out.

    height, width    of a picture
    inputs, outputs  numbers of channels
    """

    height: int
    width: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, op: Convolution, kernel: tuple[int, int], source: Shape, out: Shape) -> Halo | None:
        """Return the Halo for a plan's convolution, or None if the kernels don't cover it.

        source, out  the shapes of one sample of its input and of its output
        """
        if len(source) != 3 or kernel != (3, 3):
            return None
        channels, height, width = source
        plain = (op.stride, op.padding, op.dilation, op.groups) == (1, (1, 1), (1, 1), 1)
        powers_of_two = all(size & (size - 1) == 0 for size in (height, width))
        fits = 2 <= width <= TILE_PIXELS and height >= 2
        if not (plain and powers_of_two and fits and channels % 16 == 0 and out[0] % 16 == 0):
            return None
        return cls(height, width, channels, out[0])

    @property
    def rows(self) -> int:
        """How many rows of one picture a tile covers."""
        return self.height if self.height * self.width < TILE_PIXELS else TILE_PIXELS // self.width

    @property
    def pictures(self) -> int:
        """How many pictures a tile covers."""
        return TILE_PIXELS // (self.rows * self.width)

    def tiles(self, samples: int) -> int:
        """How many tiles the batch of one lane has."""
        return -(-samples // self.pictures) * (self.height // self.rows)

    def block_tiles(self, samples: int) -> int:
        """How many tiles each block of a convolution with statistics computes.

        The number affects the bits of the statistics, so it depends only on the sizes and not on the GPU.
        """
        return max(1, min(MAX_BLOCK_TILES, self.tiles(samples) // MAX_BLOCKS_PER_LANE))

    def parts(self, samples: int) -> int:
        """In how many parts a weight gradient is summed.

        The number affects the bits of the gradient, so it depends only on the sizes and not on the GPU.
        """
        tiles, constants = self.tiles(samples), self.weight_grad_constants(False)[0]
        blocks = self.inputs * self.outputs // (constants["BLOCK_IN"] * constants["BLOCK_OUT"])
        return min(MAX_PARTS, tiles, max(tiles // MIN_PART_TILES, -(-MIN_BLOCKS_PER_LANE // blocks)))

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
        statistics: Statistics | None,
    ) -> None:
        """Launch the convolution of relu(source * scale + offset), or of `source` itself if `prologue` is None.

        source      [L, B, H, W, inputs]  the input; if by_input, the output's gradient [L, B, H, W, outputs]
        weights     [L, T]  dense rows, in which this layer's weights begin at `first`
        bias        a bank [L, P'], and where this layer's bias begins in it; None if it has no bias
        out         [L, B, H, W, outputs]  written; if by_input, the input's gradient [L, B, H, W, inputs]
        by_input    compute the input gradient instead of the output
        accumulate  add to `out` instead of overwriting it
        statistics  where the statistics of `out` are written; None computes none
        """
        constants, shared_bytes = self.convolve_constants(
            by_input, prologue is not None, bias is not None, accumulate, statistics is not None
        )
        lanes, samples = source.shape[:2]
        tiles, columns = self.tiles(samples), constants["OUT"] // constants["BLOCK_OUT"]
        if statistics is not None:
            block_tiles = self.block_tiles(samples)
        else:  # without statistics it affects no bits, so it may depend on the GPU
            at_once = processors(out.device) * min(constants["MIN_BLOCKS"], blocks_by_shared(shared_bytes))
            block_tiles = tiles_per_block(tiles, columns * lanes, at_once)
        grid = -(-tiles // block_tiles), columns, lanes

        params = ConvolveParams(samples=samples, tiles=tiles, block_tiles=block_tiles)
        params.source, params.out = address(source), address(out)
        params.weights, params.weights_stride = address(weights, first), weights.stride(0)
        _set_prologue(params, prologue)
        if bias is not None:
            bank, first_bias = bias
            params.bias, params.bias_stride = address(bank, first_bias), bank.stride(0)
        if statistics is not None:
            scratch = torch.empty(2, lanes, grid[0], constants["OUT"], dtype=torch.float32, device=out.device)
            params.scratch = address(scratch)
            _set_statistics(params, statistics)
        launch("convolve", constants, grid, shared_bytes, params)

    def convolve_constants(
        self, by_input: bool, prologue: bool, bias: bool, accumulate: bool, statistics: bool
    ) -> tuple[dict[str, int], int]:
        """The constants that convolve.cu is compiled with, and the bytes of shared memory that a block uses."""
        inputs, outputs = (self.outputs, self.inputs) if by_input else (self.inputs, self.outputs)
        max_block = MAX_BLOCK_OUT_WITH_NORM if statistics or prologue else MAX_BLOCK_OUT
        block_out, chunk = next(
            (block, chunk)
            for block in range(max_block, 0, -16)
            for chunk in (64, 32, 16)
            if outputs % block == 0 and inputs % chunk == 0
            if self._convolve_shared_bytes(inputs, chunk, block) <= MAX_SHARED_BYTES
        )
        constants = {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "IN": inputs,
            "OUT": outputs,
            "BLOCK_OUT": block_out,
            "CHUNK": chunk,
            "BY_INPUT": int(by_input),
            "PROLOGUE": int(prologue),
            "HAS_BIAS": int(bias),
            "ACCUMULATE": int(accumulate),
            "STATISTICS": int(statistics),
        }
        constants["MIN_BLOCKS"] = _convolve_min_blocks(constants)
        return constants, self._convolve_shared_bytes(inputs, chunk, block_out)

    def weight_grad(
        self,
        launch: Launch,
        source: Tensor,
        prologue: Prologue | None,
        out_grad: Tensor,
        partial: Tensor,
        first: int,
    ) -> None:
        """Launch the weight gradient, which is written in parts that remain to be summed.

        source    [L, B, H, W, inputs]  the input before the prologue
        out_grad  [L, B, H, W, outputs]
        partial   [L, ...]  each lane's row is written with [parts, 9, inputs, outputs], beginning at `first`
        """
        constants, shared_bytes = self.weight_grad_constants(prologue is not None)
        lanes, samples = source.shape[:2]
        blocks = (self.inputs // constants["BLOCK_IN"]) * (self.outputs // constants["BLOCK_OUT"])

        params = WeightGradParams(samples=samples, tiles=self.tiles(samples))
        params.source, params.out_grad = address(source), address(out_grad)
        params.partial, params.partial_stride = address(partial, first), partial.stride(0)
        _set_prologue(params, prologue)
        launch("weight_grad", constants, (self.parts(samples), blocks, lanes), shared_bytes, params)

    def weight_grad_constants(self, prologue: bool) -> tuple[dict[str, int], int]:
        """The constants that weight_grad.cu is compiled with, and the bytes of shared memory that a block uses."""
        sizes = [
            (block_in, block_out)
            for block_in in (16, 32, 64, 128)
            for block_out in (16, 32, 64, 128)
            if self.inputs % block_in == 0 and self.outputs % block_out == 0
            if _quadrants(block_in, block_out) <= MAX_QUADRANTS
            if self._weight_grad_shared_bytes(block_in, block_out) <= MAX_SHARED_BYTES
        ]
        block_in, block_out = max(sizes, key=lambda size: (size[0] * size[1], -size[0]))
        quadrants = _quadrants(block_in, block_out)
        constants = {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "IN": self.inputs,
            "OUT": self.outputs,
            "BLOCK_IN": block_in,
            "BLOCK_OUT": block_out,
            "PROLOGUE": int(prologue),
            "MIN_BLOCKS": 2 if quadrants == 1 or (quadrants <= 4 and not prologue) else 1,
        }
        return constants, self._weight_grad_shared_bytes(block_in, block_out)

    @property
    def _halo_pixels(self) -> int:
        return self.pictures * (self.rows + 2) * (self.width + 2)

    def _convolve_shared_bytes(self, inputs: int, chunk: int, block_out: int) -> int:
        """Bytes for the arrays of convolve.cu: the halo, weights, rounded outputs, shift and moments."""
        weights, rounded = TAPS * chunk * (block_out + PAD), TILE_PIXELS * (block_out + PAD)
        numbers = weights + rounded if chunk == inputs else max(weights, rounded)
        return 2 * (self._halo_pixels * (chunk + PAD) + numbers) + 4 * (1 + 2 * WARPS) * block_out

    def _weight_grad_shared_bytes(self, block_in: int, block_out: int) -> int:
        """Bytes for the arrays of weight_grad.cu: the halo and the gradient, later reused to add the warps' sums."""
        maps = 2 * (self._halo_pixels * (block_in + PAD) + TILE_PIXELS * (block_out + PAD))
        shares = _quadrants(block_in, block_out) < WARPS
        return max(maps, 4 * (WARPS // 2) * TAPS * QUADRANT**2 if shares else 0)


def _quadrants(block_in: int, block_out: int) -> int:
    """The number of quadrants (16 by 16 weights) in a block of weight_grad.cu."""
    return (block_in // QUADRANT) * (block_out // QUADRANT)


def _convolve_min_blocks(constants: dict[str, int]) -> int:
    """How many blocks of a convolution an SM should hold at once.

    This is the largest number for which NVRTC 13.0 spills no registers; if another version spills, nvrtc.py reduces it.
    With 16 channels, statistics and a prologue, a third block would fit. But its code takes more instructions per pixel
    than an H200 can issue in the time that the pixel's memory traffic takes (see test_kernels_compile.py).
    """
    block_out = constants["BLOCK_OUT"]
    if block_out == 16:
        return 2 if constants["STATISTICS"] and (constants["HAS_BIAS"] or constants["PROLOGUE"]) else 3
    if block_out == 32 and constants["CHUNK"] == constants["IN"] and not constants["PROLOGUE"]:
        return 3 if constants["ACCUMULATE"] and constants["WIDTH"] <= 16 else 2
    return 1


def _set_prologue(params: ConvolveParams | WeightGradParams, prologue: Prologue | None) -> None:
    if prologue is None:
        return
    params.scale = address(prologue.scale, prologue.first)
    params.offset = address(prologue.offset, prologue.first)
    params.prologue_stride = prologue.scale.stride(0)


def _set_statistics(params: ConvolveParams, statistics: Statistics) -> None:
    params.mean = address(statistics.mean, statistics.first)
    params.variance = address(statistics.variance, statistics.first)
    params.out_scale = address(statistics.scale, statistics.first)
    params.out_offset = address(statistics.offset, statistics.first)
    params.statistics_stride = statistics.mean.stride(0)
    if statistics.first_weight >= 0:
        params.norm_weight = address(statistics.weights, statistics.first_weight)
    if statistics.first_bias >= 0:
        params.norm_bias = address(statistics.weights, statistics.first_bias)
    params.norm_weights_stride = statistics.weights.stride(0)
    params.eps = statistics.eps
    params.arrivals, params.arrivals_stride = address(statistics.arrivals), statistics.arrivals.stride(0)
