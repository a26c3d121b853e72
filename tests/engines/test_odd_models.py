"""Models with unusual forwards: every execution mode gives the naive loop's result or refuses the model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equality import same
from networks import EAGER_MODES as MODES
from torch import Tensor, nn

from swamp_fast import fast_swamp, naive_swamp
from swamp_fast.engines.eager.check import why_not_fold
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.fastest import fastest_choice
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

SETTINGS = {
    "engine": "eager",
    "particles": 3,
    "cycles": 2,
    "epochs": 2,
    "ticket_epochs": 1,
    "batch_size": 12,
    "lr": 0.05,
    "swa_lr": 0.02,
    "swa_start": 0.5,
    "precision": "float64",
    "keep_particles": True,
    "progress": False,
}


class Odd(nn.Module):
    """Three linear layers. Each subclass does something unusual with the hidden features h [B, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x.flatten(1)))
        return self.head(F.relu(self.norm(self.second(self.odd(h)))))

    def odd(self, h: Tensor) -> Tensor:
        return h


class ReadsByNumpy(Odd):
    def odd(self, h):
        return h * (0.5 if np.asarray(h.detach()).max() > 1.5 else 1.0)


class ReadsByIsNonzero(Odd):
    def odd(self, h):
        return h * (0.5 if torch.is_nonzero((h > 1.5).any()) else 1.0)


class SelectsByMask(Odd):
    def odd(self, h):
        out, some = torch.zeros_like(h), h[:, 0] >= 0
        out[some] = 2 * h[some]
        return out


class LooksAtTheLargest(Odd):
    def odd(self, h):
        return h * torch.where(h.abs().max() > 1.5, 0.5, 1.0).to(h)


class NormOfChunks(Odd):
    def odd(self, h):
        return torch.cat([part - part.mean(0) for part in h.chunk(math.ceil(len(h) / 8))])


class SharedDropout(Odd):
    def odd(self, h):
        return h * F.dropout(h.new_ones(16), 0.02, self.training)


class LooksAtTheBatchSize(Odd):
    def odd(self, h):
        return h / (1.0 if len(h) <= 12 else 2.0)


class PadsTheBatch(Odd):
    def odd(self, h):
        return F.pad(h, (0, 0, 0, -len(h) % 8)).relu()[: len(h)]


class AlwaysDrops(Odd):
    def odd(self, h):
        return F.dropout(h, 0.3)


class AlwaysNoisy(Odd):
    def odd(self, h):
        return h + 0.3 * torch.randn_like(h)


class Counts(Odd):
    steps = 0

    def odd(self, h):
        self.steps += 1
        return h * (1 + 0.1 * (self.steps % 3))


class OwnGenerator(Odd):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def odd(self, h):
        return h * (1 + 0.1 * self.generator.standard_normal())


class ClearsGradients(Odd):
    def odd(self, h):
        if self.training:
            with torch.enable_grad():
                self.second(h.detach()).sum().backward()
            self.zero_grad()
        return h


class ReassignsWeights(Odd):
    def odd(self, h):
        self.second.weight.data = torch.renorm(self.second.weight.data, p=2, dim=0, maxnorm=0.5)
        return h


class ChangesItsInputs(Odd):
    def forward(self, x):
        return super().forward(x.sub_(0.3).div_(1.5))


class SharesAModule(Odd):
    def __init__(self):
        super().__init__()
        self.again = nn.ModuleList([self.second, self.second])

    def odd(self, h):
        return F.relu(self.again[1](self.again[0](h)))


class SharesANorm(Odd):
    def odd(self, h):
        return self.norm(h)


class AsksForSizes(Odd):
    def odd(self, h):
        return h.view(len(h), self.second.in_features)


class ReturnsAMapping(Odd):
    class Output(dict):
        @property
        def logits(self):
            return self["logits"]

    def forward(self, x):
        return self.Output(logits=super().forward(x))


class ViewsAfterConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.head = nn.Linear(144, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.relu(self.second(x.view(len(x), -1))))


FOLDS = [AsksForSizes, SharesAModule, SharesANorm, ReturnsAMapping, ViewsAfterConvolution]
LANES_ONLY = [
    *(ReadsByNumpy, ReadsByIsNonzero, SelectsByMask, LooksAtTheLargest, NormOfChunks, SharedDropout, AlwaysNoisy),
    *(Counts, OwnGenerator, ReassignsWeights),
]
# Folding changes the results of these models only at the run's own batch sizes. Folding is checked at those sizes only
# if it is the fastest mode.
BY_SIZE = [LooksAtTheBatchSize]
EITHER = [PadsTheBatch, AlwaysDrops, ClearsGradients, ChangesItsInputs]


