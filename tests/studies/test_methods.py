"""The settings in which methods differ: scores, schedules, dense masks, the best particle. Then each method."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from equality import same
from stops import Interrupted, before_steps, stop_at

from benchmarks.durability import same_bits, same_tensors
from swamp_fast import SwampConfig, SwampResult, fast_swamp, naive_swamp, sweep
from swamp_fast.cycle.pruning import particles_score
from swamp_fast.engines.trainer import Trainer
from swamp_fast.methods import METHODS, seeds_of
from swamp_fast.particles.random import layer_order, stream_of
from swamp_fast.particles.schedule import cycle_training
from swamp_fast.runs.files import load_tensors
from swamp_fast.studies import packing

SETTINGS = {
    "engine": "eager",
    "batch_size": 32,
    "cycles": 3,
    "epochs": 2,
    "ticket_epochs": 1,
    "particles": 3,
    "precision": "float64",
    "progress": False,
}
STEPS = 5  # per epoch
CHANGES = [
    *({"mask_score": score} for score in ("mean-abs", "rms", "signal-to-noise", "random")),
    {"mask_from": "dense"},
    {"mask_from": "dense", "mask_score": "rms", "particles": (2, 1, 1, 1)},
    {"mask_from": "dense", "mask_score": "random"},
    {"combine": "best", "rewind": "average", "val": 0.2},
    {"combine": "best", "mask_score": "random", "val": 0.2},
    {"schedule": "swa", "average": "none"},
    {"schedule": "cosine", "epochs": 4},
]


def run(digits, name="tied", **changes) -> SwampResult:
    return fast_swamp(networks.build(name), *digits, **SETTINGS | changes)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_equal_to_the_naive_loop(change, digits):
    change = change | {"lr": 0.3}  # so high that the particles move apart
    fast = run(digits, "residual", **change | {"engine": "fused"})
    same(fast, naive_swamp(networks.build("residual"), *digits, **SETTINGS | change), 1e-8)


def test_scores_by_their_definition():
    weights = torch.tensor([[0.1, -0.1, 0.0, 3.0, 1e-30], [0.1, 0.1, 0.0, 1.0, 2e-30], [0.1, -0.1, 0.0, 2.0, 1e-30]])
    for dtype in (torch.float32, torch.float64):  # in float64, the mean of 0.1, 0.1 and 0.1 is not 0.1
        particles = list(weights.to(dtype))
        assert torch.equal(particles_score("mean-abs", particles), weights.to(dtype).double().abs().mean(0).to(dtype))
        rms = particles_score("rms", particles)
        assert torch.allclose(rms, torch.tensor([0.1, 0.1, 0.0, (14 / 3) ** 0.5, 2**0.5 * 1e-30]).to(dtype), rtol=1e-6)
        assert rms[4] > 0  # its square would be 0 in float32
        ratio = particles_score("signal-to-noise", particles)
        assert ratio[0] == torch.inf
        assert ratio[2] == 0
        assert ratio[3] == pytest.approx(2 / (2 / 3) ** 0.5)
        assert ratio.dtype == dtype


SCORES = {
    "abs-mean": lambda each: each.mean(0).abs(),
    "mean-abs": lambda each: each.abs().mean(0),
    "rms": lambda each: each.square().mean(0).sqrt(),
    "signal-to-noise": lambda each: each.mean(0).abs() / each.std(0, correction=0),
}


@pytest.mark.parametrize("score", SCORES)
def test_the_mask_keeps_the_largest_scores(score, digits):
    """The scores are computed here from the kept particles of a run with the same dense cycle."""
    apart = {"lr": 0.5, "swa_lr": 0.5, "prune": 0.1, "ticket_epochs": 0}
    dense = run(digits, cycles=0, keep_particles=True, **apart)
    ranked = torch.cat([SCORES[score](dense.particles[name]).flatten() for name in dense.masks])
    found = masks_of(run(digits, cycles=1, mask_score=score, **apart))
    assert int(found.sum()) == round(0.9 * len(found))
    assert ranked[found].min() >= ranked[~found].max()
    others = [each for each in SCORES if each != score]
    assert not any(torch.equal(found, masks_of(run(digits, cycles=1, mask_score=each, **apart))) for each in others)


def test_random_masks_keep_as_many_by_layer_and_others(digits):
    """A random mask keeps as many weights per layer as magnitude pruning would; only seed and cycle decide which."""
    result, magnitude = run(digits, mask_score="random"), run(digits)
    for cycle in range(1, 4):
        (before, kept), (_, masks) = result.at(cycle - 1), result.at(cycle)
        sizes = {name: before.get_parameter(name)[mask].abs() for name, mask in kept.items()}
        every = torch.cat(list(sizes.values())).sort(descending=True).values
        least = every[round(0.8 * len(every)) - 1]
        for name, mask in masks.items():
            assert int(mask.sum()) == int((sizes[name] >= least).sum())
            assert not bool((mask & ~kept[name]).any())
            assert before.get_parameter(name)[mask].abs().min() < least
    assert any(not torch.equal(mask, result.masks[name]) for name, mask in magnitude.masks.items())
    orders = [layer_order(*key, 500, torch.device("cpu")) for key in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert all(torch.equal(order.sort().values, torch.arange(500)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert not torch.equal(masks_of(run(digits, mask_score="random", seed=1)), masks_of(result))


def masks_of(result: SwampResult) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in result.masks.values()])


def test_masks_from_the_dense_average_are_the_one_shot_curve(digits):
    result = run(digits, mask_from="dense", prune=0.5)
    dense, masks = result.at(0)
    ranked = torch.cat([dense.get_parameter(name).abs().flatten() for name in masks])
    keep = len(ranked)
    for cycle in range(1, 4):
        keep = round(0.5 * keep)
        mask = torch.cat([each.flatten() for each in result.at(cycle)[1].values()])
        expected = torch.zeros_like(mask)
        expected[ranked.argsort(descending=True, stable=True)[:keep]] = True
        assert torch.equal(mask, expected)


def test_the_best_particle_is_the_solution(digits):
    result = run(digits, combine="best", val=0.3, keep_particles=True, lr=0.3)
    plain = run(digits, val=0.3, cycles=0, lr=0.3)
    assert result.history[0]["particle_accuracy"] == plain.history[0]["particle_accuracy"]
    for row in result.history:
        assert row["accuracy"] == row["best_accuracy"]
        assert row["loss"] in row["particle_loss"]
        assert row["val_accuracy"] >= row["val_mean_accuracy"]
    state = result.model.state_dict()
    equal = [all(torch.equal(each[n], state[name]) for name, each in result.particles.items()) for n in range(3)]
    assert sum(equal) == 1
    assert result.history[-1]["particle_loss"][equal.index(True)] == result.history[-1]["loss"]
    with pytest.raises(ValueError, match=r'`combine` = "best" chooses a particle on validation data, but `val` is'):
        run(digits, combine="best")


def test_the_best_particle_by_loss_where_there_are_no_accuracies(digits):
    (inputs, targets), (test, wanted) = digits
    train = inputs.double() / 16, F.one_hot(targets, 10).double()
    test = test.double() / 16, F.one_hot(wanted, 10).double()
    settings = SETTINGS | {"combine": "best", "lr": 0.3, "loss": lambda out, y: (out - y).square().mean(1)}
    found = [call(networks.build("tied"), train, test, val=test, **settings) for call in (fast_swamp, naive_swamp)]
    same(*found, 1e-8)
    for row in found[0].history:  # test data serve as val here, so the history shows the losses that were compared
        assert row["loss"] == min(row["particle_loss"])
        assert row["accuracy"] is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mask_score": "snr"}, '`mask_score` must be one of "abs-mean"'),
        ({"schedule": "flat"}, '`schedule` must be one of "auto", "swa", "cosine"'),
        ({"mask_score": "signal-to-noise", "particles": 1}, "at least 2 particles, but cycle 0 has one; set more"),
        ({"mask_score": "signal-to-noise", "particles": (2, 1, 2), "cycles": 2}, "but cycle 1 has one"),
        (
            {"mask_score": "rms", "combine": "best"},
            'combine="best" keeps one of them; set mask_score="abs-mean"',
        ),
        ({"schedule": "swa", "average": "none", "lr": 0.01, "swa_lr": 0.05}, "`swa_lr` must be at most `lr`"),
    ],
)
def test_settings_that_contradict(changes, text):
    with pytest.raises(ValueError, match=text):
        SwampConfig.of(None, changes)


def test_settings_that_do_not():
    """One particle is allowed in a cycle from which no mask is made, and swa_lr > lr if the schedule doesn't use it."""
    SwampConfig(mask_score="signal-to-noise", particles=(2, 1), cycles=1)
    SwampConfig(mask_score="signal-to-noise", particles=(2, 1, 1), cycles=2, mask_from="dense")
    SwampConfig(schedule="cosine", lr=0.01)
    SwampConfig(average="none", lr=0.01)


