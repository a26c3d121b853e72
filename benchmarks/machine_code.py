"""Reports what the GPU kernels compile to: registers, spills, shared memory, instructions. Needs no GPU.

    python -m benchmarks.machine_code [--arch sm_90] [--json]
    python -m benchmarks.machine_code [--arch sm_90] --fill FOLDER --model resnet20 --particles 8 [--python python3.12]

The second command fills FOLDER with everything that a machine with such a GPU would compile; see precompile.py.

The Triton launchers are called with CPU tensors, under a driver that only names the target. So each kernel is compiled
with the specialisation of a real launch, but not run. The kernels of csrc/cuda are compiled by NVRTC. The disassemblers
that come with Triton read both.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.precompile import build_extension, compiling, fill
from swamp_fast.config import CHOICES
from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.halo import TILE_PIXELS, WARPS, Halo, Statistics
from swamp_fast.engines.fused.cuda.occupancy import blocks_at_once
from swamp_fast.ops.backends import why_no_nvrtc

BATCH = 128
SLOTS = 4  # instructions that an SM can issue per clock
# What one SM of an H200 (132 SMs at 1.755 GHz) does per clock: bytes of memory traffic at 4.3 TB/s, and multiply-adds
# of mma.sync at 490 TFLOP/s. These are estimates, not measurements of this project.
BYTES, PRODUCTS = 18.6, 1057.0
HALOS = {  # network -> shapes of its layers
    "ResNet-20": [Halo(32, 32, 16, 16), Halo(16, 16, 32, 32), Halo(8, 8, 64, 64)],
    "WRN-28-2": [Halo(32, 32, 32, 32), Halo(16, 16, 64, 64), Halo(8, 8, 128, 128)],
    "VGG-19": [Halo(32, 32, 64, 64), Halo(4, 4, 256, 512), Halo(2, 2, 512, 512)],
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration.

    instructions            number of instructions in its code
    instructions_per_pixel  instructions issued per output pixel, in a batch of 128; None if they weren't counted
    slots_per_pixel         instructions that an H200 can issue in the time that memory and tensor cores need for a
                            pixel; if instructions_per_pixel is smaller, issuing them doesn't limit the kernel
    blocks                  number of blocks that an SM of an H100 holds at once; only for csrc/cuda
    """

    name: str
    config: str
    registers: int | None
    spills: int | None
    shared_bytes: int
    instructions: int | None
    instructions_per_pixel: float | None = None
    slots_per_pixel: float | None = None
    blocks: int | None = None


def compiled(arch: str) -> list[Compiled]:
    """Compile every kernel, in configurations that launchers choose, for an `arch` such as "sm_90".

    For "gfx942", only the Triton kernels are compiled. Raises RuntimeError if this process interprets Triton, because
    then it can't compile.
    """
    return triton_kernels(arch) + (cuda_kernels(arch) if arch.startswith("sm_") else [])


def cuda_kernels(arch: str) -> list[Compiled]:
    """Compile the kernels of csrc/cuda. Raises RuntimeError without NVRTC, or if a kernel doesn't compile."""
    reason = why_no_nvrtc()
    if reason is not None:
        raise RuntimeError(f"the CUDA kernels can't be compiled here: {reason}.")
    found = []
    for network, halos in HALOS.items():
        for halo in halos:
            size = f"{network} {halo.inputs}-{halo.outputs} channels {halo.height}x{halo.width}"
            for by_input, prologue, accumulate in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1)):
                if network != "ResNet-20" and prologue + accumulate == 0:
                    continue  # skip kernels that do less of the same work
                constants, shared = halo.convolve_constants(
                    bool(by_input), bool(prologue), False, bool(accumulate), not by_input
                )
                kind = ["forward", "by input"][by_input] + ", prologue" * prologue + ", adds" * accumulate
                found.append(_cuda_kernel("convolve", f"{kind}, {size}", constants, shared, arch))
            for prologue in (False, True) if network == "ResNet-20" else (True,):
                constants, shared = halo.weight_grad_constants(prologue)
                config = f"{'prologue, ' * prologue}{size}"
                found.append(_cuda_kernel("weight_grad", config, constants, shared, arch))
    return found


