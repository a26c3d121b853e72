"""The eager engine for dense cycles and the fused one for sparse ones, in one run."""

from __future__ import annotations

import pytest
import torch
from test_odd_models import same

from swamp_fast import engines, fast_swamp, models, naive_swamp
from swamp_fast.engines import by_density
from swamp_fast.engines.eager import Choice, EagerEngine

RUN = {"particles": 2, "cycles": 3, "epochs": 4, "ticket_epochs": 1, "batch_size": 32, "prune": 0.5, "progress": False}
EXPECTED = {"ticket": "eager", "0": "eager", "1": "eager", "2": "fused", "3": "fused"}


@pytest.fixture
def timed(monkeypatch):
    """A stopwatch by which the fused engine takes twice the density, and the eager one 1; and what it was asked."""
    asked = []

    def seconds(engine, problem, mask):
        if isinstance(engine, EagerEngine):
            return 1.0
        asked.append(round(float(mask.float().mean()), 2))
        return 2 * asked[-1]

    for module in (engines, by_density):
        monkeypatch.setattr(module, "seconds_of_steps", seconds)
    return asked


@pytest.fixture
def train(digits):
    (inputs, targets), _ = digits
    return inputs[:160], targets[:160]


def test_a_run_on_both_equals_the_naive_loops(timed, train):
    model = models.SmallCNN(1, 10)
    settings = RUN | {"precision": "float64", "keep_particles": True}
    fast = fast_swamp(model, train, **settings)
    assert fast.engine["engine"] == "by density"
    assert fast.engine["engines"] == EXPECTED
    # The first and the last mask at the start; then before each cycle, until the fused engine has won.
    assert timed[0] == 1.0
    assert timed[2:] == [1.0, 1.0, 0.5, 0.25]
    same(fast, naive_swamp(model, train, **settings))


def test_resumed_is_uninterrupted(timed, train, tmp_path, monkeypatch):
    model = models.SmallCNN(1, 10)
    one_way = Choice("lanes", False, "so that both runs are alike", {})
    monkeypatch.setattr(engines, "choose", lambda problem, particles: one_way)

    def stop(row):
        if row["cycle"] == 2:
            raise KeyboardInterrupt

    whole = fast_swamp(model, train, **RUN)
    with pytest.raises(KeyboardInterrupt):
        fast_swamp(model, train, **RUN, run_dir=str(tmp_path), on_cycle=stop)
    timed.clear()
    again = fast_swamp(model, train, **RUN, run_dir=str(tmp_path))
    assert not timed, "what was chosen is replayed, not measured again"
    assert again.engine["engines"] == EXPECTED
    assert all(torch.equal(each, again.state_dict[name]) for name, each in whole.state_dict.items())


@pytest.mark.parametrize(("eager", "chosen"), [(3.0, "fused"), (0.1, "eager")])
def test_one_engine_where_it_is_faster_throughout(timed, train, monkeypatch, eager, chosen):
    fused = engines.seconds_of_steps
    monkeypatch.setattr(
        engines, "seconds_of_steps", lambda engine, *rest: eager if engine.name == "eager" else fused(engine, *rest)
    )
    assert fast_swamp(models.SmallCNN(1, 10), train, **RUN).engine["engine"] == chosen
