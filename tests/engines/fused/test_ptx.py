"""Tests of the PTX that NVRTC compiles from csrc/cuda, run by the interpreter in ptx.py, and of the interpreter itself.

The kernels must pass the tests of test_cuda_kernels.py with the same tolerances. Those tests alone can't detect a
missing barrier: on the CPU, a whole block waits where on a GPU only a warp does.
"""

from __future__ import annotations

import ctypes
import re

import ptx
import pytest
import test_cuda_kernels
import torch
from ptx_instructions import Fault, Race
from skips import HAS_GPU
from torch.utils._python_dispatch import TorchDispatchMode

from swamp_fast.engines.fused.cuda import nvrtc
from swamp_fast.engines.fused.cuda.halo import Halo
from swamp_fast.ops.backends import why_no_nvrtc

# A tile is some rows of a picture in the first case, and several pictures in the second, whose last tile is not full.
CONVOLVED = [(Halo(16, 16, 16, 16), 3), (Halo(8, 8, 48, 16), 5)]  # weights loaded once, and in three chunks
WEIGHTED = [(Halo(16, 16, 16, 16), 2), (Halo(8, 8, 32, 16), 5)]  # eight and four warps share a quadrant
BARRIER = "__syncthreads();"
BARRIERS = nvrtc.sources_of("convolve")["convolve.cu"].decode().count(BARRIER)
slow = pytest.mark.slow


class Emulated(TorchDispatchMode):
    """Launches kernels in the PTX interpreter; they may access the tensors that are created while the context is open.

    without  the index of a barrier to remove from convolve.cu; None removes none
    """

    def __init__(self, without: int | None = None) -> None:
        super().__init__()
        self.without, self.tensors, self.launches = without, [], 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        out = operation(*arguments, **(keywords or {}))
        if isinstance(out, torch.Tensor):
            if operation._schema.name.startswith("aten::empty") and out.is_floating_point():
                out.fill_(torch.nan)
            self.tensors.append(out)  # keep it alive, so that no other tensor gets its address
        return out

    def __call__(self, name, constants, grid, shared_bytes, params) -> None:
        sources = nvrtc.sources_of(name)
        if self.without is not None and name == "convolve":
            pieces = sources["convolve.cu"].decode().split(BARRIER)
            before, after = (BARRIER.join(each) for each in (pieces[: self.without + 1], pieces[self.without + 1 :]))
            sources["convolve.cu"] = f"{before};{after}".encode()
        code, _ = nvrtc.build(name, sources, constants, "compute_90")
        self.launches += 1
        ptx.run(code.decode(), grid, nvrtc.THREADS_PER_BLOCK, shared_bytes, [params], self.tensors, seed=self.launches)


@pytest.fixture
def emulated(monkeypatch):
    """A context in which the tests of test_cuda_kernels.py run the kernels' PTX in the interpreter."""
    if HAS_GPU:
        pytest.skip("with a GPU the kernels themselves run: see tests/engines/fused/test_cuda_kernels.py")
    reason = why_no_nvrtc()
    if reason is not None:
        pytest.skip(f"the kernels can't be compiled: {reason}")

    def made(without: int | None = None) -> Emulated:
        launch = Emulated(without)
        monkeypatch.setattr(test_cuda_kernels, "LAUNCH", launch)
        return launch

    return made


@slow
@pytest.mark.parametrize(("halo", "samples"), CONVOLVED, ids=str)
def test_convolve(halo, samples, emulated, monkeypatch):
    """The convolution has a prologue, a bias, and statistics that the last of several blocks merges."""
    with emulated() as launch:
        test_cuda_kernels.test_convolve(halo, samples, True, monkeypatch)
    assert launch.launches == 1


@slow
@pytest.mark.parametrize(("halo", "samples"), CONVOLVED, ids=str)
def test_convolve_by_input(halo, samples, emulated, monkeypatch):
    """The result is added to the output. Blocks compute one tile in one case and several tiles in the other."""
    with emulated() as launch:
        test_cuda_kernels.test_convolve_by_input(halo, samples, monkeypatch)
    assert launch.launches == 2


@slow
@pytest.mark.parametrize(("halo", "samples"), WEIGHTED, ids=str)
def test_weight_grad(halo, samples, emulated):
    with emulated() as launch:
        test_cuda_kernels.test_weight_grad(halo, samples, True)
    assert launch.launches == 1


