"""Runs whose dense cycles use the eager engine and whose sparse cycles use the fused engine."""

from __future__ import annotations

import re

import pytest
import torch
from equality import same

from swamp_fast import fast_swamp, models, naive_swamp
from swamp_fast.engines import start
from swamp_fast.engines.eager.choice import Choice

RUN = {"particles": 2, "cycles": 3, "epochs": 4, "ticket_epochs": 1, "batch_size": 32, "prune": 0.5, "progress": False}
NAME = "fused@0.4,eager:lanes"
EXPECTED = {"ticket": "eager", "0": "eager", "1": "eager", "2": "fused", "3": "fused"}


@pytest.fixture
def train(digits):
    (inputs, targets), _ = digits
    return inputs[:160], targets[:160]


def test_a_run_on_both_equals_the_naive_loops(train):
    model = models.SmallCNN(1, 10)
    settings = RUN | {"precision": "float64", "keep_particles": True}
    fast = fast_swamp(model, train, **settings, engine=NAME)
    assert fast.engine["engine"] == "by density"
    assert fast.engine["name"] == NAME
    assert fast.engine["engines"] == EXPECTED
    same(fast, naive_swamp(model, train, **settings))


def test_resumed_is_uninterrupted(train, tmp_path):
    model = models.SmallCNN(1, 10)

    def stop(row):
        if row["cycle"] == 2:
            raise KeyboardInterrupt

    whole = fast_swamp(model, train, **RUN, engine=NAME)
    with pytest.raises(KeyboardInterrupt):
        fast_swamp(model, train, **RUN, engine=NAME, run_dir=str(tmp_path), on_cycle=stop)
    again = fast_swamp(model, train, **RUN, engine=NAME, run_dir=str(tmp_path))
    assert again.engine["engines"] == EXPECTED
    assert all(torch.equal(each, again.state_dict[name]) for name, each in whole.state_dict.items())


@pytest.mark.parametrize(
    ("eager", "name"),
    [
        (3.0, "fused"),
        (0.5, "eager:lanes:channels_last"),
        (1.5, r"fused@0\.5\d+,eager:lanes:channels_last"),  # halfway between the FLOP densities 1 and about 1/8
    ],
)
def test_the_fastest_is_measured_and_its_name_selects_it_again(train, monkeypatch, eager, name):
    def seconds(engine, problem, mask):
        return eager if engine.kind == "eager" else 2.0 if bool(mask.all()) else 1.0

    model, settings = models.SmallCNN(1, 10), RUN | {"epochs": 1}
    with monkeypatch.context() as timed:
        timed.setattr(start, "seconds_of_steps", seconds)
        timed.setattr(start, "fastest_choice", lambda *_: Choice("lanes", True, "the fastest measured", {}))
        measured = fast_swamp(model, train, **settings, engine="fastest")
    assert re.fullmatch(name, measured.engine["name"])
    assert measured.engine["why"].startswith("the fastest measured")
    again = fast_swamp(model, train, **settings, engine=measured.engine["name"])
    assert again.engine["name"] == measured.engine["name"]
    assert all(torch.equal(each, again.state_dict[name]) for name, each in measured.state_dict.items())