def test_schedules():
    swa, last = SwampConfig(epochs=8), SwampConfig(epochs=8, average="none", schedule="swa")
    sgd, cosine = SwampConfig(epochs=8, average="none"), SwampConfig(epochs=8, schedule="cosine")
    rates = [[cycle_training(each, 5).lr(step) for step in range(40)] for each in (swa, last, sgd, cosine)]
    assert rates[0] == rates[1]
    assert rates[2] == rates[3]
    assert rates[0] != rates[2]
    every = (swa, last, sgd, cosine)
    shares = [[cycle_training(each, 5).average_weight(5 * epoch + 4) for epoch in range(8)] for each in every]
    assert shares[0] == shares[3] == [0.0] * 6 + [1.0, 0.5]
    assert shares[1] == shares[2] == [0.0] * 8


@pytest.fixture
def diverging(monkeypatch):
    """A list of numbers of particles, which become infinite in their first step of cycle 1."""
    step, which = Trainer.step, []

    def infinite(trainer, handle):
        step(trainer, handle)
        for particle in which:
            trainer.bank.weights[trainer.bank.keys[:, 1] == stream_of(1, particle)] = torch.inf

    monkeypatch.setattr(Trainer, "step", infinite)
    return which


def test_scores_are_over_the_particles_left(digits, diverging):
    diverging.append(0)
    for score in ("rms", "signal-to-noise"):
        settings = {"mask_score": score, "on_divergence": "drop"}
        with pytest.warns(UserWarning, match="particle 0 diverged"):
            found = run(digits, cycles=1, keep_particles=True, **settings)
        with pytest.warns(UserWarning, match="particle 0 diverged"):
            masks = run(digits, cycles=2, **settings).masks
        kept = torch.cat([mask.flatten() for mask in found.masks.values()])
        ranked = torch.cat([SCORES[score](found.particles[name]).flatten() for name in masks]).nan_to_num()
        mask = torch.cat([each.flatten() for each in masks.values()])
        assert len(found.particles["first.weight"]) == 2
        assert int(mask.sum()) == round(0.8 * int(kept.sum()))
        assert ranked[mask].min() >= ranked[~mask].max()