@slow
@pytest.mark.parametrize("without", range(BARRIERS))
def test_a_removed_barrier_is_a_race(without, emulated, monkeypatch):
    """Removing any barrier of convolve.cu is detected, with weights in chunks. With all barriers, this case passes."""
    with emulated(without), pytest.raises(Race, match="byte .* of shared memory .* without a barrier"):
        test_cuda_kernels.test_convolve(*CONVOLVED[1], True, monkeypatch)


TO_NEIGHBOUR = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry passed_on(.param .u64 .ptr .global .align 4 to, .param .u32 distance)
{
    .reg .pred %p<2>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [to];
    ld.param.u32 %r1, [distance];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, memory;
    mad.lo.s32 %r4, %r2, 4, %r3;
    st.shared.u32 [%r4], %r2;
    BARRIER
    add.s32 %r5, %r2, %r1;
    and.b32 %r6, %r5, 63;
    mad.lo.s32 %r7, %r6, 4, %r3;
    ld.shared.u32 %r8, [%r7];
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.lt.u32 %p1, %r2, 63;
    @%p1 st.global.u32 [%rd3], %r8;
    ret;
}
"""


def passed_on(distance: int, barrier: str = "", size: int = 63, edit: tuple[str, str] = ("", ""), shared: int = 256):
    """Run a kernel in which each thread of two warps stores a number and reads the one stored `distance` threads ahead.

    Returns the numbers that the threads read.
    """
    to = torch.full((size,), -1, dtype=torch.int32)
    code = TO_NEIGHBOUR.replace("BARRIER", barrier).replace(*edit)
    ptx.run(code, (1, 1, 1), 64, shared, [ctypes.c_void_p(to.data_ptr()), ctypes.c_int(distance)], [to])
    return to


def test_what_passes_from_thread_to_thread_needs_a_barrier():
    expected = torch.arange(63, dtype=torch.int32)
    assert torch.equal(passed_on(0), expected)
    for distance in (1, 32):
        assert torch.equal(passed_on(distance, "bar.sync 0;"), (expected + distance) % 64)
        with pytest.raises(Race, match="without a barrier: (ld|st).shared.u32"):
            passed_on(distance)


def test_two_threads_that_write_one_place_are_a_race():
    with pytest.raises(Race, match="is written, and another thread has written it"):
        passed_on(0, edit=("mad.lo.s32 %r4, %r2, 4, %r3", "mov.u32 %r4, %r3"))
    with pytest.raises(Race, match="is written, and another thread has read it"):
        passed_on(0, "bar.sync 0; ld.shared.u32 %r8, [%r3]; st.shared.u32 [%r4], %r8;")


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        ("outside the tensors: @%p1 st.global.u32", {"size": 62}),
        ("outside the 252 bytes of shared memory: st.shared", {"shared": 252}),
        ("not a multiple of 4: @%p1 st.global.u32", {"edit": ("[%rd3]", "[%rd3+2]")}),
        (
            "only some lanes of a warp wait at a barrier",
            {"barrier": "setp.lt.u32 %p1, %r2, 40; @%p1 bar.sync 0;"},
        ),
        ("outside the parameters: ld.param", {"edit": ("[distance]", "[distance+4]")}),
        ("some warps have ended", {"barrier": "setp.lt.u32 %p1, %r2, 32; @%p1 ret; bar.sync 0;"}),
    ],
)
def test_what_a_gpu_leaves_undefined_is_told(told, arguments):
    with pytest.raises(Fault, match=re.escape(told)):
        passed_on(0, **{"barrier": "bar.sync 0;", **arguments})


def test_shared_memory_begins_as_nan():
    found = passed_on(0, edit=("st.shared.u32 [%r4], %r2;", "")).view(torch.float32)
    assert found.isnan().all()


def test_lanes_part_and_meet_again():
    """Each lane runs a loop as many times as its number; after the loop, the whole warp waits at a barrier."""
    loop = """
    mov.u32 %r6, 0;
    $L1: setp.ge.u32 %p1, %r6, %r2;
    @%p1 bra $L2;
    add.u32 %r6, %r6, 1;
    bra.uni $L1;
    $L2: st.shared.u32 [%r4], %r6;
    bar.sync 0;
    """
    assert torch.equal(passed_on(2, loop), (torch.arange(63, dtype=torch.int32) + 2) % 64)


def test_an_instruction_that_is_not_known_is_told():
    with pytest.raises(NotImplementedError, match=r"not known to the interpreter of PTX: popc.b32 %r5, %r2"):
        passed_on(0, "popc.b32 %r5, %r2;")
    with pytest.raises(TypeError, match="the parameters have"):
        ptx.run(TO_NEIGHBOUR.replace("BARRIER", ""), (1, 1, 1), 64, 0, [ctypes.c_int(0)], [])
