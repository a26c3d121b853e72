"""Tests of the analyses against closed forms, plain loops over copied modules, and numbers computed by hand."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from networks import Product, build
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import swamp_fast.analysis
from swamp_fast.analysis import (
    Analysis,
    BarrierMatrix,
    Path,
    TicketStability,
    barrier_matrix,
    channels,
    contour,
    ensemble,
    hessian_trace,
    hull,
    inference_cost,
    loss_barrier,
    loss_plane,
    mask_overlap,
    predictions,
    table,
)
from swamp_fast.analysis.hessian import quadratic_forms
from swamp_fast.common.statistics import quantile
from swamp_fast.data.store import pass_in_stored_order
from swamp_fast.particles.random import split_order

EXACT = {"rel": 1e-12, "abs": 1e-12}
SAME = {"rel": 1e-8, "abs": 1e-8}  # in float64, for engines that sum in a different order


def state_of(model: nn.Module, seed: int = 0, noise: float = 0.3, density: float = 1.0) -> dict[str, Tensor]:
    """The model's state with noise added to its parameters and some of them pruned."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.detach().clone().double() for name, tensor in model.named_parameters()}
    for name, own in state.items():
        own += noise * torch.randn(own.shape, generator=generator, dtype=own.dtype) * own.std().nan_to_num(1)
        if own.dim() > 1 and name != "head.weight":
            own *= torch.rand(own.shape, generator=generator) < density
    buffers = {name: b.clone().double() if b.is_floating_point() else b.clone() for name, b in model.named_buffers()}
    return {**state, **buffers}


def between(a: dict[str, Tensor], b: dict[str, Tensor], t: float) -> dict[str, Tensor]:
    return {name: (1 - t) * a[name] + t * b[name] if a[name].is_floating_point() else a[name] for name in a}