def test_one_particle_left_has_no_spread(digits, diverging):
    diverging += [0, 2]
    with (
        pytest.warns(UserWarning, match="diverged"),
        pytest.raises(FloatingPointError, match=r"cycle 1: only one particle is left, but .* Lower lr"),
    ):
        run(digits, mask_score="signal-to-noise", on_divergence="drop")
    with pytest.warns(UserWarning, match="diverged"):  # no mask is made after the last cycle
        assert len(run(digits, mask_score="signal-to-noise", on_divergence="drop", cycles=1).history) == 2


# The ticket has steps 0-4, and the four trainings have steps 5-14, 15-24, 25-34 and 35-44. The run is interrupted
# before the second training, inside the third and before the fourth, so that masks are made from scores in a file.
@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize(
    "change",
    [
        {"mask_score": "rms"},
        {"mask_score": "signal-to-noise"},
        {"mask_from": "dense", "mask_score": "mean-abs"},
        {"mask_from": "dense"},
        {"mask_score": "random"},
        {"combine": "best", "rewind": "average"},
    ],
    ids=str,
)
def test_resumed_is_uninterrupted(change, engine, digits, tmp_path):
    settings = change | {"val": digits[1], "precision": "float32", "engine": engine, "checkpoint_minutes": 1e-9}
    run(digits, "dropout", **settings, run_dir=tmp_path / "whole")
    with before_steps(stop_at(15)), pytest.raises(Interrupted):  # before the second training
        run(digits, "dropout", **settings, run_dir=tmp_path / "cut")
    assert (tmp_path / "cut" / "cycle_00.safetensors").exists()
    assert not (tmp_path / "cut" / "training.safetensors").exists()
    with before_steps(stop_at(14)), pytest.raises(Interrupted):  # 14 steps later: inside the third training
        run(digits, "dropout", **settings, run_dir=tmp_path / "cut")
    assert int(load_tensors(tmp_path / "cut" / "training.safetensors")[0]["done"]) > 0
    with before_steps(stop_at(6)), pytest.raises(Interrupted):  # 6 steps later: before the fourth training
        run(digits, "dropout", **settings, run_dir=tmp_path / "cut")
    run(digits, "dropout", **settings, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    SwampResult.load(tmp_path / "cut").save(tmp_path / "copy")
    for path in (tmp_path / "cut").glob("cycle*"):  # these files include the scores from which masks are made
        assert same_tensors(load_tensors(path)[0], load_tensors(tmp_path / "copy" / path.name)[0])


def test_a_naive_run_resumes_too(digits, tmp_path):
    def stop(row):
        raise Interrupted

    settings = SETTINGS | {"mask_score": "rms"}
    naive_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        naive_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "cut", on_cycle=stop)
    naive_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_only_what_needs_scores_has_them_in_its_files(digits, tmp_path):
    changes = [{}, {"mask_score": "random"}, {"mask_score": "rms"}, {"mask_score": "rms", "mask_from": "dense"}]
    scored = []
    for number, change in enumerate(changes):
        run(digits, **change, cycles=2, epochs=1, run_dir=tmp_path / str(number))
        files = [load_tensors(tmp_path / str(number) / f"cycle_0{cycle}.safetensors")[0] for cycle in range(3)]
        scored.append([any(name.startswith("score/") for name in file) for file in files])
        for file in files:  # only kept weights have scores
            for name in file:
                if name.startswith("score/"):
                    assert file[name].shape == file[name.replace("score/", "values/")].shape
    assert scored == [[False] * 3, [False] * 3, [True, True, True], [True, False, False]]


