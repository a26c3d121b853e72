"""Compares the fused engine's Triton kernels with autograd, on a GPU or, without one, in Triton's interpreter."""

from __future__ import annotations

import collections
import contextlib
import math
from unittest import mock

import networks
import pytest
import torch
import torch.nn.functional as F
from equality import same
from operations import NETS, error, masked, problem_of, seeded, step
from skips import HAS_A_GPU, HAS_GPU
from swamp_fast.kernels import batch_statistics, compact, convolution, loss, norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from swamp_fast import fast_swamp, naive_swamp, sweep
from swamp_fast.engines.fused import check, coverage, engine
from swamp_fast.engines.fused.compact import CompactBank
from swamp_fast.engines.fused.cuda import dense
from swamp_fast.engines.fused.cuda.halo import Statistics
from swamp_fast.engines.fused.cuda.narrow import narrow
from swamp_fast.engines.fused.cuda.runner import CudaPrograms, lanes_in_cache, lanes_that_fit
from swamp_fast.engines.fused.plan import Convolution
from swamp_fast.engines.trainer import Trainer, first_handle
from swamp_fast.models import build_model
from swamp_fast.studies import packing

DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.usefixtures("large_tiles")


def differs(name: str, batch: int, density: float) -> float:
    problem = problem_of(seeded(NETS[name]), batch, device=DEVICE)
    mask = masked(problem, density)
    return max(error(step(problem, "cuda", mask), step(problem, "autograd", mask)).values())


# Left out: networks whose forward is only written differently from another's; test_fused.py covers them.
OF_THE_TRACER = {"sizes by axis", "sizes of one number", "sizes from the forward", "by keyword"}


# Each of these takes a second or more in the interpreter, and similar networks are tested without --slow.
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
    monkeypatch.setattr(convolution, "MIN_SPLIT_PIXELS", 64)
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
    """The tolerances are those of test_fused.py.

    The interpreter converts bfloat16 to float32 before products, so bfloat16 products are tested only on a GPU.
    """
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


