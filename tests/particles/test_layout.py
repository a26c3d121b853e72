"""The flat layout of parameters, and the selection of those that are pruned."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import nn

from swamp_fast.common.tree import tensors
from swamp_fast.config import SwampConfig
from swamp_fast.engines.fused.compact import Compact
from swamp_fast.models import MODELS, build_model
from swamp_fast.particles.layout import ALIGNMENT, Layout, Rates, Segment
from swamp_fast.particles.schedule import kept_at
from swamp_fast.problem.checks import check_cycles
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.prunable import select_prunable


def test_layout_is_aligned_complete_and_reversible():
    model = networks.build("vit")
    prunable = {"mlp.0.weight", "mlp.2.weight"}
    layout = Layout.of(model.named_parameters(), prunable)
    assert [entry.name for entry in layout.prunable] == ["mlp.0.weight", "mlp.2.weight"]
    assert layout.prunable[-1].end <= layout.Q <= layout.P
    assert all(entry.begin % ALIGNMENT == 0 for entry in layout.entries)
    assert layout.Q % ALIGNMENT == layout.P % ALIGNMENT == 0
    named = dict(model.named_parameters())
    vector = layout.flat(named, torch.float64, torch.device("cpu"))
    for name, view in layout.views(torch.stack([vector, 2 * vector])).items():
        assert torch.equal(view[1], 2 * named[name].double())
    assert vector.count_nonzero() <= sum(p.numel() for p in model.parameters())
    mask = layout.full_mask(torch.device("cpu"))
    assert int(mask.sum()) == layout.weights == sum(named[name].numel() for name in prunable)


def test_scalars_and_odd_sizes():
    model = nn.Module()
    model.scale, model.odd = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.randn(3, 7))
    layout = Layout.of(model.named_parameters(), {"odd"})
    views = layout.views(layout.flat(dict(model.named_parameters()), torch.float32, torch.device("cpu")))
    assert views["scale"].shape == ()
    assert float(views["scale"]) == 3.0
    assert layout.weights == 21


def test_segments_cover_the_vector_and_its_compact_form():
    """Neighbours with equal rates share a segment; a compact vector's segments hold the same parameters."""
    model = networks.build("vit")
    named, prunable = dict(model.named_parameters()), {"mlp.0.weight", "mlp.2.weight", "patches.weight"}
    one = Layout.of(named.items(), prunable)
    assert one.segments == (Segment(one.P, Rates()),)
    rates = {name: Rates(0.5 if name.startswith("mlp.2") else 1.0, 0.0 if "bias" in name else None) for name in named}
    layout = Layout.of(named.items(), prunable, rates)
    assert all(a.rates != b.rates for a, b in zip(layout.segments, layout.segments[1:], strict=False))
    mask = (torch.rand(layout.Q) < 0.3) & layout.full_mask(torch.device("cpu"))
    for extent in (layout, Compact(layout, mask), Compact(layout, mask & False), Compact(layout, mask, None, layout.Q)):
        ends = [segment.end for segment in extent.segments]
        assert ends == sorted(ends)
        assert ends[-1] == extent.P
        assert [segment.rates for segment in extent.segments] == [segment.rates for segment in layout.segments]
        where = extent.where if isinstance(extent, Compact) else torch.arange(layout.P)
        for entry in layout.entries:
            for place in where[entry.begin : entry.end].tolist():
                inside = next(segment for segment in extent.segments if place < segment.end)
                assert place < 0 or inside.rates == rates[entry.name]