def pictures(n: int = 96, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def alone(
    model: nn.Module, state: dict[str, Tensor], train: object, data: object, batch: int, reestimate: bool = True
) -> tuple[float, float, Tensor]:
    """Loss, error and outputs by a plain loop, with BatchNorm statistics as the mean over equal batches."""
    module = copy.deepcopy(model).double()
    module.load_state_dict(state)
    module.eval()
    inputs, targets = (each.double() if each.is_floating_point() else each for each in data)
    if reestimate:
        norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # running statistics are then the mean over all batches
            norm.train()
        with torch.no_grad():
            for part in train[0].double().split(batch):
                module(part)
    with torch.no_grad():
        outputs = module.eval()(inputs)
    return (
        float(nn.functional.cross_entropy(outputs, targets)),
        float((outputs.argmax(1) != targets).double().mean()),
        outputs,
    )


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    return build("residual")


def analysis(model: nn.Module, engine: str = "eager", **settings: object) -> Analysis:
    sizes = {"precision": "float64", "batch_size": 32, "engine": engine}
    return Analysis(model, pictures(), pictures(50, 2), **{**sizes, **settings})


# Tests with a model whose losses are known in closed form: out = w x, loss = +-out^2 / 2.


def quadratic(inputs: Tensor, sign: float = 1.0) -> Analysis:
    """An analysis with the loss sign * (w x)^2 / 2, whose Hessian is sign times the mean of x x'."""
    return Analysis(
        *(Product(inputs.shape[1]), (inputs, torch.zeros(len(inputs)))),
        loss=lambda outputs, targets: sign * 0.5 * outputs.squeeze(1) ** 2,
        prunable="layer.weight",
        batch_size=4,
        precision="float64",
        engine="eager",
    )


def test_the_trace_of_a_quadratic_is_exact():
    """If inputs have one non-zero coordinate, the Hessian is diagonal, so every probe gives the exact trace."""
    inputs = torch.diag(torch.arange(1.0, 8.0, dtype=torch.float64))  # 7 samples, in batches of 4 and 3
    on, weight = quadratic(inputs), torch.linspace(-1, 1, 7, dtype=torch.float64)[None]
    kept = torch.tensor([[True, False, True, True, True, False, True]])
    found = hessian_trace(on, {"layer.weight": weight * kept}, {"layer.weight": kept}, probes=3)
    expected = sum((i + 1) ** 2 for i in (0, 2, 3, 4, 6)) / 7
    assert found.trace == pytest.approx(expected, **EXACT)
    assert found.half_width == pytest.approx(0, abs=1e-12)
    norm = float((weight * kept).norm())
    assert found.scaled == pytest.approx(norm**2 / 5 * expected, **EXACT)
    assert (found.layers["layer.weight"].kept, found.samples) == (5, 7)
    assert found.layers["layer.weight"].norm == pytest.approx(norm, **EXACT)
    fewer = hessian_trace(on, {"layer.weight": weight * kept}, {"layer.weight": kept}, probes=2, samples=3)
    some = [(i + 1) ** 2 for i in split_order(7)[:3].tolist() if kept[0, i]]
    assert fewer.trace == pytest.approx(sum(some) / 3, **EXACT)
    with pytest.raises(ValueError, match="`probes` must be at least 2"):
        hessian_trace(on, {"layer.weight": weight}, {}, probes=1)


def test_the_barrier_of_a_quadratic_is_exact():
    inputs = torch.randn(9, 5, dtype=torch.float64)
    a, b = (torch.randn(1, 5, dtype=torch.float64) for _ in range(2))
    for sign in (1.0, -1.0):
        on = quadratic(inputs, sign)
        path = loss_barrier(on, {"layer.weight": a}, {"layer.weight": b}, points=11)
        t = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
        losses = sign * 0.5 * (((1 - t) * a + t * b) @ inputs.T).square().mean(1)
        assert path.train_loss == pytest.approx(losses.tolist(), **EXACT)
        assert (path.train_error, path.test_loss, path.train_samples) == (None, None, 9)
        # With q(w) = mean of (w x)^2, -q / 2 rises above its chord by t (1 - t) q(a - b) / 2, the most at t = 1 / 2.
        rise = float(((a - b) @ inputs.T).square().mean()) / 8
        assert path.barrier("train_loss", "line") == pytest.approx(rise if sign < 0 else 0, **EXACT)
        mean = float(losses.max() - losses[[0, -1]].mean())
        assert path.barrier("train_loss", "mean") == pytest.approx(mean, **EXACT)
        assert path.barrier() == pytest.approx(float(losses.max() - max(losses[0], losses[-1])), **EXACT)
        opposite = loss_barrier(on, {"layer.weight": a}, {"layer.weight": -a}, points=3)
        hill = float((a @ inputs.T).square().mean()) / 2
        assert opposite.barrier() == pytest.approx(hill if sign < 0 else 0, **EXACT)
        with pytest.raises(ValueError, match="no train_error: the analysis has no accuracies"):
            path.barrier("train_error")
        with pytest.raises(ValueError, match="no test_loss: the analysis has no test data"):
            path.barrier("test_loss")
        with pytest.raises(ValueError, match='"max", "mean", "line", got "median"'):
            path.barrier(over="median")
    with pytest.raises(ValueError, match="`points` must be at least 3"):
        loss_barrier(on, {"layer.weight": a}, {"layer.weight": b}, points=2)


# Tests of the Hessian of networks.


def test_nan_on_a_path_is_no_connection():
    def path(*losses: float) -> Path:
        rest = {"train_error": None, "test_loss": None, "train_samples": 1}
        return Path(t=[0, 0.5, 1], train_loss=list(losses), test_error=list(losses), **rest)

    for losses in ((0.1, math.nan, 0.1), (0.1, 0.1, math.nan), (math.nan, 0.1, 0.1)):
        assert all(math.isnan(path(*losses).barrier(over=over)) for over in ("max", "mean", "line"))
    broken, sound = path(0.1, math.nan, 0.1), path(0.1, 0.1, 0.1)
    assert TicketStability([0, 2], [sound, broken], 0.02).recommended is None
    assert TicketStability([0, 2], [broken, sound], 0.02).recommended == 2
    matrix = BarrierMatrix(3, {(0, 1): sound, (0, 2): broken, (1, 2): sound}).matrix()
    about = {"train_samples": 1, "of_training_samples": 1}
    particles = {"cycle": 0, "matrix": {"train_loss": matrix}}
    nothing = {"consecutive": [], "hessian": [], "masks": [], "cost": [], "ensemble": None}
    shown = table({"about": about, "particles": particles, **nothing})
    assert "highest barrier among the particles of cycle 0: nan" in shown


class Curved(nn.Module):
    """A small network with BatchNorm and smooth second derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.hidden, self.head = nn.Linear(2, 3), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x))).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


def test_the_trace_of_a_network_is_that_of_its_hessian():
    model = Curved()
    on, state = analysis(model), state_of(model, 3)
    state["norm.running_mean"] += 0.3  # the Hessian must use the statistics of the state
    masks = {name: torch.rand(state[name].shape) < 0.6 for name in ("conv.weight", "hidden.weight")}
    state |= {name: state[name] * mask for name, mask in masks.items()}
    inputs, targets = pictures()

    def loss(flat: Tensor) -> Tensor:
        sizes = [entry.size for entry in on.problem.layout.entries]
        named = {e.name: p.view(e.shape) for e, p in zip(on.problem.layout.entries, flat.split(sizes), strict=True)}
        module = copy.deepcopy(model).double().eval()
        outputs = torch.func.functional_call(module, {**state, **named}, (inputs.double(),))
        return nn.functional.cross_entropy(outputs, targets)

    entries = on.problem.layout.entries
    flat = torch.cat([state[entry.name].flatten() for entry in entries])
    hessian = torch.autograd.functional.hessian(loss, flat)
    kept = torch.cat([masks.get(e.name, torch.ones(e.shape)).flatten().double() for e in entries])
    diagonal = (hessian.diagonal() * kept).split([entry.size for entry in entries])
    exact = {entry.name: float(part.sum()) for entry, part in zip(entries, diagonal, strict=True)}

    places = torch.cat([torch.arange(entry.begin, entry.end) for entry in entries])[kept.bool()]
    units = torch.zeros(len(places), on.problem.layout.P, dtype=torch.int8)
    units[torch.arange(len(places)), places] = 1
    forms = quadratic_forms(on, on.solution(state), units, on.train)
    for name, trace in exact.items():
        assert float(forms[name].sum()) == pytest.approx(trace, rel=1e-9, abs=1e-12), name

    found = hessian_trace(on, state, masks, probes=64)
    assert abs(found.trace - sum(exact.values())) < found.half_width
    scaled = sum(
        float(state[e.name].norm()) ** 2 / int(masks.get(e.name, torch.ones(e.shape)).sum()) * exact[e.name]
        for e in entries
    )
    assert abs(found.scaled - scaled) < found.scaled_half_width
    assert sum(layer.trace for layer in found.layers.values()) == pytest.approx(found.trace, **EXACT)
    assert found.norm == pytest.approx(float(flat.norm()), **EXACT)


def test_the_scaled_trace_does_not_depend_on_the_scale_of_a_layer():
    """The weights of a convolution before BatchNorm are multiplied by 3, which leaves the function unchanged."""
    model = Curved()
    on, state = analysis(model), state_of(model, 3)
    state["conv.bias"].zero_()
    larger = {**state, "conv.weight": 3 * state["conv.weight"]}
    larger["norm.running_mean"], larger["norm.running_var"] = (
        3 * state["norm.running_mean"],
        9 * state["norm.running_var"],
    )
    for module in on.problem.template.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # has no effect in float64; torch 2.11 refuses 0
    # Unit vectors give the exact trace. Random probes would not give exactly one ninth, because of off-diagonal terms.
    units = torch.zeros(18, on.problem.layout.P, dtype=torch.int8)
    (entry,) = (each for each in on.problem.layout.entries if each.name == "conv.weight")
    units[torch.arange(18), torch.arange(entry.begin, entry.end)] = 1
    points = [on.solution(each) for each in (state, larger)]
    one, other = (float(quadratic_forms(on, point, units, on.train)["conv.weight"].sum()) for point in points)
    assert one == pytest.approx(9 * other, rel=1e-9)
    norms = [hessian_trace(on, each, {}, probes=2).layers["conv.weight"].norm for each in (state, larger)]
    assert norms[0] ** 2 * one == pytest.approx(norms[1] ** 2 * other, rel=1e-9)


@pytest.mark.parametrize("name", ["vit", "sequence_first", "tied"])
def test_products_with_the_hessian_are_differences_of_gradients(name):
    model = build(name)
    on = analysis(model, batch_size=96)
    point = on.solution(state_of(model, 2, 0.0))
    vector = torch.randint(0, 2, (1, on.problem.layout.P), dtype=torch.int8) * 2 - 1
    found = quadratic_forms(on, point, vector, on.train)
    inputs, targets = (each.double() if each.is_floating_point() else each for each in pictures())

    def gradients(step: float) -> dict[str, Tensor]:
        module = copy.deepcopy(on.problem.template).eval()
        moved = on.problem.layout.views(point.weights + step * vector[0])
        with torch.no_grad():
            for own, parameter in module.named_parameters():
                parameter.copy_(moved[own])
        nn.functional.cross_entropy(module(inputs), targets).backward()
        return {own: parameter.grad for own, parameter in module.named_parameters()}

    above, below = gradients(1e-8), gradients(-1e-8)  # so small that hardly any ReLU changes sides
    directions = on.problem.layout.views(vector[0].double())
    for own, value in found.items():
        expected = float((directions[own] * (above[own] - below[own])).sum()) / 2e-8
        assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-4), own


def test_students_t():
    from scipy import stats

    for freedom in [*range(1, 31), 99, 1000]:
        for level in (0.5, 0.95, 0.999):
            assert quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)
    with pytest.raises(ValueError, match="at least two values"):
        quantile(0.95, 0)


# Tests of many models that are evaluated at once.


@pytest.mark.parametrize("way", ["lanes", "fold", "fold_grouped", "fused"])
def test_lanes_are_what_models_are_alone(residual, way):
    """Lanes with different supports, in chunks with fewer lanes than models, give the scores of each model alone."""
    a, b = state_of(residual, 1, density=0.5), state_of(residual, 2, density=0.3)
    name = "fused" if way == "fused" else f"eager:{way}"
    on = analysis(residual, name)
    path = loss_barrier(on, a, b, points=7)
    assert on.engines is not None
    assert on.engines.name == name
    with mock.patch.object(Analysis, "_lanes_at_once", return_value=3):
        assert loss_barrier(on, a, b, points=7).train_loss == pytest.approx(path.train_loss, **SAME)
    for place, t in enumerate(path.t):
        for split, data in (("train", pictures()), ("test", pictures(50, 2))):
            loss, error, _ = alone(residual, between(a, b, t), pictures(), data, 32)
            assert path.of(f"{split}_loss")[place] == pytest.approx(loss, **SAME)
            assert path.of(f"{split}_error")[place] == pytest.approx(error, **SAME)


def test_batchnorm_is_re_estimated_at_every_point(residual):
    a, b = state_of(residual, 1), state_of(residual, 2)
    for state in (a, b):  # far from the statistics that the weights give
        state["norm1.running_var"] /= 100
    on = analysis(residual)
    anew, given = (loss_barrier(on, a, b, points=3, reestimate=each) for each in (True, False))
    for place, t in enumerate(given.t):
        loss, _, _ = alone(residual, between(a, b, t), pictures(), pictures(), 32, reestimate=False)
        assert given.train_loss[place] == pytest.approx(loss, **SAME)
        assert abs(anew.train_loss[place] - loss) > 0.02
    assert on.train.length == anew.train_samples == 96


def test_a_matrix_of_barriers_is_that_of_its_pairs(residual):
    on, states = analysis(residual, "fused"), [state_of(residual, seed, density=0.4) for seed in range(3)]
    found = barrier_matrix(on, states, points=5)
    assert set(found.paths) == {(0, 1), (0, 2), (1, 2)}
    pair = loss_barrier(on, states[0], states[2], points=5)
    assert found.paths[0, 2].train_loss == pytest.approx(pair.train_loss, **SAME)
    matrix = found.matrix("test_loss", "mean")
    assert matrix[0][2] == matrix[2][0] == pytest.approx(pair.barrier("test_loss", "mean"), **SAME)
    assert [matrix[i][i] for i in range(3)] == [0, 0, 0]


def test_a_sample_of_the_training_data(residual):
    """The sample is the start of a shuffle, because in data sorted by class the first samples have few classes."""
    state = state_of(residual)
    on = analysis(residual, samples=64)
    found = on.evaluate([state])
    first = tuple(each[split_order(96)[:64]] for each in pictures())
    loss, error, _ = alone(residual, state, first, first, 32)
    assert found.train_loss == pytest.approx([loss], **SAME)
    assert found.train_error == pytest.approx([error], **SAME)
    assert found.train_samples == 64
    assert found.test_loss == pytest.approx([alone(residual, state, first, pictures(50, 2), 32)[0]], **SAME)
    with pytest.raises(ValueError, match=r"`samples` must lie in \[1, 96\]"):
        analysis(residual, samples=97)
    read = DataLoader(TensorDataset(*pictures()), batch_size=32)
    streamed = Analysis(residual, read, config=on.problem.config, samples=64)
    assert streamed.evaluate([state]).train_loss == pytest.approx([loss], **SAME)
    inputs, targets = (each[pictures()[1].argsort()] for each in pictures())
    mixed = Analysis(residual, (inputs, targets), config=on.problem.config, samples=64).train
    assert len(torch.cat([own for _, own, _ in pass_in_stored_order(mixed, 32)]).unique()) == 10


def test_a_diverged_model_reaches_no_other(residual):
    sound, broken = state_of(residual, 1), state_of(residual, 2)
    broken["conv.weight"] = broken["conv.weight"] * math.nan
    on = analysis(residual)
    found = on.evaluate([sound, broken])
    assert math.isnan(found.train_loss[1])
    assert found.train_loss[0] == pytest.approx(on.evaluate([sound]).train_loss[0], **SAME)


class Table(nn.Module):
    """A model with a frozen layer, and with an integer and a float buffer in which the states differ."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.frozen.requires_grad_(False)
        self.register_buffer("order", torch.arange(8))
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.frozen(x.flatten(1))[:, self.order] + self.shift)))


