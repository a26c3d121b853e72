"""Rates by parameter: `groups` and `decay_norms_and_biases` give the naive loop's results on every engine."""

from __future__ import annotations

import networks
import pytest
import torch
from equality import same
from pretended import gpu
from skips import HAS_A_GPU, HAS_GPU
from stops import ALWAYS, Interrupted, before_steps, stop_at

from benchmarks.durability import same_bits
from swamp_fast import fast_swamp, naive_swamp, sweep
from swamp_fast.engines.fused.compact import CompactBank
from swamp_fast.studies import packing

GROUPS = [
    {"params": ["stem.weight", "head.bias"], "lr": 0.5, "weight_decay": 0.02},
    {"params": "conv.*", "lr": 2.0},
    {"params": "norm?.weight", "weight_decay": 0.05},
]
RATES = {
    "groups": {"groups": GROUPS},
    "no decay of norms and biases": {"decay_norms_and_biases": False, "weight_decay": 0.05},
    "both": {"groups": GROUPS, "decay_norms_and_biases": False, "weight_decay": 0.05},
}
OPTIMIZERS = {"sgd": {"nesterov": True}, "adamw": {"optimizer": "adamw", "lr": 3e-3, "swa_lr": 1e-3, "clip_norm": 1.0}}
SETTINGS = {
    "particles": 3,
    "cycles": 2,
    "epochs": 4,
    "ticket_epochs": 2,
    "batch_size": 32,
    "precision": "float64",
    "keep_particles": True,
    "progress": False,
}
BOTH = pytest.mark.parametrize("function", [fast_swamp, naive_swamp])


@pytest.fixture(scope="module")
def naive(digits):
    """The naive loop's result, computed once for each optimizer and choice of rates."""
    results = {}

    def get(optimizer: str, rates: str | None):
        if (optimizer, rates) not in results:
            settings = SETTINGS | OPTIMIZERS[optimizer] | RATES.get(rates, {})
            results[optimizer, rates] = naive_swamp(networks.build("residual"), *digits, **settings)
        return results[optimizer, rates]

    return get


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ["eager:lanes", "eager:fold", "fused"])
def test_equal_to_the_naive_loop(engine, optimizer, rates, digits, naive):
    settings = SETTINGS | OPTIMIZERS[optimizer] | RATES[rates]
    fast = fast_swamp(networks.build("residual"), *digits, engine=engine, **settings)
    assert fast.engine["name"] == engine
    same(fast, naive(optimizer, rates))


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_settings_have_an_effect(optimizer, rates, naive):
    found, plain = naive(optimizer, rates), naive(optimizer, None)
    assert max(float((found.state_dict[key] - value).abs().max()) for key, value in plain.state_dict.items()) > 1e-4


@pytest.mark.parametrize("name", ["vit", "depthwise", "tied"])
def test_every_kind_of_norm_equals_the_naive_loop(name, digits):
    """Layer norms, group norms, bare parameters, and a weight that two layers share."""
    settings = SETTINGS | {"cycles": 1, "epochs": 2, "weight_decay": 0.1, "decay_norms_and_biases": False}
    settings |= {"groups": [{"params": "head*", "lr": 0.1}]}
    fast = fast_swamp(networks.build(name), *digits, engine="eager", **settings)
    same(fast, naive_swamp(networks.build(name), *digits, **settings))


@BOTH
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_factor_of_0_keeps_weights(function, optimizer, digits):
    """The weights of the group stay as they are, bit for bit, except that masks remove some."""
    settings = SETTINGS | OPTIMIZERS[optimizer] | {"precision": "float32", "cycles": 1}
    model = networks.build("residual")
    result = function(model, *digits, groups=[{"params": ["stem.*", "norm1.*"], "lr": 0.0}], **settings)
    given, found = model.state_dict(), result.state_dict
    for name in ("stem.weight", "norm1.weight", "norm1.bias"):
        kept = result.masks.get(name, torch.ones((), dtype=torch.bool))
        assert torch.equal(found[name], given[name] * kept), name
    assert 0 < float(result.masks["stem.weight"].double().mean()) < 1
    assert not torch.equal(found["head.weight"], given["head.weight"])


