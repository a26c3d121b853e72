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
