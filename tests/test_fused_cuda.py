"""The fused engine's Triton kernels against autograd: in the interpreter without a GPU, or on one."""

from __future__ import annotations

import networks
import pytest
import torch
from conftest import HAS_GPU, _interprets
from swamp_fast.kernels import convolution
from test_fused import NETS, error, masked, problem_of, seeded, step
from test_odd_models import same

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines.fused import check, engine
from swamp_fast.engines.fused.cuda.lanes import CudaPrograms, lanes_that_fit

DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not HAS_GPU and not _interprets(), reason="the interpreter of Triton before 3.9 needs NumPy before 2.4"
)


@pytest.fixture(autouse=True)
def _large_tiles(request, monkeypatch):
    """The interpreter takes milliseconds a program, whatever its size; `as_launched` keeps the GPU's tiles."""
    if not HAS_GPU and "as_launched" not in request.keywords:
        for size in (2, 4, 8):
            monkeypatch.setitem(convolution.PIXELS, size, 512)


def differs(name: str, batch: int, density: float) -> float:
    problem = problem_of(seeded(NETS[name]), batch, device=DEVICE)
    mask = masked(problem, density)
    return max(error(step(problem, "cuda", mask), step(problem, "autograd", mask)).values())


# What differs from another network in how its forward is written only, tests/test_fused.py has.
OF_THE_TRACER = {"sizes by axis", "sizes of one number", "sizes from the forward", "by keyword"}


# A second or more each in the interpreter: enough of a kind in the ordinary tier.
MORE = {name for name in NETS if name.startswith(("activation", "maximum", "average", "adaptive"))}
MORE -= {"activation elu", "maximum, overlapping", "average, its own counts"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MORE)) for name in NETS if name not in OF_THE_TRACER],
)
def test_every_operation_in_float64(name):
    assert differs(name, 3, 0.4) <= 1e-12


@pytest.mark.as_launched
@pytest.mark.parametrize("name", ["3x3", "dilated, stride 2"])
def test_many_tiles_and_parts(name, monkeypatch):
    monkeypatch.setattr(convolution, "SPLIT_PIXELS", 64)
    assert differs(name, 4, 1.0) <= 1e-12


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("density", [0.2, 0.0])
def test_batch_sizes_and_empty_layers(batch, density):
    for name in ("stride 2", "norm of features", "branches"):
        if batch == 1 and name in ("norm of features", "branches"):
            continue
        assert differs(name, batch, density) <= (1e-10 if density == 0 else 1e-12)  # as in test_fused.py


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["residual", "dropout"])
def test_as_exact_as_autograd(name, precision, monkeypatch):
    """As test_fused.py; bfloat16 is upcast before products here, so those are proven on a GPU only."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shape, few = (1, 8, 8), 6
    exact_problem, problem = (
        problem_of(networks.build(name), few, each, shape, DEVICE) for each in ("float64", precision)
    )
    mask = masked(problem, 0.3)
    exact = step(exact_problem, "autograd", mask)
    ours, theirs = (error(step(problem, kind, mask), exact) for kind in ("cuda", "autograd"))
    for what in ("losses", "gradients", "outputs"):
        print(name, precision, what, f"ours {ours[what]:.1e}, autograd's {theirs[what]:.1e}")
        assert ours[what] <= 2 * theirs[what] + (1e-6 if precision == "float32" else 1e-3)


def test_bits_depend_on_nothing_but_the_lane(monkeypatch):
    """Not on how many lanes there are, or run at once."""
    problem = problem_of(seeded(NETS["branches"]), 3, "float32", device=DEVICE)
    mask = masked(problem, 0.4)
    reference = step(problem, "cuda", mask, lanes=3)
    original = CudaPrograms.__init__

    def two_at_once(self, *arguments):
        original(self, *arguments)
        self.at_once = 2

    monkeypatch.setattr(CudaPrograms, "__init__", two_at_once)
    for lanes in (3, 1):
        for what, each in step(problem, "cuda", mask, lanes=lanes).items():
            assert torch.equal(each, reference[what][:lanes]), (what, lanes)


def test_lanes_are_split_by_the_memory_that_is_free():
    assert lanes_that_fit(8, 10**9, 10**11) == 8
    with pytest.warns(UserWarning, match="4 of 8 particles run at once: a step of one particle takes about 1.00 GB"):
        assert lanes_that_fit(8, 10**9, 10**10) == 4
    with pytest.raises(MemoryError, match="use a smaller batch_size"):
        lanes_that_fit(8, 10**9, 10**9)


@pytest.mark.parametrize("name", ["dropout", pytest.param("residual", marks=pytest.mark.slow)])
def test_a_run_equals_the_naive_loops(name, digits, monkeypatch):
    for module in (engine, check):
        monkeypatch.setattr(module, "programs_of", lambda *given: CudaPrograms(*given[:3], None))
    torch.manual_seed(0)
    model = networks.build(name)
    (inputs, targets), (test_inputs, test_targets) = digits
    settings = {"particles": 2, "cycles": 1, "epochs": 1, "ticket_epochs": 1, "batch_size": 6, "progress": False}
    settings |= {"precision": "float64", "keep_particles": True, "device": DEVICE}
    data = (inputs[:12], targets[:12]), (test_inputs[:4], test_targets[:4])
    fast = fast_swamp(model, *data, engine="fused", **settings)
    assert fast.engine["engine"] == "fused"
    same(fast, naive_swamp(model, *data, **settings))
