"""A particle's batch: transforms of inputs and targets, mixup and CutMix, judged by plain PyTorch and by statistics."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from swamp_fast import Recipe, fast_swamp, naive_swamp
from swamp_fast.config import SwampConfig
from swamp_fast.engines.lane_by_lane import LaneByLane
from swamp_fast.particles.random import at_time, lane_keys, later, of_first_particle, stream_of
from swamp_fast.problem.arguments import Arguments, takes_targets
from swamp_fast.problem.mixing import Mixed, box_of, mixed
from swamp_fast.problem.prepare import prepare

CPU = torch.device("cpu")
KEY = lane_keys([3], [stream_of(0, 1)], CPU)
SETTINGS = {"batch_size": 40, "cycles": 1, "epochs": 2, "ticket_epochs": 1, "particles": 2, "prune": 0.5}
SETTINGS |= {"precision": "float64", "progress": False, "swa_start": 0.0}
PICTURES = torch.randn(12, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
NUMBERS = torch.arange(12)  # of the samples, as targets


def several(times: int):
    """Return the keys of many steps."""
    return [at_time(KEY, time) for time in range(times)]


def config(**settings) -> SwampConfig:
    return SwampConfig(**settings)


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Relabelling(nn.Module):
    def forward(self, x, labels=None):
        return x, labels


def gains(x, strength=2.0, *, key=None):
    return strength * x


@pytest.mark.parametrize(
    ("transform", "takes"),
    [
        (lambda x: x, False),
        (lambda x, t: (x, t), True),
        (lambda x, y=None: (x, y), True),
        (lambda x, targets=None, strength=1: (x, targets), True),
        (gains, False),
        (partial(gains, strength=3.0), False),
        (Doubling(), False),
        (Relabelling(), True),
        (torch.relu, False),  # has no signature
        (lambda x, *rest: x, None),
        (lambda *batch: batch, None),
    ],
)
def test_a_transform_s_form_is_told_by_its_signature(transform, takes):
    assert takes_targets(transform) is takes


def test_mixup_is_the_mean_of_two_samples():
    for key in several(20):
        inputs, targets = mixed(PICTURES, NUMBERS, config(mixup=0.7), key)
        assert isinstance(targets, Mixed)
        assert torch.equal(targets.targets, NUMBERS)
        assert sorted(targets.others.tolist()) == NUMBERS.tolist()
        expected = targets.weight * PICTURES + (1 - targets.weight) * PICTURES[targets.others]
        torch.testing.assert_close(inputs, expected, rtol=0, atol=0)


def test_mixup_of_a_tree():
    tree = {"a": PICTURES, "b": (PICTURES[:, 0, 0], PICTURES[:, 0, 0, 0])}
    inputs, targets = mixed(tree, {"class": NUMBERS, "other": NUMBERS}, config(mixup=0.7), KEY)
    for given, got in ((tree["a"], inputs["a"]), *zip(tree["b"], inputs["b"], strict=True)):
        expected = targets.weight * given + (1 - targets.weight) * given[targets.others["class"]]
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(targets.others["class"], targets.others["other"])


def test_the_weights_of_mixup_are_beta_distributed():
    """Mean 1/2 and variance 1 / (4 (2 a + 1)), each within four standard errors; each step has its own."""
    for strength in (0.2, 1.0, 3.0):
        weights = torch.tensor(
            [mixed(PICTURES, NUMBERS, config(mixup=strength), key)[1].weight for key in several(4000)],
            dtype=torch.float64,
        )
        variance = 1 / (4 * (2 * strength + 1))
        assert abs(weights.mean() - 0.5) < 4 * math.sqrt(variance / 4000)
        assert abs(weights.var() - variance) < 4 * variance * math.sqrt(2 / 4000)
        assert len(weights.unique()) > 3900


def test_cutmix_replaces_a_box_and_weighs_by_its_area():
    for key in several(60):
        inputs, targets = mixed(PICTURES, NUMBERS, config(cutmix=1.0), key)
        others = PICTURES[targets.others]
        moved = targets.others != NUMBERS
        cut = (inputs != PICTURES)[moved].all(0).all(0)  # [H, W]
        assert torch.equal(inputs, torch.where(cut, others, PICTURES))
        assert torch.equal(cut, cut.any(1)[:, None] & cut.any(0)[None])  # a rectangle
        assert targets.weight == 1 - int(cut.sum()) / cut.numel()
    assert torch.equal(PICTURES, torch.randn(PICTURES.shape, dtype=torch.float64, generator=seeded(4)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_box_of_cutmix():
    """Its centre is uniform. It has the area 1 - weight where it isn't cut at an edge."""
    generator = np.random.default_rng(0)
    covered = np.zeros((32, 32))
    for _ in range(4000):
        rows, columns = box_of(0.75, 32, 32, generator)
        assert rows.stop - rows.start <= 16
        if rows.start >= 8 and rows.stop <= 24:
            assert rows.stop - rows.start == 16
        covered[rows, columns] += 1
    # A pixel in the middle is covered if the centre is one of 16 of 32 rows and columns; one in the corner, of 8.
    assert covered[16, 16] / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert covered[0, 0] / 4000 == pytest.approx((9 / 32) ** 2, abs=0.02)