@pytest.mark.as_launched
def test_statistics_and_gradients_over_many_tiles(monkeypatch):
    """There are more tiles than the last program merges at once.

    On a GPU the test is repeated, because programs run at the same time there.
    """
    monkeypatch.setattr(batch_statistics, "TILE_ELEMENTS", 256)
    monkeypatch.setattr(convolution, "BIAS_ELEMENTS", 64)
    lanes, samples, channels, eps = 2, 64 if HAS_GPU else 9, 20, 1e-3
    shape = (lanes, samples, 16, 16, channels)
    source, out_grad, weights, grads = (
        torch.randn(each, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(DEVICE)
        for i, each in enumerate([shape, shape, (lanes, 2 * channels), (lanes, 3 * channels)])
    )
    each = torch.full((4, lanes, channels), torch.nan, dtype=torch.float64, device=DEVICE).unbind()
    arrivals = torch.zeros(lanes, channels, dtype=torch.int32, device=DEVICE)
    to = Statistics(*each, 0, weights, 0, channels, eps, arrivals)
    leaf, parameters = source.clone().requires_grad_(), weights.clone().requires_grad_()
    outs = [
        F.batch_norm(own.movedim(-1, 1), None, None, *both.split(channels), True, 0.0, eps).movedim(1, -1)
        for own, both in zip(leaf, parameters, strict=True)
    ]
    expected = torch.autograd.grad(torch.stack(outs), [leaf, parameters], out_grad)
    for _ in range(20 if HAS_GPU else 1):
        batch_statistics.statistics(source, to)
        torch.testing.assert_close(to.mean, source.mean((1, 2, 3)), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(to.variance, source.var((1, 2, 3), unbiased=False), rtol=1e-12, atol=1e-12)
        own, in_grad = grads.clone(), torch.empty_like(source)
        maps = source, source, out_grad, in_grad, None, False, False
        norm.norm_grad(*maps, to, own, False, True)
        convolution.bias_grad(out_grad, own, 2 * channels, arrivals)
        sums = torch.cat([expected[1], out_grad.sum((1, 2, 3))], 1)
        torch.testing.assert_close(in_grad, expected[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(own - grads, sums, rtol=1e-11, atol=1e-10)
        assert not arrivals.any()


@pytest.mark.parametrize(("classes", "dtype"), [(10, torch.float64), (100, torch.float32), (1000, torch.float64)])
def test_cross_entropy(classes, dtype):
    lanes, samples, exact = 3, 300 if classes == 10 else 7, 1e-12 if dtype == torch.float64 else 1e-5
    generator = torch.Generator().manual_seed(0)
    outputs = 5 * torch.randn(lanes, samples, classes, generator=generator, dtype=dtype).to(DEVICE)
    targets = torch.randint(classes, (lanes, samples), generator=generator).to(DEVICE)
    targets[0, 2] = loss.IGNORED
    outputs[1, 1, 0] = 500.0
    leaf = outputs.clone().requires_grad_()
    each = F.cross_entropy(leaf.flatten(0, 1), targets.flatten(), reduction="none").view(lanes, samples).mean(1)
    found, grad = loss.cross_entropy(outputs, targets)
    torch.testing.assert_close(found, each.detach(), rtol=exact, atol=exact)
    torch.testing.assert_close(grad, torch.autograd.grad(each.sum(), leaf)[0], rtol=exact, atol=exact)
    alone = loss.cross_entropy(outputs[2:], targets[2:])
    assert torch.equal(alone[0], found[2:])
    assert torch.equal(alone[1], grad[2:])
    targets[1, 3] = classes
    assert loss.cross_entropy(outputs, targets)[0].isnan().tolist() == [False, True, False]


def test_runs_in_one_bank(digits, monkeypatch):
    """Runs of a sweep that train in one bank, with different masks, give the same results as each run alone."""
    for module in (engine, check):
        monkeypatch.setattr(module, "programs_of", lambda *given: CudaPrograms(*given[:3], None))
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(engine.FusedEngine, "joins", always, raising=False)
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (2, "forced"))
    model = seeded(lambda: networks.build("dropout"))
    (inputs, targets), (test_inputs, test_targets) = digits
    settings = {"particles": 2, "cycles": 1, "epochs": 1, "ticket_epochs": 0, "batch_size": 4, "progress": False}
    settings |= {"precision": "float64", "keep_particles": True, "device": DEVICE, "engine": "fused"}
    data = (inputs[:4], targets[:4]), (test_inputs[:2], test_targets[:2])
    points = [{"seed": 1, "prune": 0.5}, {"seed": 2, "lr": 0.06}]
    kept = []
    for run in sweep(model, *data, points, **settings).runs:
        assert run.error is None, run.error
        same(run.result, naive_swamp(model, *data, **{**settings, "engine": "auto", **run.point}))
        kept.append(run.result.history[1]["kept"])
    assert kept[0] < kept[1]


@pytest.mark.slow
def test_a_run_in_a_pack_has_the_bits_that_it_has_alone(monkeypatch):
    """This holds even if the run's mask leaves fewer channels alive than the masks of the other runs."""
    for module in (engine, check):
        monkeypatch.setattr(module, "programs_of", lambda *given: CudaPrograms(*given[:3], None))
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(engine.FusedEngine, "joins", always, raising=False)
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (len(problems), "forced"))
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
        )
    )
    data = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    settings = {"particles": 1, "cycles": 1, "epochs": 2, "ticket_epochs": 0, "batch_size": 8, "progress": False}
    settings |= {"device": DEVICE, "engine": "fused"}
    points = [{"seed": 1, "prune": 0.995}, {"seed": 2, "prune": 0.1}, {"seed": 3, "prune": 0.1}]
    for run in sweep(model, data, data, points, **settings).runs:
        assert run.error is None, run.error
        alone = fast_swamp(model, data, data, **settings, **run.point)
        for cycle in (0, 1):
            (packed, masks), (expected, expected_masks) = run.result.at(cycle), alone.at(cycle)
            assert all(torch.equal(masks[name], mask) for name, mask in expected_masks.items())
            for name, tensor in expected.state_dict().items():
                assert torch.equal(packed.state_dict()[name], tensor), (run.point, cycle, name)