def arguments(kind: type[nn.Module]) -> dict[str, object]:
    if kind is ReturnsAMapping:
        return {"loss": lambda out, targets: F.cross_entropy(out.logits, targets, reduction="none")}
    return {}


def data(kind: type[nn.Module], few):
    """The data for a kind of model; three channels for ViewsAfterConvolution.

    With a single channel, channels last and channels first are the same.
    """
    if kind is not ViewsAfterConvolution:
        return few
    return tuple((torch.cat([inputs] * 3, 1), targets) for inputs, targets in few)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.fixture(scope="module")
def few(digits):
    (inputs, targets), (more, more_targets) = digits
    inputs, more = (torch.empty(len(each), 1, 8, 8).copy_(each) / 16 - 0.3 for each in (inputs[:100], more[:40]))
    return (inputs, targets[:100]), (more, more_targets[:40])


@pytest.mark.parametrize(("mode", "channels_last"), MODES)
@pytest.mark.parametrize("kind", FOLDS + LANES_ONLY + BY_SIZE + EITHER)
def test_every_mode_gives_what_the_naive_loop_gives(kind, mode, channels_last, few):
    if channels_last and kind is ViewsAfterConvolution:
        with pytest.raises(
            ValueError,
            match="can't run the model: in the float64 check with channels last, it raises RuntimeError",
        ):
            forced(kind, mode, channels_last, few)
        return
    if mode != "lanes":
        problem = prepare(made(kind), *data(kind, few), Arguments(**arguments(kind)), settings=SETTINGS)
        refused = why_not_fold(problem, mode == "fold_grouped")
        assert (refused is None) == (kind in FOLDS) or kind in BY_SIZE + EITHER
        if refused is not None or kind in BY_SIZE:
            return
    fast = forced(kind, mode, channels_last, few)
    same(fast, naive_swamp(made(kind), *data(kind, few), **arguments(kind), **SETTINGS))


@pytest.mark.parametrize("kind", FOLDS + LANES_ONLY + BY_SIZE + EITHER)
def test_what_is_chosen_gives_what_the_naive_loop_gives(kind, few):
    fast, naive = (
        function(made(kind), *data(kind, few), **arguments(kind), **SETTINGS) for function in (fast_swamp, naive_swamp)
    )
    same(fast, naive)


def test_statistics_of_a_norm_used_twice_are_the_mean_over_its_calls(few):
    result = fast_swamp(made(SharesANorm), *few, **{**SETTINGS, "batch_size": 40, "cycles": 0})
    module = copy.deepcopy(result.model)
    norm, found = module.norm, []
    norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    norm.train()
    with torch.no_grad():
        for part in few[0][0].double().split(40):
            module(part)
    weights = torch.tensor([len(each) for each in found], dtype=torch.float64)
    assert weights.tolist() == [40, 40, 40, 40, 20, 20]
    for name, each in (("running_mean", [x.mean(0) for x in found]), ("running_var", [x.var(0) for x in found])):
        mean = (weights[:, None] * torch.stack(each)).sum(0) / weights.sum()
        torch.testing.assert_close(getattr(result.model.norm, name).double(), mean, rtol=1e-9, atol=1e-9)


def test_a_fold_that_wins_is_checked_at_the_runs_own_sizes(few, monkeypatch):
    problem = prepare(made(LooksAtTheBatchSize), *few, settings=SETTINGS)
    assert why_not_fold(problem, False) is not None or "samples" in chosen_when_folding_wins(problem, monkeypatch).why


def test_the_users_generator_decides_nothing(few):
    results = []
    for seed in (1, 2):
        model = made(AlwaysDrops)
        torch.manual_seed(seed)
        results.append(fast_swamp(model, *few, **SETTINGS))
    same(*results)


def forced(kind, mode, channels_last, few):
    name = Choice(mode, channels_last, "", {}).name
    return fast_swamp(made(kind), *data(kind, few), **arguments(kind), **SETTINGS | {"engine": name})


def chosen_when_folding_wins(problem, monkeypatch) -> Choice:
    import swamp_fast.engines.eager.fastest as fastest

    monkeypatch.setattr(fastest, "_fastest", lambda problem, choices, lanes, milliseconds: choices[-1])
    return fastest_choice(problem, 3)
