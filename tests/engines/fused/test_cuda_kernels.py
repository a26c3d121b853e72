"""Compares the kernels of csrc/cuda with float64 references, alone and as part of a plan.

Without a GPU, the kernels run on the CPU thread by thread, and tests/support/host/matrix.h replaces the GPU's
instructions. The tests then cover everything except those instructions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from host_kernels import launch_on_host
from operations import error, masked, problem_of, step
from skips import HAS_GPU
from swamp_fast.kernels import convolution
from torch import nn

from swamp_fast.engines.fused import check
from swamp_fast.engines.fused.check import tensor_cores_differ
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.cuda import halo as halo_module
from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.halo import Halo, Prologue, Statistics
from swamp_fast.engines.fused.cuda.nvrtc import Launcher
from swamp_fast.engines.fused.cuda.occupancy import blocks_at_once, tiles_per_block
from swamp_fast.engines.fused.cuda.runner import CudaPrograms
from swamp_fast.ops.backends import why_no_nvrtc

LAUNCH = Launcher(torch.device("cuda")) if HAS_GPU else launch_on_host
DEVICE = "cuda" if HAS_GPU else "cpu"


def normal(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(SEEDS))).to(DEVICE, dtype)


SEEDS = itertools.count()
HALOS = [
    (Halo(32, 32, 16, 16), 2),
    (Halo(16, 8, 32, 16), 3),
    (Halo(8, 8, 64, 64), 5),
    (Halo(4, 4, 16, 48), 17),
    (Halo(2, 2, 32, 128), 70),
    (Halo(8, 64, 16, 16), 1),
    (Halo(2, 256, 16, 16), 2),
]


def prologue_of(lanes: int, channels: int) -> Prologue:
    """A random prologue whose channels are in the middle of longer rows, as those of a norm in a plan are."""
    scale, offset = (
        normal(lanes, channels + 9, dtype=torch.float32).abs(),
        normal(lanes, channels + 9, dtype=torch.float32),
    )
    return Prologue(scale, offset, 5)


def after(source: torch.Tensor, prologue: Prologue | None) -> torch.Tensor:
    """The input that the kernels multiply: the source after the prologue, rounded to bfloat16."""
    if prologue is None:
        return source.double()
    channels = slice(prologue.first, prologue.first + source.shape[-1])
    scale, offset = (each[:, None, None, None, channels].double() for each in (prologue.scale, prologue.offset))
    return torch.relu(source.double() * scale + offset).bfloat16().double()


def as_pictures(maps: torch.Tensor) -> torch.Tensor:
    return maps.movedim(-1, 1)


@pytest.mark.parametrize("with_prologue", [False, True])
@pytest.mark.parametrize(("halo", "samples"), HALOS, ids=str)
def test_convolve(halo, samples, with_prologue, monkeypatch):
    monkeypatch.setattr(halo_module, "MAX_BLOCKS_PER_LANE", 2)  # makes each block compute several tiles
    lanes, inputs, outputs = 2, halo.inputs, halo.outputs
    source = normal(lanes, samples, halo.height, halo.width, inputs)
    prologue = prologue_of(lanes, inputs) if with_prologue else None
    weights = normal(lanes, 16 + 9 * inputs * outputs) / (3 * inputs**0.5)
    bias = normal(lanes, 3 + outputs, dtype=torch.float32)
    out = normal(lanes, samples, halo.height, halo.width, outputs)
    to = statistics_of(lanes, outputs)
    halo.convolve(LAUNCH, source, prologue, weights, 16, (bias, 3), out, False, False, to)
    for lane in range(lanes):
        kernel = weights[lane, 16:].double().view(3, 3, inputs, outputs).permute(3, 2, 0, 1)
        exact = F.conv2d(as_pictures(after(source, prologue)[lane]), kernel, bias[lane, 3:].double(), padding=1)
        torch.testing.assert_close(as_pictures(out[lane]).double(), exact, rtol=2**-8, atol=2**-8)
        pixels = out[lane].double().reshape(-1, outputs)
        mean, variance = pixels.mean(0), pixels.var(0, unbiased=False)
        scale = to.weights[lane, 2 : 2 + outputs].double() / (variance + to.eps).sqrt()
        offset = to.weights[lane, -outputs:].double() - mean * scale
        for name, expected in (("mean", mean), ("variance", variance), ("scale", scale), ("offset", offset)):
            found = getattr(to, name)[lane].double()
            torch.testing.assert_close(found[3 : 3 + outputs], expected, rtol=1e-5, atol=1e-5, msg=name)
            assert found[:3].isnan().all()
            assert found[3 + outputs :].isnan().all()
    assert not to.arrivals.any()


def statistics_of(lanes: int, channels: int) -> Statistics:
    """Memory for statistics in the middle of longer rows; all of it is NaN at first."""
    each = torch.full((4, lanes, channels + 7), torch.nan, device=DEVICE)
    weights = normal(lanes, 2 * channels + 11, dtype=torch.float32)
    arrivals = torch.zeros(lanes, channels, dtype=torch.int32, device=DEVICE)
    return Statistics(*each.unbind(), 3, weights, 2, channels + 11, 1e-3, arrivals)


@pytest.mark.parametrize(("halo", "samples"), HALOS, ids=str)
def test_convolve_by_input(halo, samples, monkeypatch):
    """The input gradient's bits don't depend on the number of tiles per block."""
    lanes, inputs, outputs = 2, halo.inputs, halo.outputs
    out_grad = normal(lanes, samples, halo.height, halo.width, outputs)
    weights = normal(lanes, 9 * inputs * outputs) / (3 * outputs**0.5)
    in_grad = normal(lanes, samples, halo.height, halo.width, inputs)
    before, again = in_grad.double(), in_grad.clone()
    halo.convolve(LAUNCH, out_grad, None, weights, 0, None, in_grad, True, True, None)
    monkeypatch.setattr(halo_module, "processors", lambda device: 1)
    halo.convolve(LAUNCH, out_grad, None, weights, 0, None, again, True, True, None)
    assert torch.equal(in_grad, again)
    for lane in range(lanes):
        kernel = weights[lane].double().view(3, 3, outputs, inputs).permute(2, 3, 0, 1)
        exact = F.conv_transpose2d(as_pictures(out_grad[lane].double()), kernel, padding=1)
        both = exact.bfloat16().double() + as_pictures(before[lane])
        torch.testing.assert_close(as_pictures(in_grad[lane]).double(), both, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("with_prologue", [False, True])
@pytest.mark.parametrize(("halo", "samples"), HALOS, ids=str)
def test_weight_grad(halo, samples, with_prologue):
    lanes, inputs, outputs, parts = 2, halo.inputs, halo.outputs, halo.parts(samples)
    source = normal(lanes, samples, halo.height, halo.width, inputs)
    prologue = prologue_of(lanes, inputs) if with_prologue else None
    out_grad = normal(lanes, samples, halo.height, halo.width, outputs)
    size = 9 * inputs * outputs
    partial = torch.full((lanes, 7 + parts * size), torch.nan, device=DEVICE)
    halo.weight_grad(LAUNCH, source, prologue, out_grad, partial, 7)
    for lane in range(lanes):
        own, grad = as_pictures(after(source, prologue)[lane]), as_pictures(out_grad[lane].double())
        exact, sizes = (
            torch.nn.grad.conv2d_weight(a, (outputs, inputs, 3, 3), g, padding=1)
            for a, g in ((own, grad), (own.abs(), grad.abs()))
        )
        found = partial[lane, 7:].view(parts, 3, 3, inputs, outputs).double().sum(0).permute(3, 2, 0, 1)
        pixels = samples * halo.height * halo.width  # each float32 sum may err by one rounding per term
        assert bool(((found - exact).abs() <= pixels * 2**-24 * sizes).all())


def test_a_constant_channel_has_no_variance():
    """With mean 4, computing the variance as E[x^2] - E[x]^2 would give a wrong result by cancellation."""
    halo, lanes, samples = Halo(16, 16, 16, 16), 1, 4
    source = torch.zeros(lanes, samples, 16, 16, 16, device=DEVICE).bfloat16()
    weights = torch.zeros(lanes, 9 * 16 * 16, device=DEVICE).bfloat16()
    bias = torch.full((lanes, 16), 4.0, device=DEVICE)
    out = torch.empty(lanes, samples, 16, 16, 16, device=DEVICE).bfloat16()
    to = statistics_of(lanes, 16)
    halo.convolve(LAUNCH, source, None, weights, 0, (bias, 0), out, False, False, to)
    assert bool((to.mean[:, 3:19] == 4.0).all())
    assert not to.variance[:, 3:19].any()


def broken(name, constants, grid, shared_bytes, params) -> None:
    """Launch a kernel whose convolution wrongly reverses its taps."""
    if name == "convolve":
        constants = {**constants, "BY_INPUT": 1 - constants["BY_INPUT"]}
    LAUNCH(name, constants, grid, shared_bytes, params)


class Residual(nn.Module):
    """A network with a 3-channel stem, a norm read only by a convolution, a norm with a residual, and a stride of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.b, self.c = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.Conv2d(32, 16, 3, 2, 1, bias=False)
        self.n0, self.n1, self.n2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(32)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.n0(self.stem(x)))
        x = F.relu(self.n1(self.a(x)) + x)
        x = F.relu(self.n2(self.b(x)))
        return self.head(F.relu(self.c(x)).mean((2, 3)))