DEFAULTS = {
    "residual": {"stem.weight", "conv.weight"},
    "vit": {
        *("patches.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
        *("mlp.0.weight", "mlp.2.weight"),
    },
    "depthwise": {"body.0.weight", "body.3.weight", "body.6.weight"},
    "tied": {"first.weight", "middle.weight"},
    "sequence_first": {
        "embed.weight",
        *(f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("linear1.weight", "linear2.weight")),
        *(f"encoder.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("in_proj_weight", "out_proj.weight")),
    },
}


@pytest.mark.parametrize("name", list(DEFAULTS))
def test_the_default_leaves_the_output_layer(name, digits):
    problem = prepare(networks.build(name), *digits, settings={"batch_size": 32})
    assert {entry.name for entry in problem.layout.prunable} == DEFAULTS[name]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.conv = nn.Linear(8, 8), nn.Linear(8, 3), nn.Conv1d(8, 4, 1)
        self.embed = nn.Embedding(5, 8)
        self.from_embedding = nn.Linear(8, 5, bias=False)
        self.from_embedding.weight = self.embed.weight

    def forward(self, x):
        x = self.body(x).relu() + self.from_embedding(self.body(x)).sum()
        return {"main": self.conv(x[..., None]).mean(-1), "aux": [self.aux(x)]}


def ran(model, inputs):
    outputs = model(inputs)
    return outputs, sum(output.sum() for output in tensors(outputs))


def test_every_output_layer_and_shared_embeddings_are_left():
    model = TwoHeads()
    assert select_prunable(model, None, *ran(model, torch.randn(2, 8))).names == {"body.weight"}


def test_names_patterns_and_predicates():
    model = networks.build("residual")
    outputs = ran(model, torch.randn(2, 1, 8, 8))
    every = {"stem.weight", "norm1.weight", "norm2.weight", "conv.weight", "head.weight"}
    with pytest.warns(UserWarning, match=r"also selects norm1\.weight, norm2\.weight, which are biases or the weights"):
        assert select_prunable(model, "*.weight", *outputs).names == every
    assert select_prunable(model, sorted(every), *outputs).names == every  # by name, so without a warning
    assert select_prunable(model, ["stem", "head.weight"], *outputs).names == {"stem.weight", "head.weight"}
    assert select_prunable(model, lambda name, p: p.dim() == 4, *outputs).names == {"stem.weight", "conv.weight"}
    model.conv.weight.requires_grad_(False)
    assert select_prunable(model, None, *ran(model, torch.randn(2, 1, 8, 8))).names == {"stem.weight"}
    for wanted, text in (
        (["stem", "stom"], '"stom" matches no trained parameter; there are stem.weight'),
        (lambda name, p: False, "`prunable` selects none of the trained parameters"),
        ([3], "`prunable` must be None, the name of a parameter .* got list with int"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            select_prunable(model, wanted, *outputs)


def test_convolution_counts_of_the_protocols_networks():
    """The numbers of convolution weights are the known ones, and every network runs on pictures of 32 x 32."""
    counts = {"wrn28_2": 1_462_704, "vgg19": 20_018_880}
    for name in MODELS:
        model = build_model(name, 3, 32, 32, 10)
        convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
        assert counts.get(name, convolutions) == convolutions
        assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert build_model("networks:resnet18", 1, 8, 8, 10) is not None
    for name, text in (
        ("resnet21", '`--model` must be one of resnet20, .* or package.module:factory; got "resnet21"'),
        ("networks:nothing", "can't be imported"),
        ("networks:build", "missing a required argument: 'name'"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            build_model(name, 1, 8, 8, 10)


def test_counts_over_cycles():
    kept, counts = 269_968, []
    for _ in range(14):
        kept = kept_at(SwampConfig(), 1, kept, 269_968)
        counts.append(kept)
    assert counts[:3] == [215_974, 172_779, 138_223]
    assert kept_at(SwampConfig(cycles=1), 1, 777, 1000) == round(0.8 * 777)


@pytest.mark.parametrize(
    ("kept", "prune", "cycles", "text"),
    [
        (36, 0.2, 14, "in cycle 13 nothing would be pruned of 2. Set cycles to at most 12"),
        (3, 0.9, 1, "in cycle 1 nothing would be left to keep. Set cycles to at most 0"),
    ],
)
def test_more_cycles_than_weights(kept, prune, cycles, text):
    with pytest.raises(ValueError, match=text):
        check_cycles(SwampConfig(prune=prune, cycles=cycles), kept, kept)
    check_cycles(SwampConfig(), 10**6, 10**6)
