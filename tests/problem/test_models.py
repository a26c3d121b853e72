"""What is understood of the user's model and `forward`, and what is refused in words."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast import SwampResult, fast_swamp, naive_swamp
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

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
ONE_CYCLE = {"cycles": 1, "batch_size": 16}
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
        with pytest.raises(ValueError, match=r"gradients for 0\.weight, .* of your own model, but not of its copy\."):
            fast_swamp(model, data(), forward=forward, **FLOAT32)
        assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"gradients for 0\.weight, 0\.bias of your own model, but not of its copy"):
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


def pruned_line(model: nn.Module, inputs: Tensor, **arguments) -> str:
    problem = prepare(model, (inputs, data()[1]), arguments=Arguments(**arguments), settings=ONE_CYCLE)
    (line,) = (line for line in problem.lines if line.startswith("pruned"))
    return line


@dataclass
class Logits:
    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.body, self.act, self.head = mlp()
        self.wrap = wrap

    def forward(self, x: Tensor):
        return self.wrap(self.head(self.act(self.body(x))))


def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize(
    ("wrap", "loss"),
    [
        (lambda z: z, of_logits),
        (lambda z: {"logits": z}, lambda out, y: of_logits(out["logits"], y)),
        (Logits, lambda out, y: of_logits(out.logits, y)),
        (lambda z: torch.distributions.Categorical(logits=z), lambda out, y: -out.log_prob(y)),
        (lambda z: (Logits(z), z.detach()), lambda out, y: of_logits(out[0].logits, y)),
    ],
)
def test_the_output_layer_is_found_behind_any_outputs(wrap, loss):
    line = pruned_line(Wrapped(wrap), data()[0], loss=loss)
    assert line == "pruned   1 of 2 weights; not: head.weight (the output layer)"


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(self.table(ids)))))).mean(1)


def test_a_tied_head_is_the_output_layer():
    ids = torch.randint(0, 20, (48, 5))
    assert pruned_line(Language(True), ids) == "pruned   2 of 3 weights; not: table.weight (the output layer)"
    assert pruned_line(Language(False), ids) == (
        "pruned   2 of 4 weights; not: table.weight (an embedding; pruned if `prunable` names it), head.weight "
        "(the output layer)"
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.lstm, self.head = nn.Linear(6, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)
        self.place = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.body(x)[:, None] + self.place)[0][:, -1])


def test_weights_that_are_not_pruned_are_named():
    assert pruned_line(Recurrent(), data()[0]) == (
        "pruned   1 of 5 weights; not: place (not a layer's; pruned if `prunable` names it), lstm.weight_ih_l0, "
        "lstm.weight_hh_l0 (recurrent; pruned if `prunable` names it), head.weight (the output layer)"
    )
    assert pruned_line(Recurrent(), data()[0], prunable=["body", "lstm.weight_*"]) == (
        "pruned   3 of 5 weights; not: place, head.weight (not selected by `prunable`)"
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.utils.parametrizations.spectral_norm, r"pruned   3 of 4 .* not: 6\.\S*original \(the output layer\)"),
        (nn.utils.spectral_norm, r"pruned   3 of 4 .* not: 6\.weight_orig \(the output layer\)"),
        (
            nn.utils.parametrizations.weight_norm,
            r"1 of 4 .*: 0\.\S*original1, 2\.\S*original1 \(under weight_norm",
        ),
        (
            nn.utils.weight_norm,
            r"pruned   1 of 4 .* 0\.weight_v, 2\.weight_v \(under weight_norm; .* 6\.weig",
        ),
    ],
)
def test_reparametrized_layers(norm, expected, bias):
    def layer(inputs: int, outputs: int) -> nn.Module:
        return norm(nn.Linear(inputs, outputs, bias=bias))

    model = nn.Sequential(
        layer(6, 8), nn.ReLU(), layer(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=bias), nn.ReLU(), layer(8, 3)
    )
    assert re.search(expected, pruned_line(model, data()[0]))


def test_pruned_weights_of_a_spectral_norm_are_zeros_and_counted():
    result = fast_swamp(spectral(nn.utils.parametrizations.spectral_norm), data(), data(), **SETTINGS)
    (first, mask), (second, _) = result.masks.items()
    assert (first, second) == ("0.parametrizations.weight.original", "2.parametrizations.weight.original")
    assert result.model[0].weight[~mask].eq(0).all()
    assert result.history[-1]["flops"] == 2 * (result.history[-1]["kept"] + 24)  # and the output layer's


class OwnNorm(nn.Module):
    """A batch norm that doesn't derive from torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def test_averaged_buffers_and_missing_gradients_are_named():
    model = mlp()
    model.insert(1, OwnNorm())
    model.unused = nn.Linear(3, 3)
    temperature = torch.ones(1, requires_grad=True)
    arguments = Arguments(
        forward=lambda model, x: nn.Sequential.forward(model[:4], x),
        loss=lambda outputs, y: of_logits(outputs * temperature, y),
    )
    lines = "\n".join(prepare(model, data(), arguments=arguments, settings=ONE_CYCLE).lines)
    assert "buffers  1.mean: averaged over the particles; only statistics of norms that derive from torch's" in lines
    assert "the first samples give no gradient for unused.weight, unused.bias" in lines
    assert "the loss has gradients for tensors outside the model, which aren't trained: [1]" in lines


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\nb", "a\\", '") or open("executed", "w") or ("'])
@pytest.mark.parametrize("engine", ["auto", "fused", "eager:fold"])
def test_a_layers_name_is_only_a_name(name, engine, tmp_path, monkeypatch):
    """Names go into messages and files, but never into source that is executed."""
    monkeypatch.chdir(tmp_path)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body, act, head = mlp()
            self.layers, self.act, self.head = nn.ModuleDict({name: body}), act, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.layers[name](x)))

    result = fast_swamp(Named(), data(), data(), engine=engine, run_dir=tmp_path / "run", **SETTINGS)
    assert list(result.masks) == [f"layers.{name}.weight"]
    plain = fast_swamp(mlp(), data(), data(), engine=engine, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), plain.model.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def shared(make) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    make(model)
    return model