@pytest.mark.parametrize("mode", ["lanes", "fused"])
def test_a_run_with_groups_resumes_bit_for_bit(mode, on, digits, tmp_path):
    settings = on(mode) | {"checkpoint_minutes": ALWAYS, "decay_norms_and_biases": False, "groups": GROUPS}
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    for moment in (1, 7, 17):
        with before_steps(stop_at(moment)), pytest.raises(Interrupted):
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / str(moment))
        fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / str(moment))
        assert same_bits(tmp_path / "whole", tmp_path / str(moment)), moment
    settings["groups"] = GROUPS[:2]
    with pytest.raises(ValueError, match=r"holds another run: groups was \[\{'params'"):
        fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")


@pytest.mark.parametrize("engine", ["eager:lanes", "fused"])
def test_runs_with_equal_groups_share_a_bank(engine, digits, monkeypatch):
    """Each run of a pack has its own weight decay and its own mask; runs with other groups are packed apart."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (len(problems), "forced"))
    settings = SETTINGS | {"engine": engine, "precision": "float32", "cycles": 1, "decay_norms_and_biases": False}
    points = [
        {"groups": GROUPS},
        {"groups": GROUPS, "weight_decay": 0.1, "seed": 1},
        {"groups": GROUPS[:1]},
    ]
    model, problems = networks.build("residual"), []
    monkeypatch.setattr(
        packing, "packs_of", lambda given, own=packing.packs_of: problems.append(own(given)) or own(given)
    )
    found = sweep(model, *digits, points, **settings)
    assert problems[0] == [[0, 1], [2]]
    for run, point in zip(found.runs, points, strict=True):
        alone = fast_swamp(model, *digits, **settings | point)
        assert all(torch.equal(value, run.result.state_dict[name]) for name, value in alone.state_dict.items())
        assert all(torch.equal(value, run.result.masks[name]) for name, value in alone.masks.items())


@pytest.mark.skipif(HAS_GPU, reason=HAS_A_GPU)
@pytest.mark.parametrize("engine", ["eager:fold", "fused"])
def test_packed_runs_on_a_gpu_have_segments_of_their_own(engine, digits, monkeypatch):
    """The masks of runs that share a compact bank end its segments at different places."""
    monkeypatch.setattr(packing, "runs_at_once", lambda engine, problems: (len(problems), "forced"))
    banks = []
    monkeypatch.setattr(
        CompactBank, "rewind_", lambda bank, *given, own=CompactBank.rewind_: banks.append(bank) or own(bank, *given)
    )
    (inputs, targets), (test_inputs, test_targets) = digits
    data = (inputs[:24, :, ::2, ::2], targets[:24]), (test_inputs[:4, :, ::2, ::2], test_targets[:4])
    model = torch.nn.Sequential(
        torch.nn.Flatten(), *(torch.nn.Linear(16, 16), torch.nn.ReLU()), torch.nn.Linear(16, 16), torch.nn.ReLU(),
        torch.nn.Linear(16, 10),
    )  # fmt: skip
    settings = SETTINGS | {"epochs": 2, "batch_size": 12, "particles": 2, "decay_norms_and_biases": False}
    settings["groups"] = [{"params": "1.*", "lr": 0.3}, {"params": "3.weight", "weight_decay": 0.05}]
    points = [{"seed": 0}, {"seed": 1, "weight_decay": 0.1, "lr": 0.2}]
    with gpu(triton=engine == "fused"):
        runs = sweep(model, *data, points, **settings, engine=engine, device="cuda").runs
        ends = [bank.segment_ends.tolist() for bank in banks if len(bank.configs) > 1]
    for run, point in zip(runs, points, strict=True):
        assert run.error is None
        same(run.result, naive_swamp(model, *data, **settings | point))
    if engine == "fused":
        assert len(ends) == 4  # for the ticket and three cycles
        assert ends[0][0] == ends[0][1]
        assert ends[-1][0] != ends[-1][1]


BAD = [
    ([{"params": "body.*", "lr": 0.1}], r"`groups\[0\]` with params = \['body.\*'\] matches none of .* stem.weight"),
    (
        [{"params": "head.*", "lr": 0.1}, {"params": ["conv.weight", "*.bias"], "weight_decay": 0.0}],
        r"`groups\[0\]` and `groups\[1\]` both match head.bias, .* Make their patterns narrower",
    ),
]


@BOTH
@pytest.mark.parametrize(("groups", "text"), BAD)
def test_refuses_groups_that_match_nothing_or_overlap(groups, text, function, digits, tmp_path):
    with pytest.raises(ValueError, match=text):
        function(networks.build("residual"), *digits, groups=groups, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
