"""Compares the fused engine with autograd for each operation, size, density and instruction set, and in whole runs."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from equality import same
from operations import NETS, SETTINGS, Net, after_convolution, error, masked, problem_of, seeded, step
from torch import nn

from swamp_fast import _C, fast_swamp, models, naive_swamp
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.fused.trace import plan_of


@pytest.fixture(params=_C.available())
def instruction_set(request):
    before = _C.active()
    _C.use(request.param)
    yield request.param
    _C.use(before)


@pytest.mark.parametrize("name", list(NETS))
def test_every_operation_in_float64(name, instruction_set):
    problem = problem_of(seeded(NETS[name]), 21)
    for density in (1.0, 0.3):
        mask = masked(problem, density)
        for what, each in error(step(problem, "fused", mask), step(problem, "autograd", mask)).items():
            assert each <= 1e-12, (what, density)


@pytest.mark.parametrize("batch", [1, 7, 16, 33, 129])
@pytest.mark.parametrize("density", [1.0, 0.2, 0.0])
def test_batch_sizes_and_empty_layers(batch, density):
    for name in ("3x3", "stride 2", "maximum, overlapping", "norm", "norm of features", "branches"):
        if batch == 1 and "norm" in name + ("norm" if name == "branches" else ""):
            continue
        problem = problem_of(seeded(NETS[name]), batch)
        mask = masked(problem, density)
        # After a layer without kept weights, a channel is constant. Its rounding error of 1e-16 is then divided by
        # sqrt(eps) = 3e-3, in the forward and in the backward pass.
        bound = 1e-10 if density == 0 else 1e-12
        assert max(error(step(problem, "fused", mask), step(problem, "autograd", mask)).values()) <= bound


def test_channels_without_a_weight():
    problem = problem_of(seeded(NETS["branches"]), 20)
    mask = problem.mask.clone()
    views = problem.layout.mask_views(mask)
    views["layers.b.weight"][1] = False  # no incoming weight
    views["layers.b.weight"][:, 2] = False  # no outgoing weight
    assert max(error(step(problem, "fused", mask), step(problem, "autograd", mask)).values()) <= 1e-12


# ResNet-18 is tested in float32 only. PyTorch 2.15 on a CPU sometimes gives NaN for the bfloat16 weight gradient of a
# 3x3 convolution on feature maps of 1 or 2 pixels.
@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for precision in ("float32", "bfloat16") for name in ("residual", "dropout")]
    + [("resnet18", "float32")],
)
def test_as_exact_as_autograd(name, precision, instruction_set):
    """The error relative to float64 is at most twice autograd's, in float32 and with bfloat16 activations."""
    if name == "resnet18" and instruction_set == "generic":
        pytest.skip("minutes without vector instructions; the smaller networks cover it")
    shape, few = (1, 8, 8), 20
    exact_problem, problem = (problem_of(networks.build(name), few, each, shape) for each in ("float64", precision))
    mask = masked(problem, 0.3)
    exact = step(exact_problem, "autograd", mask)
    ours, theirs = (error(step(problem, kind, mask), exact) for kind in ("fused", "autograd"))
    for what in ("losses", "gradients", "outputs"):
        print(name, precision, what, f"ours {ours[what]:.1e}, autograd's {theirs[what]:.1e}")
        assert ours[what] <= 2 * theirs[what] + (1e-6 if precision == "float32" else 1e-3)


def test_bits_depend_on_nothing_but_the_lane():
    """The bits don't depend on the number of lanes or threads, or on how many outputs share loads."""
    problem = problem_of(models.SmallCNN(3, 5), 50, "float32")
    mask = masked(problem, 0.4)
    reference = step(problem, "fused", mask, lanes=3)
    places = list(fused_plan(problem).count())
    assert "Convolution" in places
    threads = torch.get_num_threads()
    try:
        for rows in (1, 2, 4):
            torch.set_num_threads(rows)
            names = [op.weight for op in fused_plan(problem).ops if type(op).__name__ == "Convolution"]
            found = step(problem, "fused", mask, lanes=2, rows={name: [rows] * 3 for name in names[:-1]})
            for what, each in found.items():
                assert torch.equal(each, reference[what][:2]), (what, rows)
    finally:
        torch.set_num_threads(threads)


RUN = {"particles": 3, "cycles": 3, "epochs": 4, "ticket_epochs": 1, "batch_size": 32, "val": 0.1, "progress": False}


@pytest.mark.parametrize("name", ["residual", "dropout", "small_cnn", "mlp"])
def test_a_run_equals_the_naive_loops(name, digits):
    def build():
        return networks.build(name) if name in networks.NETWORKS else models.build_model(name, 1, 8, 8, 10)

    torch.manual_seed(0)
    model = build()
    (inputs, targets), test = digits
    settings = RUN | {"precision": "float64", "keep_particles": True}
    fast = fast_swamp(model, (inputs[:160], targets[:160]), test, engine="fused", **settings)
    assert fast.engine["engine"] == "fused"
    same(fast, naive_swamp(model, (inputs[:160], targets[:160]), test, **settings))