class Chain(nn.Module):
    """A network whose norms are read by convolutions only, so that none of their outputs is written."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 16), (16, 16), (16, 32), (32, 16)]
        self.convolutions = nn.ModuleList(nn.Conv2d(*each, 3, padding=1, bias=False) for each in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(each) for _, each in sizes[:-1])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for convolution_, norm in zip(self.convolutions, self.norms, strict=False):
            x = F.relu(norm(convolution_(x)))
        return self.head(F.relu(self.convolutions[-1](x)).mean((2, 3)))


@pytest.mark.parametrize("network", [Residual, Chain])
def test_in_a_plan(network, monkeypatch):
    """The error relative to float64 is at most twice the error of autograd under bfloat16 autocast."""
    torch.manual_seed(0)
    model = network()
    if not HAS_GPU:
        monkeypatch.setitem(convolution.PIXELS, 2, 1024)
    exact_problem, problem = (problem_of(model, 6, each, (3, 8, 8), DEVICE) for each in ("float64", "bfloat16"))
    mask = masked(problem, 0.5)
    exact = step(exact_problem, "autograd", mask)
    ours, theirs = (error(step(problem, kind, mask, launch=LAUNCH), exact) for kind in ("cuda", "autograd"))
    plan = fused_plan(problem)
    program = CudaPrograms(problem, plan, mask, LAUNCH).program
    assert len(program.halos) == (2 if network is Residual else 3)
    assert len(program.recomputed) == (0 if network is Residual else 3)
    for what, bound in theirs.items():
        print(network.__name__, what, f"ours {ours[what]:.1e}, autograd's {bound:.1e}")
        assert ours[what] <= 2 * bound + 1e-3, what


def test_wrong_kernels_are_found(monkeypatch):
    """The engine's self-check rejects kernels that compute wrong results."""
    if not HAS_GPU:
        monkeypatch.setitem(convolution.PIXELS, 2, 1024)
    halos, device = [Halo(8, 8, 16, 32), Halo(8, 8, 16, 32), Halo(4, 4, 16, 16)], torch.device(DEVICE)
    assert tensor_cores_differ(halos, LAUNCH, device) is None
    assert tensor_cores_differ(halos, broken, device).startswith(
        "their outputs differ from those of the Triton kernels"
    )
    assert tensor_cores_differ(halos, fails, device) == "they raise RuntimeError: no such device"