def test_each_batch_uses_mixup_or_cutmix():
    cuts = 0
    for key in several(400):
        inputs, targets = mixed(PICTURES, NUMBERS, config(mixup=1.0, cutmix=1.0), key)
        mean = targets.weight * PICTURES + (1 - targets.weight) * PICTURES[targets.others]
        cuts += not torch.allclose(inputs, mean)
    assert 150 < cuts < 250


def test_mixing_depends_only_on_the_particle_and_the_step():
    settings = config(mixup=1.0, cutmix=1.0)
    first = mixed(PICTURES, NUMBERS, settings, KEY)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    again = mixed(PICTURES, NUMBERS, settings, KEY)
    other = mixed(PICTURES, NUMBERS, settings, lane_keys([3], [stream_of(0, 2)], CPU))
    assert torch.equal(first[0], again[0])
    assert first[1].weight == again[1].weight != other[1].weight


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("setting", ["mixup", "cutmix"])
def test_the_loss_and_gradient_of_a_mixed_batch(setting, soft, digits):
    """Against the papers' code in plain PyTorch."""
    inputs, labels = digits[0]
    targets = F.one_hot(labels, 10).double() if soft else labels
    problem = prepare(networks.build("residual"), (inputs, targets), settings=SETTINGS | {setting: 1.0})
    weights = problem.layout.flat(dict(problem.template.named_parameters()), torch.float64, CPU)[None].clone()
    grads = torch.zeros_like(weights)
    lanes = LaneByLane(problem, weights, grads, channels_last=False)
    handle = next(problem.steps_of_epoch(KEY))[0]
    batch = problem.fetch(handle, KEY, KEY)
    losses = lanes.backward(batch, KEY)

    x, y = batch.lane(0)
    changed, pair = mixed(x, y, problem.config, KEY)
    model = networks.build("residual").double()
    model.load_state_dict(problem.template.state_dict())
    outputs = model(changed)
    loss = pair.weight * F.cross_entropy(outputs, y) + (1 - pair.weight) * F.cross_entropy(outputs, pair.others)
    loss.backward()
    assert float(losses[0]) == pytest.approx(loss.item(), abs=1e-12)
    for name, gradient in problem.layout.views(grads[0]).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=0, atol=1e-12)


def test_only_training_batches_are_mixed(digits, monkeypatch):
    """Neither evaluation nor the re-estimation of BatchNorm's statistics mixes."""
    calls = []

    def counted(*arguments):
        calls.append(arguments[-1])
        return mixed(*arguments)

    monkeypatch.setattr("swamp_fast.problem.problem.mixed", counted)
    result = fast_swamp(networks.build("residual"), *digits, **SETTINGS, mixup=0.5, engine="eager:lanes", val=0.25)
    assert result.history[-1]["accuracy"] is not None
    batches = 3  # of 120 samples
    assert len(calls) == batches * (1 + 2 * 2 * 2)  # an epoch of the ticket, two of two particles in two cycles