@pytest.mark.parametrize("way", ["lanes", "fold"])
def test_frozen_parameters_buffers_and_regression(way):
    model = Table()
    a, b = state_of(model, 1, 0.0), state_of(model, 2, 0.0)
    a["hidden.weight"] *= 1.1
    b["order"], b["shift"] = b["order"].flip(0), b["shift"] + 0.5
    inputs, targets = pictures()[0], torch.randn(96, 2)
    on = Analysis(
        *(model, (inputs, targets)),
        loss=lambda outputs, wanted: (outputs - wanted).square(),
        batch_size=40,
        precision="float64",
        engine=f"eager:{way}",
    )
    found = on.evaluate([a, b])
    for loss, state in zip(found.train_loss, (a, b), strict=True):
        module = copy.deepcopy(model).double()
        module.load_state_dict(state)
        with torch.no_grad():
            assert loss == pytest.approx(float((module(inputs.double()) - targets).square().mean()), **SAME)
    assert (found.train_error, found.test_loss) == (None, None)
    trace = hessian_trace(on, a, {}, probes=2)
    assert set(trace.layers) == {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}
    with pytest.raises(ValueError, match=r"frozen.weight is frozen and differs"):
        on.evaluate([{**a, "frozen.weight": a["frozen.weight"] + 1}])
    with pytest.raises(ValueError, match="missing are head.bias, unknown are tail.bias"):
        on.solution({("tail.bias" if name == "head.bias" else name): each for name, each in a.items()})
    with pytest.raises(ValueError, match=r"head.bias has shape \[3\], the model's has \[2\]"):
        on.solution({**a, "head.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="needs test data with class labels"):
        ensemble(on, [a, b])


# Tests of planes and hulls.


def test_a_plane_goes_through_its_three_solutions(residual, tmp_path):
    states = [state_of(residual, seed) for seed in range(3)]
    on = analysis(residual, "fused")
    found = loss_plane(on, *states, size=3, margin=0.5)
    assert found.at_points.train_loss == pytest.approx(on.evaluate(states).train_loss, **SAME)
    # A point of the grid, computed here by Gram-Schmidt orthogonalisation.
    a, b, c = (on.solution(state).weights for state in states)
    u = (b - a) / (b - a).norm()
    v = (c - a) - ((c - a) @ u) * u
    v = v / v.norm()
    for corner, own in zip(found.points, (a, b, c), strict=True):
        torch.testing.assert_close(a + corner[0] * u + corner[1] * v, own)
    views = on.problem.layout.views(a + found.x[2] * u + found.y[0] * v)
    loss, error, _ = alone(residual, {**states[0], **views}, pictures(), pictures(50, 2), 32)
    assert found.test_loss[0][2] == pytest.approx(loss, **SAME)
    assert found.test_error[0][2] == pytest.approx(error, **SAME)
    assert found.x[0] == pytest.approx(found.x[1] - (found.x[2] - found.x[1]), **EXACT)
    assert contour(found, tmp_path / "plane.svg", "test_error").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="lie on one line"):
        loss_plane(on, states[0], states[1], between(states[0], states[1], 0.5))
    with pytest.raises(ValueError, match=r"`size` must lie in \[2, 4096\]"):
        loss_plane(on, *states, size=1)


def test_the_corners_of_a_hull_are_the_particles(residual):
    on, states = analysis(residual), [state_of(residual, seed) for seed in range(3)]
    found = hull(on, states, mixtures=4, seed=5)
    assert found.corners.test_loss == pytest.approx(on.evaluate(states).test_loss, **SAME)
    mean = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    assert found.centre.train_loss == pytest.approx([alone(residual, mean, pictures(), pictures(), 32)[0]], **SAME)
    for shares, loss in zip(found.mixtures, found.train_loss, strict=True):
        assert min(shares) > 0
        assert sum(shares) == pytest.approx(1, **EXACT)
        mixed = {n: sum(s * state[n].double() for s, state in zip(shares, states, strict=True)) for n in states[0]}
        assert loss == pytest.approx(alone(residual, mixed, pictures(), pictures(), 32)[0], **SAME)
    assert hull(on, states, mixtures=4, seed=5).mixtures == found.mixtures
    with pytest.raises(TypeError, match="`seed` must be int, got True"):
        hull(on, states, mixtures=4, seed=True)


# Tests of masks, ensembles and cost.


def test_overlap_by_hand():
    a = {"one": torch.tensor([True, True, False, False]), "two": torch.tensor([[True], [False]])}
    b = {"one": torch.tensor([True, False, True, False]), "two": torch.tensor([[False], [False]])}
    found = mask_overlap(a, b)
    assert (found.hamming, found.iou, found.density_a, found.density_b) == (3 / 6, 1 / 4, 3 / 6, 2 / 6)
    one, two = found.layers["one"], found.layers["two"]
    assert (one.hamming, one.iou, one.density_a, one.density_b) == (2 / 4, 1 / 3, 2 / 4, 2 / 4)
    assert (two.hamming, two.iou, two.density_a, two.density_b) == (1 / 2, 0, 1 / 2, 0)
    nothing = {name: torch.zeros_like(mask) for name, mask in a.items()}
    assert mask_overlap(nothing, nothing).iou == 1
    with pytest.raises(ValueError, match="same layers and shapes; differing: two"):
        mask_overlap(a, {"one": a["one"]})


class Wiring(nn.Module):
    """A model with every way in which a channel is read: sum, concatenation, groups, flattened picture, head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(8, 2, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y = torch.relu(self.norm(self.second(x)) + x)
        return self.head(self.third(torch.cat([x, y], 1)).flatten(1))


def test_dead_channels_by_hand():
    model = Wiring()
    on = analysis(model)
    masks = {
        name: torch.ones_like(dict(model.named_parameters())[name], dtype=torch.bool)
        for name in on.problem.kept(on.problem.mask)
    }
    assert set(masks) == {"first.weight", "second.weight", "third.weight"}
    masks["first.weight"][1] = False  # output channel 1 has no incoming weight
    masks["second.weight"][:2, 0] = False  # the first group doesn't read its input 0
    masks["third.weight"][:, [0, 4, 2]] = False  # third doesn't read x_0, y_0 and x_2
    found = channels(masks, on)
    assert [(each.channels, each.dead_in) for each in found.values()] == [(4, 1), (4, 0), (2, 0)]
    # Of first, channel 0 is dead: x_0 is read neither by second nor by third, and y_0 = ... + x_0 isn't read either.
    # Channel 2 is alive, because second reads x_2. Of second, only channel 0 is dead, because y_0 isn't read.
    assert [each.dead_out for each in found.values()] == [1, 1, 0]
    assert all(each.dead_out is None for each in channels(masks).values())
    vit = build("vit")
    own = {"patches.weight": torch.zeros(16, 1, 4, 4, dtype=torch.bool)}
    assert channels(own, analysis(vit))["patches.weight"] == swamp_fast.analysis.Channels(16, 16, None)


def test_dead_channels_of_a_transposed_convolution():
    """The layer has 4 inputs and 6 outputs in 2 groups, and its weight is [in, out / groups, ...]."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Flatten()),
        nn.Linear(6 * 49, 10),
    )
    own = torch.ones(4, 3, 2, 2, dtype=torch.bool)
    own[2:, 1] = False  # output 4 has no incoming weight
    found = channels({"2.weight": own}, analysis(model))
    assert found["2.weight"] == swamp_fast.analysis.Channels(6, 1, None)
    own[:] = True
    own[2] = False  # one input without weights makes no output dead
    assert channels({"2.weight": own}, analysis(model))["2.weight"].dead_in == 0