def test_resumed_is_uninterrupted_and_particles_are_themselves(digits, tmp_path):
    (inputs, targets), test = digits
    train = inputs[:160], targets[:160]
    model = models.SmallCNN(1, 10)
    settings = RUN | {"engine": "fused", "keep_particles": True}

    def stop(row):
        if row["cycle"] == 1:
            raise KeyboardInterrupt

    whole = fast_swamp(model, train, test, **settings)
    with pytest.raises(KeyboardInterrupt):
        fast_swamp(model, train, test, **settings, run_dir=str(tmp_path), on_cycle=stop)
    again = fast_swamp(model, train, test, **settings, run_dir=str(tmp_path))
    assert all(torch.equal(each, again.state_dict[name]) for name, each in whole.state_dict.items())
    first = RUN | {"engine": "fused", "keep_particles": True, "cycles": 0}
    three, two = (fast_swamp(model, train, test, **first | {"particles": number}) for number in (3, 2))
    assert all(torch.equal(each, three.particles[name][:2]) for name, each in two.particles.items())


def after(layer: nn.Module):
    """Return a function that makes a network with `layer` after a convolution with four output channels."""
    return lambda: Net(lambda m, x: m["n"](m["a"](x)), 324, a=nn.Conv2d(3, 4, 3, padding=1), n=layer)


def test_a_transform_of_the_users(digits):
    (inputs, targets), test = digits
    train = inputs[:160], targets[:160]
    settings = RUN | {"precision": "float64", "keep_particles": True}
    model = models.SmallCNN(1, 10)

    def noisy(x):
        return x + 0.1 * torch.randn_like(x)

    fast = fast_swamp(model, train, test, transform=noisy, engine="fused", **settings)
    same(fast, naive_swamp(model, train, test, transform=noisy, **settings))
    with pytest.raises(ValueError, match="the transform changes the shape"):
        fast_swamp(model, train, test, transform=lambda x: x[..., 1:], engine="fused", **settings)


def shared_bias():
    first, second = (nn.Conv2d(each, 4, 3, padding=1) for each in (3, 4))
    second.bias = first.bias
    return Net(lambda m, x: m["b"](m["a"](x)), 324, a=first, b=second)


REFUSED = {
    "GroupNorm": (after(nn.GroupNorm(2, 4)), r"layers.n \(GroupNorm\) is not covered"),
    "a product": (after_convolution(lambda x: x * 2, 486), "mul in its forward is not covered"),
    "statistics": (
        after(nn.BatchNorm2d(4, track_running_stats=False)),
        r"layers.n \(BatchNorm2d\) has no running statistics",
    ),
    "circular": (after(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), r"layers.n \(Conv2d\) pads with circ"),
    "in place": (
        after_convolution(lambda x: F.relu(x, inplace=True) + x, 486),
        "changes its input in place, and the input is read again",
    ),
    "always dropped": (after_convolution(lambda x: F.dropout(x, 0.3), 486), "its dropout stays on in evaluation"),
    "shared": (lambda: Net(lambda m, x: m["a"](m["a"](x)), 243, a=nn.Conv2d(3, 3, 3, padding=1)), "shares its weight"),
    "in place, under another name": (
        after_convolution(lambda x: F.relu(x.contiguous(), inplace=True) + x, 486),
        "changes its input in place, and the input is read again",
    ),
    "pieces": (
        after_convolution(lambda x: torch.cat(x.chunk(2, 1), 1), 486),
        "chunk in its forward does not return a te",
    ),
    "shared bias": (shared_bias, r"layers.b \(Conv2d\) shares its bias"),
    "control flow": (after_convolution(lambda x: x if x.sum() > 0 else -x, 486), "looks at values"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_covered_is_named(name):
    make, text = REFUSED[name]
    problem = problem_of(seeded(make), 20)
    reason = fused_plan(problem)
    assert isinstance(reason, str)
    import re

    assert re.search(text, reason), reason
    data = torch.randn(40, 3, 9, 9), torch.arange(40) % 5
    with pytest.raises(ValueError, match='engine="fused" can\'t run the model: .*Use "auto" or "eager"'):
        fast_swamp(seeded(make), data, engine="fused", **SETTINGS, batch_size=20, particles=1)
    engine = fast_swamp(seeded(make), data, **SETTINGS, batch_size=20, particles=1).engine
    assert engine["engine"] == "eager"
    assert re.search(text, engine["why_not_fused"])


def test_a_loss_that_changes_the_outputs(digits):
    (inputs, targets), _ = digits
    train = inputs[:160], targets[:160]
    settings = RUN | {"precision": "float64", "keep_particles": True, "cycles": 1}

    def loss(outputs, targets):
        return F.cross_entropy(outputs.div_(2), targets, reduction="none")

    model = models.SmallCNN(1, 10)
    same(
        fast_swamp(model, train, loss=loss, engine="fused", **settings),
        naive_swamp(model, train, loss=loss, **settings),
    )


def test_places_are_told_apart():
    """A module name that begins with the tracer's prefix "model" is reported in full."""
    model = nn.Sequential()
    for name in ("_stem", "model_stem", "model"):
        model.add_module(name, nn.Conv2d(3, 3, 3, padding=1))
    places = [op.place for op in plan_of(model, lambda module, x: module(x), torch.randn(2, 3, 5, 5)).ops]
    assert places == ["_stem (Conv2d)", "model_stem (Conv2d)", "model (Conv2d)"]


def test_what_the_check_cannot_run_is_no_plan():
    """With three samples, the self-check has one sample per lane, for which BatchNorm1d raises an error."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    data = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 0])
    engine = fast_swamp(model, data, **SETTINGS, batch_size=3, particles=1).engine
    assert "its self-check raises ValueError" in engine["why_not_fused"]