@pytest.mark.parametrize(
    ("inputs", "settings", "error"),
    [
        (
            PICTURES.flatten(1),
            {"cutmix": 1.0},
            r"`cutmix` replaces a box .* \[B, C, H, W\]; got \[8, 144\]",
        ),
        (
            NUMBERS[:, None].expand(12, 64),
            {"mixup": 1.0},
            "`mixup` averages inputs, which must be floating-point",
        ),
    ],
)
@pytest.mark.parametrize("driver", [fast_swamp, naive_swamp])
def test_inputs_that_can_t_be_mixed(inputs, settings, error, driver):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(inputs.shape[1], 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.first(x.to(self.first.weight.dtype)))

    with pytest.raises(ValueError, match=error):
        driver(Model(), (inputs, NUMBERS % 3), **SETTINGS | {"batch_size": 8} | settings)


def test_samples_are_drawn_in_proportion_to_their_weights(digits):
    weights = torch.arange(160.0) % 4  # a quarter is never drawn
    arguments = Arguments(recipe=Recipe(sample_weights=weights))
    problem = prepare(networks.build("tied"), *digits, arguments, settings=SETTINGS)
    keys = lane_keys([0] * 3, [stream_of(0, lane) for lane in (0, 1, 2)], CPU)
    orders = torch.stack([problem.epoch_order(problem.epoch_keys(keys, epoch)) for epoch in range(500)])  # [E, L, n]
    counts = orders.flatten().bincount(minlength=160).double()
    expected = 500 * 3 * 160 * weights.double() / weights.sum()
    assert not counts[weights == 0].any()
    drawn = weights > 0
    chi_squared = float(((counts - expected)[drawn] ** 2 / expected[drawn]).sum())
    degrees = int(drawn.sum()) - 1
    assert abs(chi_squared - degrees) < 4 * math.sqrt(2 * degrees)
    assert len({tuple(order.tolist()) for order in orders.flatten(0, 1)}) == 1500
    alone = problem.epoch_order(problem.epoch_keys(keys[1:2], 7))
    assert torch.equal(alone[0], orders[7, 1])


def test_weights_of_held_out_samples_are_left_out(digits):
    """With a fraction as val, the weights are those of `train` before the split."""
    (inputs, targets), _ = digits
    weights = (targets == 3).double()
    problem = prepare(
        networks.build("tied"),
        (inputs, targets),
        arguments=Arguments(recipe=Recipe(sample_weights=weights.tolist()), val=0.25),
        settings=SETTINGS,
    )
    order = problem.epoch_order(problem.epoch_keys(KEY, 0))
    assert order.shape == (1, 120)
    assert bool((problem.train.targets[order] == 3).all())


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ([1.0] * 159, r"`recipe`: sample_weights must have one number per sample of `train`, \[160\], got \[159\]"),
        ([1.0] * 159 + [-1.0], "must be finite, at least 0 and not all 0; got -1.0 … 1.0"),
        ([1.0] * 159 + [math.nan], "must be finite, at least 0 and not all 0"),
        (torch.zeros(160), "must be finite, at least 0 and not all 0; got 0.0 … 0.0 with the sum 0.0"),
    ],
)
def test_unusable_weights(weights, error, digits):
    with pytest.raises(ValueError, match=error):
        fast_swamp(networks.build("tied"), *digits, **SETTINGS, recipe=Recipe(sample_weights=weights))
    with pytest.raises(TypeError, match="`recipe`: sample_weights must be numbers, one per training sample"):
        fast_swamp(networks.build("tied"), *digits, **SETTINGS, recipe=Recipe(sample_weights=["a"] * 160))


def test_a_sample_that_is_drawn_twice_is_augmented_twice(digits):
    arguments = Arguments(recipe=Recipe(sample_weights=[1.0] + [0.0] * 159))
    problem = prepare(networks.build("tied"), *digits, arguments, settings=SETTINGS | {"augment": "crop_flip"})
    epoch = problem.epoch_keys(KEY, 0)
    first, second = (
        problem.fetch(handles[0], epoch, later(KEY, batch)).inputs[0]
        for batch, handles in enumerate(list(problem.steps_of_epoch(epoch))[:2])
    )
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) > 40  # of 80; two crops may be equal