def test_calibration_by_hand():
    """Three samples lie in the bin (9 / 15, 10 / 15], and one has confidence 1."""
    p = torch.tensor([[0.65, 0.35], [0.36, 0.64], [0.62, 0.38], [1.0, 0.0]], dtype=torch.float64)
    found = predictions(p, torch.tensor([0, 0, 0, 0]))
    assert found.accuracy == 0.75
    gap = abs(2 - (0.65 + 0.64 + 0.62))
    assert found.ece == pytest.approx(gap / 4, **EXACT)
    assert found.nll == pytest.approx(-sum(map(math.log, (0.65, 0.36, 0.62))) / 4, **EXACT)


def test_an_ensemble_is_the_mean_of_softmax(residual):
    states, (inputs, targets) = [state_of(residual, seed, 1.0) for seed in range(5)], pictures(50, 2)
    found = ensemble(analysis(residual, "fused"), states)
    each = [alone(residual, state, pictures(), (inputs, targets), 32)[2].softmax(1) for state in states]
    together = predictions(torch.stack(each).mean(0), targets)
    for name in ("accuracy", "nll", "ece"):
        assert getattr(found, name) == pytest.approx(getattr(together, name), **SAME)
        singles = [getattr(predictions(own, targets), name) for own in each]
        assert [getattr(own, name) for own in found.single] == pytest.approx(singles, **SAME)
        assert getattr(found.mean_single, name) == pytest.approx(sum(singles) / 5, **SAME)