def fails(*arguments) -> None:
    raise RuntimeError("no such device")


@pytest.mark.parametrize(("which", "what"), [(1, "input gradients"), (2, "weight gradients")])
def test_a_slightly_wrong_border_is_found(which, what, monkeypatch):
    """The check finds an error of 1/64 of the largest gradient in the first row of pictures or the first three taps."""
    if not HAS_GPU:
        monkeypatch.setitem(convolution.PIXELS, 2, 1024)
    right = check._of_halo

    def wrong(halo, launch, device):
        found = right(halo, launch, device)
        if launch is not None:
            rows = found[1][:, :, 0] if which == 1 else found[2][:, : 3 * 16 * 16]
            rows += found[which].abs().max() / 64
        return found

    monkeypatch.setattr(check, "_of_halo", wrong)
    differs = tensor_cores_differ([Halo(8, 8, 16, 16)], LAUNCH, torch.device(DEVICE))
    assert differs.startswith(f"their {what} differ from those of the Triton kernels")


def test_blocks_fill_whole_waves():
    """ResNet-20's first-stage input gradient, 8 lanes, fills one wave of 132 processors with 3 blocks each."""
    tiles = Halo(32, 32, 16, 16).tiles(128)
    block_tiles = tiles_per_block(tiles, 8, 132 * 3)
    blocks = 8 * -(-tiles // block_tiles)
    assert (block_tiles, blocks) == (11, 376)
    assert blocks <= 132 * 3 < 8 * -(-tiles // 10)
    assert tiles_per_block(tiles, 1, 132 * 3) == 2  # one lane; with one tile per block there would be a second wave
    assert tiles_per_block(1, 5, 396) == 1
    for rows in (3, 64):  # never slower than one block for all tiles, or one per tile
        for many in (1, tiles):
            waves, least = (-(-rows * -(-tiles // each) // 396) for each in (many, tiles_per_block(tiles, rows, 396)))
            assert least * (tiles_per_block(tiles, rows, 396) + 1) <= waves * (many + 1)


def test_blocks_of_a_processor():
    """Registers per thread are rounded up to a multiple of 8, and each block reserves 1 KB more shared memory."""
    by_registers = {32: 8, 64: 4, 78: 3, 80: 3, 81: 2, 128: 2, 129: 1, 255: 1}
    assert {registers: blocks_at_once(registers, 1024) for registers in by_registers} == by_registers
    by_shared = {37: 6, 75: 3, 76: 2, 113: 2, 114: 1, 227: 1}
    assert {kilobytes: blocks_at_once(32, kilobytes * 1024) for kilobytes in by_shared} == by_shared


@pytest.mark.skipif(why_no_nvrtc() is not None, reason=f"{why_no_nvrtc()}")
def test_a_broken_file_in_the_cache_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SWAMP_FAST_CACHE", str(tmp_path))
    constants, _ = Halo(4, 4, 16, 16).convolve_constants(True, False, False, False, False)
    code = nvrtc.compile_kernel("convolve", constants, "sm_90")
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], whole[:-1], b"\0" * len(whole), code):
        kept.write_bytes(broken)
        assert nvrtc.compile_kernel("convolve", constants, "sm_90") == code
        assert kept.read_bytes() == whole
    kept.unlink()
    kept.mkdir()  # a folder in place of the cached file can be neither read nor replaced
    assert nvrtc.compile_kernel("convolve", constants, "sm_90") == code


@pytest.mark.skipif(why_no_nvrtc() is not None, reason=f"{why_no_nvrtc()}")
def test_no_register_is_spilled_for_more_blocks(tmp_path, monkeypatch):
    """If the requested number of blocks leaves too few registers, the kernel is compiled for fewer blocks."""
    monkeypatch.setenv("SWAMP_FAST_CACHE", str(tmp_path))
    constants, _ = Halo(4, 4, 16, 16).convolve_constants(True, False, False, False, False)
    code = nvrtc.compile_kernel("convolve", {**constants, "MIN_BLOCKS": 6}, "sm_90")
    sources, spills = nvrtc.sources_of("convolve"), []
    for blocks in range(6, 0, -1):
        own, log = nvrtc.build("convolve", sources, {**constants, "MIN_BLOCKS": blocks}, "sm_90")
        spills.append(" 0 bytes stack frame" not in log)
        if not spills[-1]:
            break
    assert spills[0]
    assert not spills[-1]
    assert code == own


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_every_size_fits(size):
    """A block's shared memory fits every GPU from sm_80 on, for every number of channels."""
    for inputs in (16, 32, 48, 64, 128, 160, 512):
        for outputs in (16, 32, 48, 64, 80, 512):
            halo = Halo(size, size, inputs, outputs)
            for by_input, statistics in ((True, False), (False, True)):
                assert halo.convolve_constants(by_input, False, True, True, statistics)[1] <= 99 * 1024
            assert halo.weight_grad_constants(True)[1] <= 99 * 1024
