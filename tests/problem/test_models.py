"""What is understood of the user's model and `forward`, and what is refused in words."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast import fast_swamp, naive_swamp

SETTINGS = {
    "batch_size": 16,
    "cycles": 2,
    "epochs": 2,
    "ticket_epochs": 1,
    "particles": 2,
    "prune": 0.4,
    "precision": "float64",
    "progress": False,
}
FLOAT32 = SETTINGS | {"precision": "float32"}
DRIVERS = pytest.mark.parametrize("driver", [fast_swamp, naive_swamp])


def data(samples: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def mlp() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


class Caching(nn.Module):
    """Keeps its activations in an attribute, a list, a dict, a buffer and a submodule's attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = mlp()
        self.register_buffer("mean", torch.zeros(8))
        self.kept = {}

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.act(self.body(x))
        self.both, self.kept["body"], self.body.out = [self.features, self.features], self.features, self.features
        self.mean = self.features.mean(0)
        return self.head(self.features)


def weights_of(result) -> dict[str, Tensor]:
    return dict(result.model.named_parameters())


@DRIVERS
def test_a_model_may_keep_its_activations(driver):
    cached, plain = driver(seeded(Caching), data(), data(), **SETTINGS), driver(mlp(), data(), data(), **SETTINGS)
    for (name, kept), expected in zip(weights_of(cached).items(), plain.model.parameters(), strict=True):
        assert torch.equal(kept, expected), name
    used = seeded(Caching)
    used(data()[0])  # holds graphs before the run
    again = driver(used, data(), data(), **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), plain.model.parameters(), strict=True))
    assert used.features.requires_grad  # the user's model is untouched


def patched() -> nn.Module:
    model = mlp()
    model.forward = lambda x: model[2](F.relu(model[0](x)))
    return model


def test_a_forward_that_ignores_its_module_is_refused():
    net = mlp()
    for model, forward in ((net, lambda model, x: net(x)), (patched(), None)):
        with pytest.raises(ValueError, match=r"no gradients for 0\.weight, .*, but for your own model's\. Use the mod"):
            fast_swamp(model, data(), forward=forward, **FLOAT32)
        assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"no gradients for 0\.weight, 0\.bias, but for your own model's"):
        fast_swamp(net, data(), forward=lambda model, x: model[2](F.relu(net[0](x))), **FLOAT32)
    other = mlp()
    with pytest.raises(ValueError, match="no gradient for any of the model's trained parameters: 0.weight"):
        fast_swamp(mlp(), data(), forward=lambda model, x: other(x), **FLOAT32)


@DRIVERS
@pytest.mark.parametrize("engine", ["eager", "eager:fold"])
def test_a_teacher_gets_no_gradients(driver, engine):
    """A loss that depends on the user's own model too leaves that model untouched, its gradients included."""
    teacher = mlp().double()
    teacher[0].weight.grad = torch.ones(8, 6, dtype=torch.float64)
    before = copy.deepcopy(teacher.state_dict())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        student, guide = outputs
        return F.cross_entropy(student, targets, reduction="none") + (student - guide).square().mean(1)

    driver(
        teacher,
        data(),
        forward=lambda model, x: (model(x), teacher(x)),
        loss=loss,
        engine=engine,
        **SETTINGS,
    )
    assert teacher[0].weight.grad.eq(1).all()
    assert all(parameter.grad is None for name, parameter in teacher.named_parameters() if name != "0.weight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6, sparse=sparse)
        self.body = mlp()

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.table(ids).mean(1))


@DRIVERS
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sparse_embeddings_train_as_dense_ones(driver, optimizer):
    ids = torch.randint(0, 20, (48, 5), generator=torch.Generator().manual_seed(0))
    sparse, dense = (
        driver(seeded(lambda s=s: Words(s)), (ids, data()[1]), optimizer=optimizer, **SETTINGS) for s in (True, False)
    )
    for name, tensor in dense.state_dict.items():
        torch.testing.assert_close(sparse.state_dict[name], tensor, rtol=1e-12, atol=1e-12)


class Normed(nn.Module):
    """Two norms, of which train() leaves the first in evaluation mode, as in fine-tuning with frozen statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = mlp()
        self.frozen, self.norm = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.frozen.running_mean.fill_(0.25)
        self.frozen.running_var.fill_(2.0)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.frozen(self.body(x)))))


@pytest.mark.parametrize(
    ("driver", "engine"),
    [(fast_swamp, "auto"), (fast_swamp, "eager:fold"), (fast_swamp, "eager:fold_grouped"), (naive_swamp, "auto")],
)
def test_frozen_norms_keep_their_statistics(driver, engine):
    """The others have those of the training data, with the frozen ones applied before them."""
    result = driver(seeded(Normed), data(), data(), engine=engine, **SETTINGS | {"particles": 3})
    frozen, norm = result.model.frozen, result.model.norm
    assert frozen.running_mean.eq(0.25).all()
    assert frozen.running_var.eq(2).all()
    with torch.no_grad():
        features = frozen(result.model.body(data()[0].double()))
    batches = features.split(16)
    torch.testing.assert_close(norm.running_mean, features.mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))


def spectral(norm) -> nn.Module:
    return seeded(lambda: nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU(), mlp_head()))


def mlp_head() -> nn.Linear:
    return nn.Linear(8, 3)


@DRIVERS
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norms_are_1(driver, norm):
    """Those of the average, and those of the particles, whose weights are SWA means."""
    inputs, _ = data(96)
    targets = (inputs @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)
    settings = SETTINGS | {"particles": 3, "epochs": 8, "lr": 0.3, "swa_lr": 0.15, "keep_particles": True}
    result = driver(spectral(norm), (inputs, targets), (inputs, targets), **settings)
    particles = [{name: tensor[i] for name, tensor in result.particles.items()} for i in range(3)]
    for state in (*particles, *(result.at(cycle)[0].state_dict() for cycle in range(3))):
        model = spectral(norm).double()
        model.load_state_dict(state)
        with torch.no_grad():
            model.eval()(inputs.double())
            for layer in (model[0], model[2]):
                assert float(torch.linalg.matrix_norm(layer.weight, 2)) == pytest.approx(1, abs=1e-3)