@pytest.mark.parametrize("way", ["lanes", "fold"])
def test_packed_they_give_what_they_give_alone(way, digits, monkeypatch):
    points = [
        {"seed": 0},
        {"average": "none", "mask_score": "rms"},
        {"average": "none", "schedule": "swa", "mask_from": "dense", "seed": 1},
        {"combine": "best", "mask_score": "random"},
        {"rewind": "average", "mask_score": "signal-to-noise", "schedule": "cosine"},
        {"cycles": 1, "prune": 0.5},
        {"target_density": 0.3},
    ]
    sizes = []
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (sizes.append(len(problems)) or 7, "forced"))
    settings = {name: value for name, value in SETTINGS.items() if name != "cycles"} | {"engine": f"eager:{way}"}
    found = sweep(lambda: networks.build("residual"), *digits, points, val=0.2, cycles=3, **settings)
    assert sizes == [7]
    for each in found.runs:
        assert each.error is None, each.error
        own = each.point if "target_density" in each.point else {"cycles": 3, **each.point}
        alone = fast_swamp(networks.build("residual"), *digits, val=0.2, **settings | own)
        same(each.result, alone, 1e-10)
    slow, fast = (max(row["train_seconds"] for row in each.result.history) for each in (found.runs[0], found.runs[5]))
    assert slow < 7 * fast  # each run is charged a share of the bank's time, not all of it


