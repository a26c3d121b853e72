"""The rule for engine="auto": its densities agree with the measured tables, and it reads only what it may."""

from __future__ import annotations

import json
import re

import networks
import pytest
import torch
from paths import ROOT
from stops import RUN
from torch import nn

from swamp_fast import SwampConfig, fast_swamp, models
from swamp_fast.engines import selection, switching
from swamp_fast.engines.fused.coverage import fused_plan
from swamp_fast.engines.selection import CROSSOVER, by_rule, eager_by_rule, flop_density, kind_of, named
from swamp_fast.problem.prepare import prepare

TABLES = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("engine_rule_*.json"))]
# Where the rule selects the fused engine, the eager engine's time / the fused engine's time must be at least this. It
# is below 1 because measured medians vary by about 5 %.
MIN_RATIO = 0.95
QUIET = {"progress": False}


def tables_of(precision: str, kind: str) -> list[dict[float, float]]:
    """For each measured model of a kind, a dict from FLOP density to the eager engine's time / the fused engine's."""
    return [
        {row["FLOP density"]: row["eager / this"] for row in table["table"] if row[""] == "fused"}
        for table in TABLES
        if (table["precision"], table["kind"]) == (precision, kind) and not table["amx"]
    ]


@pytest.mark.parametrize(("precision", "kind"), CROSSOVER)
def test_the_fused_engine_is_no_slower_up_to_the_density_of_the_rule(precision, kind):
    tables = tables_of(precision, kind)
    assert tables, "measure it: python -m benchmarks.engine_rule"
    for ratios in tables:
        assert all(ratio >= MIN_RATIO for density, ratio in ratios.items() if density <= CROSSOVER[precision, kind])


@pytest.mark.parametrize(("precision", "kind"), [each for each, density in CROSSOVER.items() if density < 1])
def test_the_density_of_the_rule_is_no_smaller_than_need_be(precision, kind):
    """At the next larger measured density, the fused engine is slower for at least one model."""
    tables = tables_of(precision, kind)
    following = [min(density for density in ratios if density > CROSSOVER[precision, kind]) for ratios in tables]
    assert any(ratios[density] < 1 for density, ratios in zip(following, tables, strict=True))


def test_the_reason_says_that_amx_was_not_measured(monkeypatch):
    assert not any(table["amx"] for table in TABLES), "AMX has been measured: add its densities to CROSSOVER"
    problem = problem_of(models.SmallCNN(1, 10), precision="bfloat16")
    monkeypatch.setattr(selection, "has_amx", lambda: True)
    selected = by_rule(problem, fused_plan(problem))
    assert selected.fused_up_to == CROSSOVER["bfloat16", selection.NARROW] * selection.AMX_CROSSOVER_FACTOR
    assert "not been measured" in selected.why


def problem_of(model: nn.Module, channels: int = 1, side: int = 8, **settings):
    images = torch.randint(0, 256, (40, channels, side, side), dtype=torch.uint8)
    return prepare(model, (images, torch.arange(40) % 10), settings={"batch_size": 16, **QUIET, **settings})


@pytest.mark.parametrize(
    ("model", "channels", "kind"),
    [
        (lambda: models.SmallCNN(1, 10), 1, selection.NARROW),
        (lambda: models.VGG([64, 128, "M", 128], 3, 10), 3, selection.WIDE),
        (lambda: models.MLP(64, 10, 32), 1, selection.LINEAR),
    ],
)
def test_kinds(model, channels, kind):
    problem = problem_of(model(), channels)
    assert kind_of(problem, fused_plan(problem)) == kind


def test_it_reads_neither_cycles_nor_particles_nor_time(monkeypatch):
    for module in (switching, selection):
        assert not hasattr(module, "time")
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("the rule read the clock"))
    names = set()
    for settings in ({}, {"cycles": 3, "particles": 8}, {"particles": (1, 1), "cycles": 1, "prune": 0.9}):
        problem = problem_of(models.MLP(64, 10, 32), **settings)
        names.add(by_rule(problem, fused_plan(problem)).name)
    assert names == {"fused@0.35,eager:lanes"}


def test_channels_last_where_a_convolution_reads_pictures(digits):
    def format_of(model, data=digits, **settings):
        return eager_by_rule(prepare(model, *data, settings=QUIET | {"batch_size": 32, "cycles": 1} | settings))

    assert format_of(networks.build("residual")).channels_last
    assert not format_of(networks.build("tied")).channels_last  # linear layers on pictures
    flat = [(pictures.flatten(2).float(), labels) for pictures, labels in digits]
    sequences = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 62, 10))
    assert not format_of(sequences, flat).channels_last

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.head(x.view(len(x), -1))

    choice = format_of(Views())
    assert not choice.channels_last
    assert "in the float64 check with channels last, it raises RuntimeError: view" in choice.why


def test_names_are_read_as_they_are_written():
    names = ["fused", "eager:lanes", "eager:fold_grouped:channels_last", "fused@0.125,eager:lanes:channels_last"]
    for name in (*names, "fused@0.00001,eager:lanes", "fused@0.999999,eager:lanes"):
        assert named(name, "").name == name
        assert SwampConfig(engine=name).engine == name
    for name in (
        "fused@1.0,eager:lanes",
        "fused@0.0,eager:lanes",
        "fused@0.0000001,eager:lanes",
        "eager:",
        "eager:lanes:last",
        "fused@0.5",
        "lanes",
    ):
        assert named(name, "") is None
        with pytest.raises(ValueError, match=f"`engine` must be one of .* got {re.escape(json.dumps(name))}"):
            SwampConfig(engine=name)


def test_each_cycle_has_the_engine_that_its_mask_calls_for(digits):
    settings = RUN | {"cycles": 3, "epochs": 1, "engine": "fused@0.3,eager:lanes", "precision": "float64"}
    model = models.SmallCNN(1, 10, 8)
    result = fast_swamp(model, *digits, **settings)
    problem = prepare(model, *digits, settings=settings)
    for cycle, row in enumerate(result.history):
        mask = torch.cat([each.flatten() for each in result.at(cycle)[1].values()])
        padded = problem.mask.clone()
        for name, view in problem.layout.mask_views(padded).items():
            view.copy_(result.at(cycle)[1][name])
        sparse = flop_density(problem, padded) <= 0.3
        assert int(mask.sum()) == row["kept"]
        assert result.engine["engines"][str(cycle)] == ("fused" if sparse else "eager")
    assert set(result.engine["engines"].values()) == {"eager", "fused"}