def _cuda_kernel(name: str, config: str, constants: dict[str, int], shared: int, arch: str) -> Compiled:
    cubin = nvrtc.compile_kernel(name, constants, arch)
    instructions, loops = disassembled(cubin)
    if name == "convolve":  # a loop over tiles, which contains a loop over chunks of channels
        blocks, trips = constants["OUT"] // constants["BLOCK_OUT"], constants["IN"] // constants["CHUNK"]
    else:  # a loop over tiles, which contains a loop over groups of 16 pixels
        quadrants = constants["BLOCK_IN"] * constants["BLOCK_OUT"] // 256
        blocks = constants["IN"] * constants["OUT"] // (256 * quadrants)
        trips = TILE_PIXELS // 16 // (WARPS // quadrants)
    main = [loop for loop in loops if any("HMMA" in each for each in instructions[loop[0] : loop[1] + 1])]
    outer = max(main, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in main if loop != outer]
    count = outer[1] - outer[0] + 1
    if inner:
        begin, end = max(inner, key=lambda loop: loop[1] - loop[0])
        count += (trips - 1) * (end - begin + 1)
    arrival = next((i for i, each in enumerate(instructions) if "ATOM" in each), len(instructions))
    # Each block issues the instructions before `arrival` once, except those of the loop. Only the last block continues.
    once = arrival - (outer[1] - outer[0] + 1)
    halo = Halo(constants["HEIGHT"], constants["WIDTH"], constants["IN"], constants["OUT"])
    tiles = halo.block_tiles(BATCH) if name == "convolve" else max(1, halo.tiles(BATCH) // halo.parts(BATCH))
    count += once // tiles + (len(instructions) - arrival) // halo.tiles(BATCH)
    numbers = constants["IN"] + constants["OUT"] * (1 + constants.get("ACCUMULATE", 0))
    clocks = max(2 * numbers / BYTES, 9 * constants["IN"] * constants["OUT"] / PRODUCTS)
    resources = _resources(cubin)
    return Compiled(
        name, config, **resources, shared_bytes=shared, instructions=len(instructions),
        instructions_per_pixel=round(count * WARPS / TILE_PIXELS * blocks, 1), slots_per_pixel=round(clocks * SLOTS, 1),
        blocks=blocks_at_once(resources["registers"], shared),
    )  # fmt: skip


def triton_kernels(arch: str) -> list[Compiled]:
    """Compile the Triton kernels."""
    found: dict[str, Compiled] = {}

    def keep(function: Any, args: Any, kwargs: Any, kernel: Any) -> None:
        if kernel.hash in found:
            return
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        types = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        constants = [f"{name} = {value}" for name, value in kwargs.items() if name.isupper()]
        constants += [f"no {name}" for name, value in zip(function.arg_names, args, strict=False) if value is None]
        code = kernel.asm["cubin"] if arch.startswith("sm_") else None
        resources = {"registers": None, "spills": None} if code is None else _resources(code)
        count = None if code is None else len(disassembled(code)[0])
        config = f"{', '.join(sorted(types))}; {', '.join(constants)}"
        found[kernel.hash] = Compiled(
            function.__name__, config, **resources, shared_bytes=kernel.metadata.shared, instructions=count
        )

    with compiling(arch, keep):
        _launch_bank_kernels()
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            _launch_fused_kernels(dtype)
    return list(found.values())


def _launch_bank_kernels() -> None:
    """Launch the kernels that every engine uses: with one lane, to which Triton specialises them, and with several."""
    from swamp_fast.kernels import (
        clip_scale,
        gather_augment,
        global_threshold,
        masked_adamw,
        masked_sgd,
        particle_mean,
        philox,
    )

    for lanes in (1, 3):
        keys = torch.zeros(lanes, 3, dtype=torch.int64)
        philox.philox(keys, 3, 1001)
        rates = torch.zeros(4, lanes, dtype=torch.float64).unbind()
        run_of_lane = torch.zeros(lanes, dtype=torch.int64)
        for dtype in (torch.float32, torch.float64):
            bank = torch.zeros(3, lanes, 4096, dtype=dtype)
            masks = torch.zeros(1, 4000, dtype=torch.bool)
            for scale, (swa, share) in product((None, rates[3]), ((bank[2], rates[3]), (None, None))):
                state = (bank[0], bank[1], bank[2])
                for nesterov in (False, True):
                    masked_sgd.masked_sgd_(*state, masks, run_of_lane, *rates[:3], nesterov, scale, swa, share, None)
                adam = (*rates[:3], *rates[:3])
                masked_adamw.masked_adamw_(*state, bank[2], masks, run_of_lane, *adam, scale, swa, share, None)
            ends, rest = torch.full((1, 3), 4096), (rates[3], bank[2], rates[3])  # several segments
            masked_sgd.masked_sgd_(*state, masks, run_of_lane, *rates[:3], False, *rest, ends)
            masked_adamw.masked_adamw_(*state, bank[2], masks, run_of_lane, *adam, *rest, ends)
            clip_scale.clip_scale(bank[0], masks, run_of_lane, rates[0])
            particle_mean.particle_mean(bank[0], run_of_lane, 1)
            keep = torch.ones(lanes, dtype=torch.int64)
            global_threshold.global_threshold(bank[0][:, :4000], masks.expand(lanes, -1).contiguous(), keep)
            for images in (torch.zeros(9, 32, 32, 3, dtype=torch.uint8), torch.zeros(9, 32, 32, 3, dtype=dtype)):
                table = torch.zeros(3, 256, dtype=dtype) if images.dtype == torch.uint8 else None
                index = torch.zeros(lanes, 8, dtype=torch.int64)
                for pad, flip in ((0, False), (4, True)):
                    for last in (False, True):
                        gather_augment.gather_augment(images, table, index, index, keys, pad, flip, last)


SAME = (3, 3), 1, (1, 1), (1, 1), 1  # kernel size, stride, padding, dilation, groups
HALVED = (3, 3), 2, (1, 1), (1, 1), 1
LINEAR = (1, 1), 1, (0, 0), (1, 1), 1


def _launch_fused_kernels(dtype: torch.dtype) -> None:
    """Launch the fused engine's kernels for a residual network: the stem with 3 channels, a wide layer, and a head."""
    from swamp_fast.kernels import compact, convolution, loss, pool

    bank = torch.float64 if dtype == torch.float64 else torch.float32
    lanes, samples = 2, 16
    weights, dense = torch.zeros(lanes, 4096, dtype=bank), torch.zeros(lanes, 4096, dtype=dtype)
    index, run_of_lane = torch.zeros(1, 4096, dtype=torch.int32), torch.zeros(lanes, dtype=torch.int64)
    compact.expand_weights(weights, index, run_of_lane, dense)
    compact.collect_gradients(weights, index, index, index, run_of_lane, weights)
    layers = [(3, 16, 32, SAME), (16, 16, 32, SAME), (16, 32, 32, HALVED), (64, 64, 8, SAME), (256, 512, 4, SAME)]
    layers = layers if dtype == torch.bfloat16 else layers[:2] + layers[3:4] if dtype == torch.float32 else layers[1:2]
    precision = "tf32" if dtype == torch.float32 else "ieee"
    for inputs, outputs, size, window in [*layers, (64, 10, 1, LINEAR)]:
        half = size // window[1]
        source = torch.zeros(lanes, samples, size, size, inputs, dtype=dtype)
        out = torch.zeros(lanes, samples, half, half, outputs, dtype=dtype)
        mean, variance, scale, offset = torch.zeros(4, lanes, 4096, dtype=bank)
        arrivals = torch.zeros(lanes, outputs, dtype=torch.int32)
        to = Statistics(mean, variance, scale, offset, 16, weights, 16, 80, 1e-5, arrivals)
        head = window == LINEAR
        bias = (weights, 16) if head else (None, 0)
        forward = (source, dense, 16, *bias, out, window)
        convolution.convolve(*forward, False, False, None if head else to, precision)
        if inputs > 3:
            backward = (out, dense, 16, None, 0, source, window)
            for accumulate in (False, True) if dtype == torch.bfloat16 else (True,):
                convolution.convolve(*backward, True, accumulate, None, precision)
        convolution.weight_grad(source, out, weights, 16, 2, window, precision)
        convolution.bias_grad(out, weights, 16, arrivals)
    for classes in (10, 1000) if dtype != torch.bfloat16 else ():
        loss.cross_entropy(torch.zeros(lanes, samples, classes, dtype=dtype), torch.zeros(lanes, samples).long())
    for count in (lanes, 1):  # Triton specialises a kernel to an argument that is 1
        _launch_norms(dtype, bank, count, samples)
    a, b = torch.zeros(2, lanes, samples, 8, 8, 64, dtype=dtype)
    for divisors in (None, ((4.0,) * 4,) * 4):
        ranges = tuple((2 * each, 2 * each + 2) for each in range(4))
        windows = pool.windows_of(ranges, ranges, divisors, 8, 8, a.device)
        small = torch.zeros(lanes * samples, 4, 4, 64, dtype=dtype)
        pool.pool(a.flatten(0, 1), small, windows)
        pool.pool_grad(a.flatten(0, 1), small, b.flatten(0, 1), small, windows, False)


def _launch_norms(dtype: torch.dtype, bank: torch.dtype, lanes: int, samples: int) -> None:
    from swamp_fast.kernels import batch_statistics, norm

    weights = torch.zeros(lanes, 4096, dtype=bank)
    a, b, c, d = torch.zeros(4, lanes, samples, 8, 8, 64, dtype=dtype)
    mean, variance, scale, offset = torch.zeros(4, lanes, 80, dtype=bank)
    arrivals = torch.zeros(lanes, 64, dtype=torch.int32)
    to = Statistics(mean, variance, scale, offset, 16, weights, 16, 80, 1e-5, arrivals)
    batch_statistics.statistics(a, to)
    batch_statistics.scale_offset(to, 64)
    for side in (None, d):
        norm.norm(a, side, b, to, True)
    for out, side in product((b, None), (None, d)):
        if out is None and side is not None:
            continue
        in_grad = b if out is None else a
        norm.norm_grad(a, out, c, in_grad, side, False, side is not None, to, weights, True, True)


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _read(tool: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(tool), *options, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    """The registers of a thread, and the bytes that it spills to memory."""
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _read("cuobjdump", "--dump-resource-usage", cubin=cubin)))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def disassembled(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a kernel in order, and its loops as (first, last) index of an instruction."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in _read("nvdisasm", "-c", cubin=cubin).splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append(found[1])
    loops = []
    for number, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if jump and labels.get(jump[1], number + 1) < number:
            loops.append((labels[jump[1]], number))
    return instructions, loops


def show(found: list[Compiled]) -> None:
    """Print a table of the kernels."""
    columns = {"registers": 11, "spills": 8, "shared_bytes": 14, "instructions": 14}
    columns |= {"instructions_per_pixel": 24, "slots_per_pixel": 17}
    print(f"{'kernel':<28}" + "".join(f"{name:>{width}}" for name, width in columns.items()) + "  config")
    for each in found:
        cells = [(getattr(each, name), width) for name, width in columns.items()]
        row = "".join(f"{'' if number is None else number:>{width}}" for number, width in cells)
        print(f"{each.name:<28}{row}  {each.config}")


def main() -> None:
    """Report on the kernels, or fill a folder of compiled ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90, …; gfx942: Triton kernels only; default sm_90")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument(
        "--fill", type=Path, metavar="FOLDER", help="compile into the caches in FOLDER; prints counts as JSON"
    )
    parser.add_argument("--model", nargs="+", default=["resnet20"], help="names, or package.module:factory")
    parser.add_argument("--particles", nargs="+", type=int, default=[8], metavar="N")
    parser.add_argument("--batch", type=int, default=128, metavar="B")
    parser.add_argument("--precision", nargs="+", choices=CHOICES["precision"], default=["bfloat16"])
    parser.add_argument("--python", help="with --fill: build the extension for this Python too, such as python3.12")
    given = parser.parse_args()
    try:
        if given.fill is None:
            found = compiled(given.arch)
            print(json.dumps([asdict(each) for each in found], indent=1)) if given.json else show(found)
            return
        counts: dict[str, Any] = dict(
            fill(given.fill, given.arch, given.model, given.particles, given.batch, given.precision)
        )
        if given.python is not None:
            counts["extension"] = build_extension(given.fill, given.python).name
        print(json.dumps(counts))
    except RuntimeError as error:
        sys.exit(f"benchmarks.machine_code: {error}")


if __name__ == "__main__":
    main()
