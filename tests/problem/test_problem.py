"""Which arguments are refused before anything is trained, and what a Problem says about itself."""

from __future__ import annotations

import functools
import threading

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from swamp_fast import SwampConfig, fast_swamp
from swamp_fast.common.fingerprint import callable_fingerprint, callable_parts, model_fingerprint
from swamp_fast.data.labels import Labels
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare

SETTINGS = {"batch_size": 32, "cycles": 1, "epochs": 1, "ticket_epochs": 0, "particles": 2, "progress": False}


def on(device: str) -> nn.Module:
    model = networks.build("tied")
    model.head.to(device)
    return model


def frozen() -> nn.Module:
    model = networks.build("residual")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 8), nn.Linear(8, 10)
        self.cache = [self.layer(torch.randn(2, 64))]  # has an autograd graph, which copies lack

    def forward(self, x):
        return self.head(self.layer(x.flatten(1)))


class Locked(networks.Tied):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        return {"logits": self.head(self.layer(x.flatten(1)))}


class Detached(networks.Tied):
    def forward(self, x):
        return super().forward(x).detach()


MODELS = [
    (lambda: 3, TypeError, "`model` must be an nn.Module, got int"),
    (nn.Identity, ValueError, "`model` has no parameters"),
    (lambda: nn.DataParallel(networks.build("tied")), TypeError, "pass model.module"),
    (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), ValueError, "has no shape yet; run one batch"),
    (lambda: networks.build("tied").to("meta"), ValueError, "is on the meta device"),
    (lambda: on("meta"), ValueError, "is on the meta device"),
    (lambda: networks.build("tied").half(), ValueError, r"is in half precision \(float16\), .* pass model.float\(\)"),
    (lambda: networks.build("tied").bfloat16(), ValueError, r"half precision \(bfloat16\)"),
    (lambda: nn.Linear(3, 3, dtype=torch.complex64), ValueError, "is complex; parameters must be real"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ValueError, "the model has nothing to prune"),
    (frozen, ValueError, "the model has nothing to prune"),
    (Graph, ValueError, "its attribute cache holds a tensor with an autograd graph that forward doesn't compute anew"),
    (Locked, ValueError, r"`model` can't be copied .* each particle is a deep copy"),
    (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(65, 10)),
        ValueError,
        r"can't run on a batch of inputs \[8, 1, 8, 8\]",
    ),
    (
        lambda: nn.Sequential(networks.build("tied").requires_grad_(False), nn.Linear(10, 10, False)),
        ValueError,
        "nothing to prune",
    ),
    (Detached, ValueError, "the loss does not depend on any trained parameter"),
    (Dicts, ValueError, r"output must be a tensor \[B, classes\] .* got \{'logits': \[8, 10\]\}"),
]


@pytest.mark.parametrize(("make", "kind", "text"), MODELS)
def test_refuses_models(make, kind, text, digits):
    with pytest.raises(kind, match=text):
        prepare(make(), *digits, settings=SETTINGS)


def test_refuses_a_model_on_several_devices(monkeypatch):
    from swamp_fast.problem import checks

    model = networks.build("tied")
    fake = [("a", torch.zeros(1)), ("b", torch.zeros(1, device="meta"))]
    monkeypatch.setattr(torch.Tensor, "is_meta", False, raising=False)
    monkeypatch.setattr(model, "named_buffers", lambda: fake)
    with pytest.raises(ValueError, match=r"must be on one device, got cpu, meta; call model.to\(...\) first"):
        checks.check_model(model)


def few(n: int, digits):
    return (digits[0][0][:n], digits[0][1][:n])


