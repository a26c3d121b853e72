"""Dropout from a particle's stream has torch's distribution, and the same draws alone, folded and repeated."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from equality import same
from torch import nn
from torch.utils.checkpoint import checkpoint

from swamp_fast import fast_swamp, naive_swamp, ops
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import DROPOUT
from swamp_fast.problem.prepare import prepare

KEYS = torch.tensor([[1, 2, 3], [1, 3, 3]])
FORMS = {
    "F.dropout": lambda x: F.dropout(x, 0.3),
    "nn.Dropout": nn.Dropout(0.3),
    "nn.Dropout in place": lambda x: nn.Dropout(0.3, inplace=True)(x.clone()),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "torch.dropout_": lambda x: torch.dropout_(x.clone(), 0.3, True),
    "nn.Dropout1d": nn.Dropout1d(0.3),
    "nn.Dropout2d": lambda x: nn.Dropout2d(0.3)(x[..., None])[..., 0],
    "nn.Dropout3d": lambda x: nn.Dropout3d(0.3)(x[..., None, None])[..., 0, 0],
    "torch.feature_dropout": lambda x: torch.feature_dropout(x, 0.3, True),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_distribution_is_torchs(form):
    """Mean and standard deviation equal those of torch's dropout, and nothing is drawn from torch's generator."""
    inputs = torch.randn(300, 100, 10)
    theirs = FORMS[form](inputs)
    state = torch.get_rng_state()
    with DropoutStream(KEYS[:1]):
        ours = FORMS[form](inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(ours, theirs)
    assert ours.mean() == pytest.approx(float(theirs.mean()), abs=0.01)
    assert ours.std() == pytest.approx(float(theirs.std()), rel=0.01)
    # Zeros must occur in both results or in neither, and so must nonzero elements.
    assert set(torch.where(inputs[0] == 0, 0, ours[0]).eq(0).unique().tolist()) == set(
        theirs[0].eq(0).unique().tolist()
    )


@pytest.mark.parametrize("form", list(FORMS))
def test_folded_lanes_draw_what_they_draw_alone(form):
    inputs = torch.randn(8, 6, 5)
    with DropoutStream(KEYS):
        together = FORMS[form](inputs), FORMS[form](inputs)
    for lane in range(2):
        with DropoutStream(KEYS[lane : lane + 1]):
            alone = FORMS[form](inputs[4 * lane : 4 * lane + 4]), FORMS[form](inputs[4 * lane : 4 * lane + 4])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[4 * lane : 4 * lane + 4])
    assert not torch.equal(*together)  # a second call draws other numbers


def test_the_draw_is_the_word_that_the_docs_name():
    with DropoutStream(KEYS[:1]):
        F.dropout(torch.ones(7), 0.5)
        out = F.dropout(torch.ones(4, 5), 0.25)
    words = ops.philox(KEYS[:1], DROPOUT + 256, 20).view(4, 5).double() + 2**31
    assert torch.equal(out == 0, words < 0.25 * 2**32)


def test_off_and_everything():
    inputs = torch.randn(5, 4)
    with DropoutStream(KEYS[:1]) as stream:
        assert F.dropout(inputs, 0.0) is inputs
        assert F.dropout(inputs, 0.9, training=False) is inputs
        assert nn.Dropout(0.9).eval()(inputs) is inputs
        assert stream.calls == 0
        assert F.dropout(inputs, 1.0).eq(0).all()
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            F.dropout(inputs, 1.5)


def test_attention_drops_its_weights():
    """All forms of attention have dropout: the module with and without weights, and the function with its options."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 8).unbind()
    mask = torch.rand(5, 5) < 0.7
    mask.fill_diagonal_(True)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}, {"scale": 0.1}):
        plain = F.scaled_dot_product_attention(query, key, value, **options)
        with DropoutStream(KEYS[:1]) as stream:
            assert torch.allclose(F.scaled_dot_product_attention(query, key, value, **options), plain)
            assert stream.calls == 0
            many = torch.stack(
                [F.scaled_dot_product_attention(query, key, value, dropout_p=0.2, **options) for _ in range(4000)]
            )
        assert (many.mean(0) - plain).abs().max() < 0.1  # unbiased
        assert many.std(0).max() > 0.05
    grouped = torch.randn(2, 4, 5, 8)
    with DropoutStream(KEYS[:1]):
        out = F.scaled_dot_product_attention(grouped, key[:, None], value[:, None], dropout_p=1e-9, enable_gqa=True)
    plain = F.scaled_dot_product_attention(grouped, key[:, None], value[:, None], enable_gqa=True)
    assert torch.allclose(out, plain, atol=1e-5)
    module = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    state = torch.get_rng_state()
    for need_weights in (True, False):
        with DropoutStream(KEYS[:1]) as stream:
            first = module(query, query, query, need_weights=need_weights)[0]
            assert stream.calls == 1
        with DropoutStream(KEYS[:1]):
            assert torch.equal(module(query, query, query, need_weights=need_weights)[0], first)
        with DropoutStream(KEYS[1:]):
            assert not torch.equal(module(query, query, query, need_weights=need_weights)[0], first)
    assert torch.equal(state, torch.get_rng_state())


def test_torch_is_as_before_afterwards():
    dropout, attention = F.dropout, F.scaled_dot_product_attention
    module = nn.MultiheadAttention(8, 2, dropout=0.5)
    with DropoutStream(KEYS[:1]), pytest.raises(AssertionError):
        module(torch.randn(5, 1, 7), torch.randn(5, 1, 7), torch.randn(5, 1, 7))
    assert F.dropout is dropout
    assert F.scaled_dot_product_attention is attention


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_refused(reentrant):
    """Dropout that runs again in the backward pass would draw other numbers, so it is an error."""

    class Checkpointed(networks.Tied):
        def forward(self, x):
            x = self.first(x.flatten(1))
            x = checkpoint(lambda x: F.dropout(F.relu(self.middle(x)), 0.5), x, use_reentrant=reentrant)
            return self.head(F.relu(self.again(x)))

    inputs, targets = torch.randn(64, 64), torch.arange(64) % 10
    with pytest.raises(ValueError, match="activation checkpointing"):
        prepare(Checkpointed(), (inputs, targets), settings={"batch_size": 8})


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_draws_from_torchs_generator(kind, digits):
    """Such a model therefore runs lane by lane, and the generator is seeded for every particle and step."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), kind(0.3), nn.SELU(), nn.Flatten(), nn.Linear(4 * 36, 16), nn.SELU()
        return nn.Sequential(*layers, nn.Linear(16, 10))

    settings = {"particles": 2, "cycles": 1, "epochs": 2, "ticket_epochs": 1, "batch_size": 64, "progress": False}
    settings |= {"precision": "float64", "keep_particles": True}
    assert prepare(made(), *digits, settings=settings).probe.draws_elsewhere
    naive = naive_swamp(made(), *digits, **settings)
    model = made()
    torch.manual_seed(1)  # the user's seed must not matter
    fast = fast_swamp(model, *digits, **settings)
    same(fast, naive)
    assert fast.engine["name"].startswith("eager:lanes")
    assert not torch.equal(*fast.particles["0.weight"])
    with pytest.raises(ValueError, match=r'engine="eager:fold" can\'t run the model: it draws random numbers'):
        fast_swamp(made(), *digits, **settings, engine="eager:fold")


def test_lanes_must_stand_first():
    with DropoutStream(KEYS), pytest.raises(RuntimeError, match="axis 0 must hold 2 lanes"):
        F.dropout(torch.ones(3, 4), 0.5)