class Bare(nn.Module):
    """A model with an LSTM and a bare parameter, whose FLOPs are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.bare, self.head = nn.LSTM(8, 6), nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x.squeeze(1).transpose(0, 1))[0][-1] @ self.bare)


def test_flops_that_no_layer_counts_are_none():
    on = analysis(Bare(), prunable=["bare", "rows.weight_*", "head"])
    found = inference_cost(on, Bare().double().state_dict(), {}, repeats=0)
    unknown = ["bare", "rows.weight_ih_l0", "rows.weight_hh_l0"]
    assert found.flops is None
    assert [name for name, each in found.layers.items() if each.flops is None] == unknown
    assert found.layers["head.weight"].flops == 2 * 60
    line = f"flops    not counted for {', '.join(unknown)}: pruning these doesn't lower the FLOPs shown"
    assert line in on.problem.lines
    assert analysis(build("vit")).problem.probe.uncounted == []


def test_cost_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    on = Analysis(model, pictures(), batch_size=32, engine="eager")
    mask = torch.zeros(10, 64, dtype=torch.bool)
    mask[:, :3] = True
    found = inference_cost(on, model.state_dict(), {"1.weight": mask}, repeats=3)
    assert (found.flops, found.dense_flops) == (2 * (30 + 100), 2 * (640 + 100))
    assert (found.kept, found.size) == (30 + 10 + 100 + 10, 640 + 10 + 100 + 10)
    assert found.bytes == 4 * 150 + 640 // 8
    assert found.dense_bytes == 4 * 760
    layer = found.layers["1.weight"]
    assert (layer.flops, layer.dense_flops, layer.kept, layer.bytes) == (60, 1280, 30, 4 * 30 + 80)
    assert found.sparse_ms is not None
    assert found.dense_ms is not None
    assert min(found.sparse_ms, found.dense_ms) > 0
    assert found.why is None
    vit = build("vit")
    other = inference_cost(analysis(vit), vit.state_dict(), {})
    assert (other.sparse_ms, other.dense_ms > 0) == (None, True)
    assert 'engine="fused" can\'t run the model' in other.why