def test_refuses_data(digits):
    model = networks.build("residual")
    (inputs, targets), test = digits
    cases = [
        ((inputs, targets.float()), {}, TypeError, "cross-entropy needs integer labels, got float32"),
        (
            (inputs, targets + 1),
            {},
            ValueError,
            r"labels must lie in \[0, 10\), because the model has 10 outputs; got 1 … 10",
        ),
        ((inputs, targets - 1), {}, ValueError, r"labels must lie in \[0, 10\), .* got -1 … 8"),
        ((inputs[:0], targets[:0]), {}, ValueError, "`train` is empty"),
        (few(20, digits), {}, ValueError, "`batch_size` = 32 is more than the 20 training samples"),
        ((inputs, targets), {"test": (test[0], test[1] + 5)}, ValueError, "labels must lie in"),
        ((inputs, targets), {"test": (test[0][:0], test[1][:0])}, ValueError, "`test` is empty"),
        ((inputs, targets), {"val": (test[0][:0], test[1][:0])}, ValueError, "`val` is empty"),
        ((inputs, targets), {"val": 1.5}, ValueError, "must be a fraction of train"),
        ((inputs, targets), {"val": "digitz"}, FileNotFoundError, "`val`: there is no file or folder"),
    ]
    for train, change, kind, text in cases:
        settings = {name: value for name, value in change.items() if name not in ("test", "val")}
        with pytest.raises(kind, match=text):
            prepare(model, train, change.get("test"), Arguments(val=change.get("val")), settings=SETTINGS | settings)
    # Without BatchNorm, a batch of one sample is allowed.
    prepare(networks.build("tied"), few(33, digits), settings=SETTINGS)


def test_refuses_settings_and_callables(digits):
    model = networks.build("tied")
    loader = DataLoader(TensorDataset(*digits[0]), batch_size=16)
    masks = {"middle.weight": torch.ones(32, 32, dtype=torch.bool)}
    cases = [
        ({"engine": "fused"}, ValueError, 'engine="fused" can\'t run the model'),
        ({"device": "cuda:99"}, ValueError, '"cuda:99" is not available'),
        ({"device": "mps"}, ValueError, 'must be a CPU or a CUDA device, got "mps"'),
        ({"device": "cpu:3"}, ValueError, '"cpu:3" doesn\'t exist, because all processors are one device; use "cpu"'),
        ({"val": float("nan")}, ValueError, "`val` as a number must be a fraction of train .* got nan"),
        ({"device": "gpu"}, ValueError, '`device` must be "auto", "cpu", "cuda"'),
        ({"cycles": 60}, ValueError, r"60 cycles at prune = 0.2 are more than 3072 weights allow"),
        ({"train": loader}, ValueError, "`batch_size` = 32 contradicts the DataLoader's 16"),
        ({"forward": 3}, TypeError, "`forward` must be callable, got int"),
        ({"on_cycle": 3}, TypeError, "`on_cycle` must be callable, got int"),
        ({"loss": F.cross_entropy}, ValueError, r"`loss\(outputs, targets\)` must return one number per sample"),
        ({"loss": lambda o, t: o @ t}, ValueError, r"the loss can't take outputs \[8, 10\] with targets \[8\]"),
        ({"prunable": "body"}, ValueError, '"body" matches no trained parameter'),
        ({"initial_masks": {"head.weight": masks["middle.weight"]}}, ValueError, '"head.weight" is not a prunable'),
        ({"initial_masks": {"middle.weight": torch.ones(32, 31).bool()}}, ValueError, r"must have shape \[32, 32\]"),
        ({"initial_masks": {"middle.weight": torch.ones(32, 32)}}, TypeError, "must be a bool tensor, got float32"),
        (
            {"initial_masks": {"middle.weight": ~masks["middle.weight"], "first.weight": torch.zeros(32, 64).bool()}},
            ValueError,
            "keep none of the 3,072 prunable weights",
        ),
        ({"config": 3}, TypeError, "`config` must be a SwampConfig, got int"),
        ({"epoch": 3}, TypeError, "unknown setting `epoch`. Did you mean `epochs`"),
    ]
    for change, kind, text in cases:
        train = change.pop("train", digits[0])
        with pytest.raises(kind, match=text):
            fast_swamp(model, train, **{**SETTINGS, **change})


def test_refuses_splits_of_another_kind_before_training(digits):
    """Otherwise an hour's training could end in an evaluation that fails."""
    train, test = digits
    steps = []
    for other, text in (
        ((test[0][:, :, :6, :6], test[1]), r"`test` must hold samples like those of `train`.*got"),
        ((test[0].float(), test[1]), "uint8 pictures are standardised here, float ones are taken as they are"),
        ((test[0], test[1][:, None]), "`test` must hold samples like those of `train`"),
    ):
        with pytest.raises(ValueError, match=text):
            fast_swamp(networks.build("tied"), train, other, **SETTINGS, on_cycle=steps.append)
    with pytest.raises(ValueError, match="`val` must hold"):
        fast_swamp(networks.build("tied"), train, val=(test[0][:, :, :6], test[1]), **SETTINGS, on_cycle=steps.append)
    with pytest.raises(ValueError, match="`val` is the training data"):
        fast_swamp(networks.build("tied"), train, val=train, **SETTINGS)
    with pytest.raises(ValueError, match=r"`transform\(inputs\)` must return the same number of samples"):
        fast_swamp(networks.build("tied"), train, transform=lambda x: None, **SETTINGS)
    assert not steps