def share(value):
    def make(model: nn.Module) -> None:
        model[2].weight = nn.Parameter(value(model[0].weight.data))

    return make


def share_columns(model: nn.Module) -> None:
    both = torch.randn(6, 12)
    model[0].weight, model[2].weight = nn.Parameter(both[:, :6]), nn.Parameter(both[:, 6:])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (share(lambda w: w), "0.weight and 2.weight share memory, but are not the same parameter"),
        (share(lambda w: w.t()), "0.weight and 2.weight share memory"),
        (share(lambda w: w[3:].repeat(2, 1)), None),
        (share(lambda w: w.view(-1).as_strided((6, 6), (6, 1))), "0.weight and 2.weight share memory"),
        (lambda model: model.register_buffer("shadow", model[0].weight.data[0]), "0.weight and shadow share memory"),
        (lambda model: setattr(model[2], "bias", nn.Parameter(torch.zeros(1).expand(6))), "elements of 2.bias are one"),
        (share_columns, None),
        (lambda model: setattr(model[2], "weight", model[0].weight), None),
    ],
)
def test_parameters_that_share_memory_are_refused(make, text):
    if text is None:
        prepare(shared(make), data(), settings=ONE_CYCLE)
        return
    with pytest.raises(ValueError, match=text):
        prepare(shared(make), data(), settings=ONE_CYCLE)


def magnitude_pruned() -> nn.Module:
    model = mlp()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def quantized() -> nn.Module:
    model = mlp().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model)


def scripted_layer() -> nn.Module:
    model = mlp()
    model[0] = torch.jit.script(model[0])
    return model


@DRIVERS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: torch.jit.script(mlp()), TypeError, "the model is compiled by torch.jit, .* Pass the plain module"),
        (scripted_layer, TypeError, "`model`: 0 is compiled by torch.jit"),
        (quantized, TypeError, r"0\.weight_fake_quant .* Pass the model as it was before .* prepare_qat"),
        (magnitude_pruned, ValueError, r'prunes weight of 0 at every .* Call .*remove\(module, "weight"\)'),
    ],
)
def test_models_that_other_tools_have_changed_are_refused(driver, make, kind, text):
    with pytest.raises(kind, match=text):
        driver(make(), data(), **SETTINGS)