def test_the_share_of_a_packed_run(digits, monkeypatch):
    """The seconds of the runs in one bank add up to no more than the whole sweep took."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (4, "forced"))
    import time

    began = time.perf_counter()
    found = sweep(lambda: networks.build("tied"), *digits, {"seed": [0, 1, 2, 3]}, **SETTINGS)
    took = time.perf_counter() - began
    assert sum(row["seconds"] for each in found.runs for row in each.result.history) < took
    for each in found.runs:
        assert all(row["seconds"] >= row["train_seconds"] > 0 for row in each.result.history)


BASE = SwampConfig(**SETTINGS)


def config_of(name: str, base: SwampConfig = BASE) -> SwampConfig:
    return base.replace(**METHODS[name].settings(base))


def of_method(name: str, digits, **changes) -> SwampResult:
    return fast_swamp(networks.build("tied"), *digits, config=config_of(name), **changes)


def test_every_method_has_a_source_and_says_where_it_departs():
    names = "swamp swamp+ imp imp+swa swamp-sgd imp-swa-schedule imp-long imp-fine best-particle ensemble sms one-shot"
    assert list(METHODS) == [*names.split(), "random"]
    assert all(method.source and method.departs for method in METHODS.values())


def test_imp_is_the_naive_loop_with_one_particle_and_sgd(digits):
    plain = SETTINGS | {"particles": 1, "average": "none"}
    same(of_method("imp", digits), naive_swamp(networks.build("tied"), *digits, **plain), 1e-8)
    same(of_method("imp+swa", digits), naive_swamp(networks.build("tied"), *digits, **plain | {"average": "swa"}), 1e-8)


def test_the_last_iterate_of_the_swa_schedule(digits):
    """With an SWA window of one epoch, the mean is the last iterate, so both methods give equal results."""
    assert of_method("imp-swa-schedule", digits) == of_method("imp+swa", digits)
    longer = [of_method(name, digits, epochs=8) for name in ("imp-swa-schedule", "imp+swa", "imp")]
    heads = [each.at(0)[0].head.weight for each in longer]
    assert not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_swamp_and_its_own_ablations(digits):
    assert config_of("swamp") == BASE
    plus = of_method("swamp+", digits)
    assert [row["particles"] for row in plus.history] == [1, 1, 3, 3]
    alone = of_method("imp+swa", digits)
    for cycle in (0, 1):
        assert torch.equal(plus.at(cycle)[0].head.weight, alone.at(cycle)[0].head.weight)
    sgd = of_method("swamp-sgd", digits, cycles=0, keep_particles=True)
    for name, each in sgd.particles.items():  # particle 0 equals the particle of imp
        assert torch.equal(each[0], of_method("imp", digits, cycles=0).state_dict[name])
        assert torch.allclose(sgd.state_dict[name], each.mean(0), atol=1e-12)


def test_the_best_particle(digits):
    assert config_of("best-particle", BASE.replace(mask_score="rms")).combine == "best"
    result = of_method("best-particle", digits, val=0.2, keep_particles=True)
    own = result.state_dict["head.weight"]
    assert any(torch.equal(each, own) for each in result.particles["head.weight"])
    assert not torch.allclose(result.particles["head.weight"].mean(0), own)


def test_sms_starts_a_cycle_from_the_average(digits):
    """The weights before the first step of cycle 1 are the pruned average of cycle 0."""
    assert config_of("sms") == BASE.replace(rewind="average")
    trained = of_method("sms", digits, cycles=0)
    step, starts = Trainer.step, []

    def looking(trainer, handle):
        if int(trainer.bank.keys[0, 1]) == stream_of(1, 0) and trainer.done == 0:
            starts.append(trainer.bank.weights[0].clone())
        step(trainer, handle)

    Trainer.step = looking
    try:
        result = of_method("sms", digits, cycles=1)
    finally:
        Trainer.step = step
    expected = trained.state_dict["first.weight"] * result.masks["first.weight"]
    assert torch.equal(starts[0][: expected.numel()].view_as(expected), expected)


def test_compute_matched_imp(digits):
    longer, fine = (fast_swamp(networks.build("tied"), *digits, config=config_of(n)) for n in ("imp-long", "imp-fine"))
    swamp, imp = run(digits), of_method("imp", digits)
    assert longer.config.epochs == 6
    assert [row["kept"] for row in longer.history] == [row["kept"] for row in swamp.history]
    assert METHODS["imp-fine"].every(BASE) == 3
    assert len(fine.history) == 3 * 3 + 1
    for cycle, row in enumerate(imp.history):
        assert abs(fine.history[3 * cycle]["kept"] - row["kept"]) <= 3  # each of the three prunings rounds
    assert imp.history[1]["kept"] < fine.history[1]["kept"] < imp.history[0]["kept"]


def test_one_shot_and_random(digits):
    one_shot, random, imp = (of_method(name, digits, cycles=2) for name in ("one-shot", "random", "imp"))
    # After one pruning, one-shot and imp have equal masks.
    assert all(torch.equal(mask, one_shot.at(1)[1][name]) for name, mask in imp.at(1)[1].items())
    assert not torch.equal(masks_of(one_shot), masks_of(imp))
    for name, mask in imp.at(1)[1].items():  # both are made from the same dense run
        assert int(mask.sum()) == int(random.at(1)[1][name].sum())
        assert not torch.equal(mask, random.at(1)[1][name])
    kept = [[int(mask.sum()) for mask in imp.at(cycle)[1].values()] for cycle in (1, 2)]
    shuffled = of_method("random", digits, cycles=2, layer_kept=kept)
    naive = naive_swamp(networks.build("tied"), *digits, config=shuffled.config)
    assert SwampConfig.from_toml(shuffled.config.to_toml()).layer_kept == tuple(map(tuple, kept))
    for cycle in (1, 2):
        for name, mask in imp.at(cycle)[1].items():
            assert int(mask.sum()) == int(shuffled.at(cycle)[1][name].sum())
            assert torch.equal(naive.at(cycle)[1][name], shuffled.at(cycle)[1][name])
    for wrong in ([kept[0]], [kept[1], kept[0]], [[0] * len(each) for each in kept]):
        with pytest.raises(ValueError, match="`layer_kept`"):
            of_method("random", digits, cycles=2, layer_kept=wrong)


def test_seeds_of_an_ensemble():
    method = METHODS["ensemble"]
    assert config_of("ensemble") == config_of("imp")
    seeds = [seeds_of(method, BASE, seed) for seed in range(20)]
    assert [each[0] for each in seeds] == list(range(20))
    assert len({seed for each in seeds for seed in each}) == 60
    assert all(0 <= seed < 1 << 63 for each in seeds for seed in each)
    assert seeds_of(METHODS["swamp"], BASE, 5) == [5]


def test_scores_of_one_particle_are_all_one():
    """Methods with one particle rank by |w|, whatever mask_score the comparison has."""
    for score in ("rms", "signal-to-noise", "mean-abs"):
        assert config_of("imp", BASE.replace(mask_score=score)) == config_of("imp")