def test_hidden_features_among_the_outputs_are_pruned(digits):
    """A layer whose features feed another layer is hidden, even if the model also returns them."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x):
            h = torch.relu(self.first(x.flatten(1)))
            k = h + self.second(h)
            return {"logits": self.head(k), "hidden": (h, k)}

    problem = prepare(
        *(Features(), *digits),
        Arguments(loss=lambda outputs, targets: F.cross_entropy(outputs["logits"], targets, reduction="none")),
        settings=SETTINGS,
    )
    assert problem.probe.prunable == {"first.weight", "second.weight"}


def test_contradictory_settings():
    with pytest.raises(ValueError, match="but cycles = 14 was also given"):
        SwampConfig.of(None, {"cycles": 14, "target_density": 0.5})
    assert SwampConfig.of(None, {"cycles": 4, "target_density": 0.5}).cycles == 4


def test_a_loader_decides_batches(digits):
    loader = DataLoader(TensorDataset(*digits[0]), batch_size=60, shuffle=True, drop_last=True)
    problem = prepare(networks.build("tied"), loader, settings={"progress": False})
    assert problem.config.batch_size == 60
    assert problem.bounds == [(0, 60), (60, 120)]
    prepare(networks.build("tied"), loader, settings={"batch_size": 60})


def test_forward_and_loss_of_the_users(digits):
    model = Dicts()
    problem = prepare(
        *(model, digits[0], None),
        Arguments(
            forward=lambda module, inputs: module(inputs)["logits"],
            loss=lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1),
        ),
        settings=SETTINGS,
    )
    assert problem.train.labels == Labels(10)
    regression = prepare(
        *(networks.build("tied"), (digits[0][0], torch.randn(160, 10)), None),
        Arguments(loss=lambda outputs, targets: (outputs - targets) ** 2),
        settings=SETTINGS,
    )
    assert regression.train.labels == "the targets are [8, 10] float32, not integer labels"
    result = fast_swamp(
        *(networks.build("tied"), (digits[0][0], torch.randn(160, 10)), (digits[1][0], torch.randn(64, 10))),
        loss=lambda outputs, targets: (outputs - targets) ** 2,
        **SETTINGS,
    )
    assert result.history[1]["accuracy"] is None
    assert result.history[1]["loss"] > 0


def test_flops_follow_the_masks(digits):
    """The expected FLOPs are counted by hand: 2 per multiply-add. A tied weight counts once per layer that uses it."""
    problem = prepare(networks.build("residual"), *digits, settings=SETTINGS)
    dense = 2 * (64 * 8 * 9 + 64 * 8 * 8 * 9 + 8 * 10)
    assert problem.flops(problem.mask) == dense
    mask = problem.mask.clone()
    problem.layout.mask_views(mask)["conv.weight"][:, :4] = False
    assert problem.flops(mask) == dense - 2 * 64 * 8 * 4 * 9
    tied = prepare(networks.build("tied"), *digits, settings=SETTINGS)
    assert tied.flops(tied.mask) == 2 * (64 * 32 + 2 * 32 * 32 + 320)
    assert tied.flops(torch.zeros_like(tied.mask)) == 2 * 320
    attention = prepare(networks.build("vit"), *digits, settings=SETTINGS)
    empty = attention.flops(torch.zeros_like(attention.mask))
    weights = 4 * 16 * 16 + 5 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 32)
    assert attention.flops(attention.mask) - empty == 2 * weights


def test_it_prints_what_it_will_cost_first(digits, capsys):
    fast_swamp(networks.build("tied"), *digits, **SETTINGS | {"progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("swamp_fast 0.")
    text = "\n".join(lines)
    for part in (
        "3,072 prunable of 3,498 trained weights",
        "train    160 samples on cpu, uint8, standardised per channel",
        "test     64 samples on cpu, uint8, standardised per channel",
        "2 trainings x 2 particles x 1 epochs, and 0 for the ticket: 4 particle-epochs of 5 steps, to density 80.00 %",
        "engine   eager:lanes on cpu",
        "cycle  0/1  density 100.00 %  test accuracy",
        "cycle  1/1  density  80.01 %",
    ):
        assert part in text, part


def test_the_users_generators_are_left_alone(digits):
    import random

    import numpy as np

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = states()
    fast_swamp(
        *(networks.build("tied"), *digits), transform=lambda x: x + 0.1 * torch.randn_like(x), **SETTINGS, val=0.2
    )
    assert states() == before


def test_fingerprints_tell_models_and_callables_apart():
    assert model_fingerprint(networks.build("tied")) == model_fingerprint(networks.build("tied"))
    changed = networks.build("tied")
    changed.head.bias.data[0] += 1e-6
    assert model_fingerprint(changed) != model_fingerprint(networks.build("tied"))
    changed = networks.build("dropout")
    changed.drop.p = 0.3
    assert model_fingerprint(changed) != model_fingerprint(networks.build("dropout"))

    def scaled(by):
        return lambda x: x * by

    class Callable:
        def __init__(self, by):
            self.by = by

        def __call__(self, x):
            return x * self.by

    same = [callable_fingerprint(f) for f in (scaled(2), scaled(2))]
    assert same[0] == same[1]
    different = [
        *(None, scaled(2), scaled(3), lambda x: x + 1, Callable(2), Callable(3), nn.Dropout(0.1), nn.Dropout(0.2)),
        *(functools.partial(F.dropout, p=0.1), functools.partial(F.dropout, p=0.2), F.dropout, F.dropout2d),
    ]
    assert len({callable_fingerprint(f) for f in different}) == len(different)


def _logging(scale, log):
    def loss(outputs, targets):
        log.append(scale * float(outputs.detach().sum()))
        return F.cross_entropy(outputs, targets, reduction="none") * scale

    return loss


class _Counting:
    """A loss with state that its first call computes, and state that every call changes."""

    def __init__(self, scale):
        self.scale, self.calls, self.weight = scale, {"all": 0}, None

    def __call__(self, outputs, targets):
        self.calls["all"] += 1
        self.weight = torch.ones(outputs.shape[1]) if self.weight is None else self.weight
        return F.cross_entropy(outputs, targets, self.weight, reduction="none") * self.scale

    def method(self, outputs, targets):
        return self(outputs, targets)


class _CountingModule(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.calls = scale, 0
        self.register_buffer("weight", torch.ones(4))

    def forward(self, outputs, targets):
        self.calls += 1
        return F.cross_entropy(outputs, targets, self.weight, reduction="none") * self.scale


def _with_default(counting):
    return lambda outputs, targets, loss=counting: loss(outputs, targets)


STATEFUL = {
    "closure": (lambda scale: _logging(scale, []), "log"),
    "object": (_Counting, "calls.all"),
    "method": (lambda scale: _Counting(scale).method, "self.calls.all"),
    "partial": (lambda scale: functools.partial(_logging(scale, [])), "func.log"),
    "default": (lambda scale: _with_default(_Counting(scale)), "default 0.calls.all"),
    "module": (_CountingModule, "calls"),
}


@pytest.mark.parametrize(("make", "part"), STATEFUL.values(), ids=STATEFUL)
def test_what_calls_change_is_not_in_a_fingerprint(make, part):
    """A loss that counts its calls can be used again in the same process; another loss still has another hash."""
    inputs, labels = torch.randn(32, 6), torch.arange(32) % 4
    settings = {"cycles": 1, "epochs": 2, "batch_size": 8, "progress": False}
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def fingerprint(loss):
        problem = prepare(model, (inputs, labels), None, Arguments(loss=loss), settings=settings)
        expected = f"note     `loss` changes {part} at every call, so"
        assert any(line.startswith(expected) for line in problem.lines), problem.lines
        return problem.fingerprints["loss"]

    loss = make(2.0)
    first = fingerprint(loss)
    assert fingerprint(loss) == fingerprint(make(2.0)) == first
    assert fingerprint(make(3.0)) != first


def test_quick_and_paper():
    assert SwampConfig.quick().epochs < SwampConfig().epochs
    assert SwampConfig.quick(epochs=3).epochs == 3


def test_a_module_in_a_closure_is_not_walked_through():
    """A function that imports torch inside of another one has all of torch in its closure."""
    import torch.nn.functional as inner

    def loss(outputs, targets):
        return inner.cross_entropy(outputs, targets) * torch.ones(1)

    assert "inner" in callable_parts(loss)
    assert len(callable_parts(loss)) < 10