@DRIVERS
def test_a_compiled_model_is_its_plain_model(driver, tmp_path):
    compiled = torch.compile(mlp(), backend="eager")
    result = driver(compiled, data(), data(), run_dir=tmp_path, **SETTINGS)
    plain = driver(mlp(), data(), data(), **SETTINGS)
    assert list(result.state_dict) == list(plain.state_dict)
    for name, tensor in plain.state_dict.items():
        assert torch.equal(result.state_dict[name], tensor)
    assert isinstance(result.model, nn.Sequential)
    assert SwampResult.load(tmp_path, compiled).model[0].in_features == 6


class Around(nn.Module):
    """Uses a compiled layer twice, and holds it in a list too."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        if compiled:
            inner[0] = torch.compile(inner[0], backend="eager")
            inner = torch.compile(inner, backend="eager")
        self.first, self.second, self.head = inner, inner, nn.Linear(6, 3)
        self.every = [inner]

    def forward(self, x):
        return self.head(self.second(self.first(x)))


@DRIVERS
def test_compiled_layers_are_their_plain_layers(driver, tmp_path):
    model = seeded(lambda: Around(True))
    names = list(model.state_dict())
    result = driver(model, data(), data(), run_dir=tmp_path, **SETTINGS)
    plain = driver(seeded(lambda: Around(False)), data(), data(), **SETTINGS)
    assert list(result.state_dict) == list(plain.state_dict)
    assert list(result.masks) == ["first.0.weight"]
    for name, tensor in plain.state_dict.items():
        assert torch.equal(result.state_dict[name], tensor)
    assert list(model.state_dict()) == names
    loaded = SwampResult.load(tmp_path, model).model
    assert loaded.first is loaded.second
    assert loaded.first[0].in_features == 6


@DRIVERS
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_normed_weights_are_those_of_the_next_forward_pass(driver, norm, tmp_path):
    """Old norms of torch store a weight, which was the untrained one until the model had run."""
    model = nn.Sequential(norm(nn.Linear(6, 12)), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), mlp_head())
    result = driver(model, data(), data(), run_dir=tmp_path, **SETTINGS)
    for handed_out in (result.model, SwampResult.load(tmp_path, model).model):
        weight = handed_out[0].weight.clone()
        handed_out(data()[0].to(weight.dtype))
        assert not weight.requires_grad
        torch.testing.assert_close(weight, handed_out[0].weight.detach())


ADDRESSES = """
import torch
from torch import nn
from swamp_fast.common.fingerprint import callable_fingerprint, model_fingerprint
for number in range({hooks}):
    nn.Linear(2, 2).register_forward_hook(print)
class Act(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def extra_repr(self):
        return repr(self.function)
    def forward(self, x):
        return self.function(x) if type(x).__name__ not in {{"a", "b", "c", "d"}} else x
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 2), Act(lambda x: x.relu()), nn.Linear(2, 2))
model[1].parent = [model]
model[1].handle = model[0].register_forward_hook(lambda module, args, output: None)
model[2] = torch.compile(model[2], backend="eager")
model.compile(backend="eager")
print(model_fingerprint(model), callable_fingerprint(Act.forward))
"""


def test_fingerprints_are_the_same_in_every_process():
    """They don't depend on addresses, hash seeds, or how many hooks the process has made."""
    printed = {
        subprocess.run(
            [sys.executable, "-c", ADDRESSES.format(hooks=seed)],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(printed) == 1


@DRIVERS
def test_hooks_may_collect_activations(driver):
    """A copy's hook is the user's function, and so fills what that function refers to."""
    collected: list[Tensor] = []
    model = mlp()
    model.collected = collected
    model[0].register_forward_hook(lambda module, args, output: collected.append(output))
    plain = driver(mlp(), data(), data(), **SETTINGS)
    result = driver(model, data(), data(), **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), plain.model.parameters(), strict=True))


class OfTorch(nn.BatchNorm1d):
    """A norm of the user's own class that derives from torch's."""


@DRIVERS
def test_statistics_of_derived_norms_are_reestimated(driver):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), OfTorch(8), nn.ReLU(), nn.Linear(8, 3)))
    result = driver(model, data(), data(), **SETTINGS)
    features = result.model[0](data()[0].double()).detach()
    torch.testing.assert_close(result.model[1].running_mean, features.mean(0))