@pytest.mark.parametrize("groups", ["at_once", "branch"])
def test_bits_depend_on_nothing_but_the_lane(groups, monkeypatch):
    """A lane's bits don't depend on the number of lanes in all, per launch, or per parallel group."""
    problem = problem_of(seeded(NETS["branches"]), 3, "float32", device=DEVICE)
    mask = masked(problem, 0.4)
    reference = step(problem, "cuda", mask, lanes=3)
    original = CudaPrograms.__init__

    def in_twos(self, *arguments):
        original(self, *arguments)
        setattr(self, groups, 2)

    monkeypatch.setattr(CudaPrograms, "__init__", in_twos)
    if not HAS_GPU:  # without a GPU there are no streams
        monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for lanes in (3, 1):
        for what, each in step(problem, "cuda", mask, lanes=lanes).items():
            assert torch.equal(each, reference[what][:lanes]), (what, lanes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_groups_beside_each_other_give_the_same_bits(precision):
    """This holds in a captured step too, in which the groups are parallel branches of the CUDA graph."""
    settings = {"particles": 5, "cycles": 1, "epochs": 2, "ticket_epochs": 1, "batch_size": 16, "progress": False}
    settings |= {"keep_particles": True, "device": DEVICE, "engine": "fused", "precision": precision}
    data = torch.randn(70, 3, 16, 16), torch.arange(70) % 5
    results = []
    for branch in (None, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("swamp_fast.engines.start.faster_branch", lambda *given, branch=branch: branch)
            results.append(fast_swamp(seeded(Wide), data, **settings))
        assert results[-1].engine["branch"] == branch
        assert results[-1].engine["cuda_graph"]
    for name, each in results[0].particles.items():
        assert torch.equal(each, results[1].particles[name]), name


def test_parts_of_weight_gradients():
    """Each part has at least 512 pixels, and there are fewer parts if all together would exceed 2^20 numbers."""
    splits = convolution.weight_grad_splits
    assert [splits(128 * 8 * 8, 9 * 32 * 64), splits(128 * 32 * 32, 9 * 3 * 16), splits(100, 640)] == [16, 64, 1]
    assert [splits(10**6, 9 * 128 * 256), splits(10**6, 9 * 512 * 512), splits(10**6, 2**31)] == [3, 1, 1]


def test_gradients_beyond_what_32_bits_number(tmp_path):
    """If a lane's parts have more than 2^31 numbers, 64-bit indices are used; the data comes from a sparse file."""
    first, length = dense.begins_of({3: 36_000_000, 5: 4096}, {3: 64, 5: 2})
    assert (first, length) == ({3: 0, 5: 36_000_000 * 64}, 36_000_000 * 64 + 2 * 4096)
    assert [dense.index_type(each) for each in (length, 2**31 - 1)] == [torch.int64, torch.int32]
    if HAS_GPU:
        return
    far, lanes = 2**30, torch.zeros(1, dtype=torch.int64)
    partial, grads = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far + 64)[None], torch.ones(1, 16)
    partial[0, 7 : 3 * far + 8 : far] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    base, step, parts = torch.full((1, 16), -1), *torch.zeros(2, 1, 16, dtype=torch.int32)
    base[0, 5], step[0, 5], parts[0, 5] = 7, far, 4
    compact.collect_gradients(partial, base, step, parts, lanes, grads)
    assert grads[0].tolist() == [1.0] * 5 + [1112.0] + [1.0] * 10


def test_lanes_in_cache():
    """The input and the output maps of 3 lanes fill half of the cache."""
    plan = coverage.fused_plan(problem_of(networks.build("residual"), 4, "float32", (1, 8, 8)))
    largest = max(math.prod(shape) for shape in plan.shapes)
    assert lanes_in_cache(plan, 4, 2, 4 * largest * 4 * 2 * 3) == 3
    assert lanes_in_cache(plan, 4, 2, 10) == 1


def test_lanes_are_split_by_the_memory_that_is_free():
    assert lanes_that_fit(8, 10**9, 10**11) == 8
    with pytest.warns(UserWarning, match="4 of 8 particles run at once: a step of one particle takes about 1.00 GB"):
        assert lanes_that_fit(8, 10**9, 10**10) == 4
    with pytest.raises(MemoryError, match="use a smaller batch_size"):
        lanes_that_fit(8, 10**9, 10**9)


@pytest.mark.slow  # test_pretended.py has a smaller case
@pytest.mark.parametrize("name", ["dropout", "residual"])
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


class Wide(nn.Module):
    """A network wide enough that dead channels are removed.

    It has a norm without ReLU, and a sum whose two terms must keep the same channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 32, 3, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(32, 48, 1, bias=False), nn.Conv2d(48, 32, 3, padding=1, bias=False)
        self.n0, self.n1, self.n2, self.n3 = (nn.BatchNorm2d(each) for each in (48, 32, 48, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.n0(self.a(x)))
        x = F.relu(self.n1(self.b(x)))
        x = F.relu(self.n3(self.d(F.relu(self.n2(self.c(x))))) + x)
        return self.head(x.mean((2, 3)))


def dead_channels(problem) -> torch.Tensor:
    """A mask under which most channels of layers a and c are dead.

    The channels of a are dead because all channels of b that read them are dead.
    """
    mask = masked(problem, 0.5)
    views = problem.layout.mask_views(mask)
    views["b.weight"][:, 5:40] = False
    views["b.weight"][3, 5] = True
    views["d.weight"][:, 7:] = False
    views["c.weight"][:, 3] = False
    return mask


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_dead_channels_are_skipped(precision):
    """Outputs, losses, gradients and the statistics of live channels equal those of the full model bit for bit."""
    model = seeded(Wide)
    problem = problem_of(model, 5, precision, (3, 5, 5), DEVICE)
    mask = dead_channels(problem)
    programs = CudaPrograms(problem, coverage.fused_plan(problem), mask, None)
    kept = programs.plan.shapes
    convolutions = [op for op in programs.plan.ops if isinstance(op, Convolution)]
    assert [kept[op.output][0] for op in convolutions] == [16, 32, 16, 32, 5]
    assert programs.columns.tolist()[:5] == [0, 1, 2, 3, 4]
    found, exact = step(problem, "cuda", mask), step(problem, "autograd", mask)
    statistics = {name for name in exact if "running" in name}
    bound = 1e-12 if precision == "float64" else 1e-5
    errors = error(found, {name: each for name, each in exact.items() if name not in statistics})
    assert max(errors.values()) <= bound, errors
    dead = problem.layout.mask_views(mask)["d.weight"].flatten(2).any(2).any(0).logical_not()
    assert dead.sum() == 41
    for name in ("n2.running_mean", "n2.running_var"):
        torch.testing.assert_close(found[name][:, ~dead], exact[name][:, ~dead], rtol=bound, atol=bound)
        assert torch.equal(found[name][:, -1], torch.full_like(found[name][:, -1], float("var" in name)))


class Mixed(nn.Module):
    """A network whose channels are all kept, because grouped convolutions, concatenations or flattening read them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.c, self.d = nn.Conv2d(32, 32, 1), nn.Conv2d(64, 32, 3, padding=1)
        self.head = nn.Linear(32 * 25, 5)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        x = self.c(x)
        x = torch.cat([x, F.relu(x)], 1)
        return self.head(F.relu(self.d(x)).flatten(1))


def test_what_is_mixed_stays_whole():
    problem = problem_of(seeded(Mixed), 3, shape=(3, 5, 5), device=DEVICE)
    mask = masked(problem, 0.5)
    for name, view in problem.layout.mask_views(mask).items():
        if not name.startswith("a."):
            view[:, 1:] = False
    plan = coverage.fused_plan(problem)
    assert narrow(plan, problem.layout, mask)[0] == plan
    assert max(error(step(problem, "cuda", mask), step(problem, "autograd", mask)).values()) <= 1e-12


@pytest.mark.skipif(HAS_GPU, reason=f"{HAS_A_GPU}: counts calls of the interpreter")
@pytest.mark.parametrize("lanes", [1, 8])
def test_launches_of_a_step(lanes, monkeypatch):
    """Limits the launches in a step of ResNet-20, because each costs a GPU about 3 us in addition to its work."""
    launches: list[str] = []

    def counted(self, grid):
        return lambda *arguments, **constants: launches.append(self.fn.__name__)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            if not operation.is_view and not operation._schema.name.startswith("aten::empty"):
                launches.append(operation._schema.name)
            return operation(*arguments, **(keywords or {}))

    def launch(name, *arguments):
        launches.append(name)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", counted)
    model = build_model("resnet20", channels=3, height=32, width=32, classes=10)
    problem = problem_of(model, 4, "bfloat16", (3, 32, 32))
    programs = CudaPrograms(problem, coverage.fused_plan(problem), problem.mask, launch)
    bank = CompactBank(programs.compacts, [problem.config], lanes, problem.dtype)
    grads = torch.zeros_like(bank.weights)
    trainer = Trainer(problem, bank, grads, programs.lanes(bank.weights, grads))
    for module in trainer.runner.modules:
        module.train()
    handle = first_handle(problem, bank)
    trainer.step(handle)  # the first step makes the tables
    launches.clear()
    with Counter():
        trainer.step(handle)
    assert collections.Counter(launches)["convolve"] == 32
    assert len(launches) <= 144, collections.Counter(launches)