def test_shared_order(digits):
    """All particles have the first one's batches and augmentation, and their own dropout."""
    problem = prepare(networks.build("dropout"), *digits, settings=SETTINGS | {"shared_order": True, "mixup": 1.0})
    keys = lane_keys([0, 1], [stream_of(2, 5), stream_of(2, 0)], CPU)
    epoch = problem.epoch_keys(keys, 4)
    assert epoch.tolist() == [[0, 3 << 16, 4], [1, 3 << 16, 4]]
    assert torch.equal(of_first_particle(keys[1:]), keys[1:])
    own = dataclasses.replace(problem, config=problem.config.replace(shared_order=False))
    (shared, pair), (expected, other) = (
        each.particle_batch(PICTURES, NUMBERS, key)
        for each, key in ((problem, keys[:1]), (own, of_first_particle(keys[:1])))
    )
    assert torch.equal(shared, expected)
    assert pair.weight == other.weight
    result = fast_swamp(
        networks.build("dropout"), *digits, **SETTINGS, shared_order=True, keep_particles=True, engine="eager"
    )
    first, second = result.particles["stem.weight"]
    assert (first - second).abs().max() > 1e-6
    result = fast_swamp(
        networks.build("residual"), *digits, **SETTINGS, shared_order=True, keep_particles=True, engine="eager"
    )
    first, second = result.particles["stem.weight"]
    assert torch.equal(first, second)


def test_accumulation_equals_one_larger_batch(digits):
    """Without BatchNorm and dropout, batches of 32 in pairs are batches of 64, also in the last step of an epoch."""
    settings = SETTINGS | {"keep_particles": True}
    large, small = (
        fast_swamp(networks.build("tied"), *digits, **settings | change)
        for change in ({"batch_size": 64}, {"batch_size": 32, "accumulate": 2})
    )
    for name, tensor in large.state_dict.items():
        torch.testing.assert_close(small.state_dict[name], tensor, rtol=0, atol=1e-10)
    for name, tensor in large.particles.items():
        torch.testing.assert_close(small.particles[name], tensor, rtol=0, atol=1e-10)


def test_more_batches_than_an_epoch_has(digits):
    with pytest.raises(ValueError, match="`accumulate` = 5 is more than the 4 batches of an epoch"):
        fast_swamp(networks.build("tied"), *digits, **SETTINGS, accumulate=5)


def test_transforms_that_can_t_be_used(digits):
    for transform, kind, error in (
        (lambda x, y: x, ValueError, r"`transform\(inputs, targets\)` raises TypeError .* must return a pair"),
        (lambda x, y: (x, y[1:]), ValueError, r"`transform\(inputs, targets\)` must return the same number of samples"),
        (lambda x, y: (x, y + 10), ValueError, r"the targets that `transform` returns: labels must lie in \[0, 10\)"),
        (lambda x: x @ x[0, 0, :3], ValueError, r"`transform\(inputs\)` raises RuntimeError for inputs"),
    ):
        with pytest.raises(kind, match=error):
            fast_swamp(networks.build("tied"), *digits, **SETTINGS, transform=transform)


class Numbers(Dataset):
    """A random Dataset whose targets are 100 and 200, of which a transform makes labels."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.rand(64), 100 + 100 * (index % 2)


@pytest.mark.parametrize("kind", ["integers", "floats", "streamed"])
def test_a_transform_that_makes_the_labels(kind):
    """What is read need not be labels, whether it is stored or streamed."""
    inputs, numbers = torch.rand(40, 64, generator=seeded(1)), 100 + 100 * (torch.arange(40) % 2)
    train = {"integers": (inputs, numbers), "floats": (inputs, numbers.float()), "streamed": Numbers()}[kind]
    test = None if kind == "floats" else (inputs, torch.arange(40) % 2)
    settings = SETTINGS | {"batch_size": 20, "transform": lambda x, targets: (x, (targets == 100).long())}
    fast = fast_swamp(networks.build("tied"), train, test, **settings, engine="eager")
    naive = naive_swamp(networks.build("tied"), train, test, **settings)
    assert (fast.history[-1]["accuracy"] is None) == (test is None)
    assert fast.history[-1]["accuracy"] == naive.history[-1]["accuracy"]
    assert fast.history[-1]["train_loss"] == pytest.approx(naive.history[-1]["train_loss"], abs=1e-10)
