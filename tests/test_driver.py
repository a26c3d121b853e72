"""Whole runs of the driver: the laws of pruning, the evaluation, and the reported numbers."""

from __future__ import annotations

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swamp_fast import SwampConfig, fast_swamp, naive_swamp

SETTINGS = {
    "engine": "eager",
    "batch_size": 32,
    "cycles": 4,
    "epochs": 2,
    "ticket_epochs": 1,
    "particles": 2,
    "progress": False,
}


def test_a_run_obeys_the_laws_of_pruning(digits):
    result = fast_swamp(networks.build("residual"), *digits, **SETTINGS)
    kept, before = 648, None
    for cycle, row in enumerate(result.history):
        model, masks = result.at(cycle)
        assert row["cycle"] == cycle
        assert row["kept"] == kept == sum(int(mask.sum()) for mask in masks.values())
        assert row["density"] == kept / 648
        state = model.state_dict()
        for name, mask in masks.items():
            assert state[name][~mask].eq(0).all()
            assert before is None or not bool((mask & ~before[name]).any())
        assert not model.training
        kept, before = round(0.8 * kept), masks
    assert [row["flops"] for row in result.history] == sorted((row["flops"] for row in result.history), reverse=True)


def test_what_is_reported_is_what_the_model_does(digits):
    """A row's accuracy and loss are those of `.at(cycle)` on test data standardised by `result.standardise`."""
    result = fast_swamp(networks.build("residual"), *digits, **SETTINGS)
    images, targets = digits[1]
    mean, std = (torch.tensor(result.standardise[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    inputs = ((images.double() / 255 - mean) / std).float()
    for cycle, row in enumerate(result.history):
        with torch.no_grad():
            outputs = result.at(cycle)[0](inputs)
        assert row["accuracy"] == float((outputs.argmax(1) == targets).double().mean())
        assert row["loss"] == pytest.approx(float(F.cross_entropy(outputs, targets)), rel=1e-5)


def test_batchnorm_is_reestimated_over_the_training_data(digits):
    """The average's BatchNorm statistics are the mean over the training batches, weighted by samples."""
    result = fast_swamp(networks.build("residual"), *digits, **SETTINGS | {"precision": "float64", "batch_size": 48})
    images, _ = digits[0]
    mean, std = (torch.tensor(result.standardise[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    inputs = (images.double() / 255 - mean) / std
    model = result.model
    with torch.no_grad():
        batches = [model.stem(batch) for batch in inputs.split(48)]
    weights = torch.tensor([len(batch) / len(inputs) for batch in batches]).double()
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches])
    assert torch.allclose(model.norm1.running_mean, weights @ means, atol=1e-10)
    assert torch.allclose(model.norm1.running_var, weights @ variances, atol=1e-10)


def test_one_particle_without_swa_is_magnitude_pruning_with_rewinding(digits):
    """With N = 1 and without SWA, SWAMP is IMP, which is written here in a few lines without the package."""
    inputs, targets = torch.randn(160, 1, 8, 8, dtype=torch.float64), digits[0][1]
    settings = SETTINGS | {
        "particles": 1,
        "average": "none",
        "ticket_epochs": 0,
        "precision": "float64",
        "batch_size": 160,
    }
    model = networks.build("tied")
    result = fast_swamp(model, (inputs, targets), **settings)
    names = list(result.masks)
    masks = {name: torch.ones_like(mask) for name, mask in result.masks.items()}
    for cycle in range(5):
        ours = networks.build("tied").double()
        parameters = dict(ours.named_parameters())
        optimizer = torch.optim.SGD(ours.parameters(), 0.1, 0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        for name in names:
            parameters[name].data *= masks[name]
        for _ in range(2):  # an epoch is one batch
            optimizer.zero_grad()
            F.cross_entropy(ours(inputs), targets).backward()
            for name in names:
                parameters[name].grad *= masks[name]
            optimizer.step()
            scheduler.step()
        found = result.at(cycle)
        for name, parameter in parameters.items():
            assert torch.allclose(dict(found[0].named_parameters())[name], parameter, atol=1e-12)
        scores = torch.cat([parameters[name].abs().flatten() for name in names])
        kept = torch.cat([masks[name].flatten() for name in names])
        keep = round(0.8 * int(kept.sum()))
        threshold = scores[kept].sort(descending=True).values[keep - 1]
        masks = {name: (parameters[name].abs() >= threshold) & masks[name] for name in names}


def test_particles_per_cycle_a_target_density_and_no_cycles(digits):
    result = fast_swamp(networks.build("tied"), *digits, **SETTINGS | {"particles": (1, 3, 1), "cycles": 2})
    assert [row["particles"] for row in result.history] == [1, 3, 1]
    assert [len(row["particle_accuracy"]) for row in result.history] == [1, 3, 1]
    assert result.history[0]["accuracy"] == result.history[0]["particle_accuracy"][0]
    changed = {name: value for name, value in SETTINGS.items() if name != "cycles"}
    result = fast_swamp(networks.build("tied"), *digits, **changed, target_density=0.7)
    assert len(result.history) == 3
    assert [row["kept"] for row in result.history][-1] == int(0.7 * result.history[0]["kept"])
    result = fast_swamp(networks.build("tied"), *digits, **SETTINGS | {"cycles": 0})
    assert len(result.history) == 1
    assert all(bool(mask.all()) for mask in result.masks.values())


def test_the_ticket(digits):
    """Every cycle starts from the ticket; with ticket_epochs = 0, the ticket is the given model."""
    model = networks.build("tied")
    given = fast_swamp(model, *digits, **SETTINGS | {"ticket_epochs": 0})
    assert all(torch.equal(given.ticket[name], value) for name, value in model.named_parameters())
    trained = fast_swamp(model, *digits, **SETTINGS)
    assert not torch.equal(trained.ticket["head.weight"], model.head.weight)
    frozen = fast_swamp(model, *digits, **SETTINGS | {"lr": 0.0, "swa_lr": 0.0, "weight_decay": 0.0})
    for name, mask in frozen.masks.items():  # no weight changes, so the last average is the masked ticket
        assert torch.allclose(frozen.state_dict[name], frozen.ticket[name] * mask, atol=1e-7)


def test_initial_masks_hold_from_the_first_cycle(digits):
    mask = torch.rand(32, 32) < 0.3
    result = fast_swamp(networks.build("tied"), *digits, initial_masks={"middle.weight": mask}, **SETTINGS)
    assert torch.equal(result.at(0)[1]["middle.weight"], mask)
    assert bool(result.at(0)[1]["first.weight"].all())
    assert result.history[0]["kept"] == 2048 + int(mask.sum())
    assert result.ticket["middle.weight"][~mask].ne(0).any()  # the ticket itself is dense


def test_frozen_parameters_stay(digits):
    for name in ("residual", "vit"):
        model = networks.build(name)
        frozen = next(iter(dict(model.named_parameters())))
        model.get_parameter(frozen).requires_grad_(False)
        result = fast_swamp(model, *digits, **SETTINGS)
        assert torch.equal(result.model.get_parameter(frozen), model.get_parameter(frozen))
        assert frozen not in result.masks


class Counting(networks.Tied):
    """A network with two buffers that its forward pass changes, and one that it doesn't change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fixed", torch.tensor([2.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.sum += x.detach().mean() * torch.arange(3, device=x.device)
            self.calls += 1
        return super().forward(x * self.fixed)


def test_buffers_of_the_model_are_averaged_like_the_naive_loops(digits):
    settings = SETTINGS | {"precision": "float64", "rewind": "average"}
    fast, naive = (function(Counting(), *digits, **settings) for function in (fast_swamp, naive_swamp))
    assert fast.engine["name"] == "eager:lanes"
    for cycle in range(5):
        states = [result._snapshot(cycle).state for result in (fast, naive)]
        for name in ("sum", "calls", "fixed"):
            assert torch.allclose(states[0][name], states[1][name], atol=1e-9), name
    assert int(fast.state_dict["calls"]) > 0


class Noisy(networks.Tied):
    """A network whose forward pass draws from torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


def test_other_randomness_runs_under_a_seed_per_lane(digits):
    settings = SETTINGS | {"precision": "float64"}
    torch.manual_seed(0)
    model = Noisy()
    results = []
    for function, noise in ((fast_swamp, 1), (fast_swamp, 2), (naive_swamp, 3)):
        torch.manual_seed(noise)  # the state of the user's generator must not matter
        results.append(function(model, *digits, **settings))
    for other in results[1:]:
        assert all(torch.equal(results[0].masks[name], other.masks[name]) for name in other.masks)
        assert all(torch.allclose(results[0].state_dict[n], v, atol=1e-9) for n, v in other.state_dict.items())


def test_a_transform(digits):
    def jitter(inputs: Tensor) -> Tensor:
        assert inputs.dim() == 4
        return inputs + 0.1 * torch.randn(len(inputs), 1, 1, 1, dtype=inputs.dtype)

    settings = SETTINGS | {"precision": "float64"}
    fast, naive = (
        function(networks.build("residual"), *digits, transform=jitter, **settings)
        for function in (fast_swamp, naive_swamp)
    )
    assert all(torch.allclose(fast.state_dict[n], v, atol=1e-9) for n, v in naive.state_dict.items())
    plain = fast_swamp(networks.build("residual"), *digits, **settings)
    assert not torch.allclose(plain.state_dict["head.weight"], fast.state_dict["head.weight"])


def test_crop_and_flip_are_for_training_only(digits):
    settings = SETTINGS | {"precision": "float64", "augment": "crop_flip"}
    fast, naive = (function(networks.build("residual"), *digits, **settings) for function in (fast_swamp, naive_swamp))
    assert all(torch.allclose(fast.state_dict[n], v, atol=1e-9) for n, v in naive.state_dict.items())
    plain = fast_swamp(networks.build("residual"), *digits, **SETTINGS | {"precision": "float64"})
    assert not torch.allclose(plain.state_dict["head.weight"], fast.state_dict["head.weight"])


def test_bfloat16_trains_float32_weights(digits):
    fast, naive = (
        function(networks.build("residual"), *digits, **SETTINGS | {"precision": "bfloat16"})
        for function in (fast_swamp, naive_swamp)
    )
    assert all(value.dtype == torch.float32 for value in dict(fast.model.named_parameters()).values())
    for cycle in range(5):
        assert fast.history[cycle]["loss"] == pytest.approx(naive.history[cycle]["loss"], rel=0.2)


def test_selection_is_on_validation_data(digits):
    without = fast_swamp(networks.build("tied"), *digits, **SETTINGS)
    assert all(row["best_accuracy"] is None and row["val_accuracy"] is None for row in without.history)
    result = fast_swamp(networks.build("tied"), *digits, val=0.25, **SETTINGS | {"particles": 4})
    for row in result.history:
        assert row["best_accuracy"] in row["particle_accuracy"]
        assert row["mean_accuracy"] == pytest.approx(sum(row["particle_accuracy"]) / 4)
        assert 0 <= row["val_accuracy"] <= 1
        assert 0 <= row["ensemble_accuracy"] <= 1
    bare = fast_swamp(networks.build("tied"), digits[0], **SETTINGS)
    assert all(row[key] is None for row in bare.history for key in row if key.endswith("accuracy") or key == "loss")


def test_on_cycle_sees_every_row(digits):
    rows = []
    result = fast_swamp(networks.build("tied"), *digits, on_cycle=rows.append, **SETTINGS)
    assert rows == result.history
    assert set(rows[0]) == {
        *(
            "cycle",
            "particles",
            "density",
            "kept",
            "accuracy",
            "loss",
            "particle_accuracy",
            "particle_loss",
            "best_accuracy",
        ),
        *("mean_accuracy", "ensemble_accuracy", "val_accuracy", "val_mean_accuracy", "flops", "train_loss"),
        *("train_seconds", "dropped", "seconds", "peak_memory", "warnings"),
    }
    assert rows[1]["seconds"] >= rows[1]["train_seconds"] > 0
    assert rows[1]["peak_memory"] > 10**7


class Narrow(nn.Module):
    """A network with one layer whose weights are so small that all of them are pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tiny, self.head = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(36, 10)
        self.tiny.weight.data.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        return self.head(torch.cat([x, self.tiny(x)], 1))


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
def test_an_emptied_layer_is_announced_once(function, digits):
    settings = SETTINGS | {"lr": 1e-4, "swa_lr": 1e-4, "prune": 0.3}
    with pytest.warns(UserWarning, match="cycle 1: all weights of tiny.weight are pruned") as caught:
        result = function(Narrow(), *digits, **settings)
    assert len([each for each in caught if "tiny.weight" in str(each.message)]) == 1
    assert "all weights of tiny.weight are pruned" in result.history[1]["warnings"][0]
    assert result.history[2]["warnings"] == []


@pytest.mark.parametrize(("average", "announced"), [(0.80, True), (0.849, True), (0.86, False), (0.95, False)])
def test_an_average_far_below_its_particles_is_announced(average, announced, digits, monkeypatch, recwarn):
    """A gap of more than five points to the particles' mean accuracy is reported: they don't share a basin."""
    from swamp_fast.cycle import averaging

    scored = averaging.score_row
    on_test = {"accuracy": average, "mean_accuracy": 0.9}
    on_val = {"val_accuracy": average, "val_mean_accuracy": 0.9}
    for val, scores, split, advice in (
        (None, on_test, "test", "such as val=0.1"),
        (0.1, on_val, "val", "Take a later ticket (more ticket_epochs)"),  # with validation data, only they count
    ):
        monkeypatch.setattr(averaging, "score_row", lambda *a, scores=scores: {**scored(*a), **scores})
        recwarn.clear()
        result = fast_swamp(networks.build("tied"), *digits, val=val, **SETTINGS | {"cycles": 0})
        texts = [str(each.message) for each in recwarn if "one basin" in str(each.message)]
        recorded = [text for text in result.history[0]["warnings"] if "one basin" in text]
        assert bool(texts) == announced
        assert texts == recorded
        if announced:
            assert f"have {average * 100:.2f} % accuracy on {split}, but the particles have 90.00 % on" in texts[0]
            assert advice in texts[0]


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
def test_divergence_is_an_error_that_names_the_particle(function, digits):
    settings = SETTINGS | {"lr": 1e9, "swa_lr": 1e9}
    with pytest.raises(FloatingPointError, match=r"ticket.*diverged.*Lower lr and swa_lr"):
        function(networks.build("tied"), *digits, **settings)


def test_quick_settings_run(digits):
    config = SwampConfig.quick(cycles=1, epochs=1, particles=2, progress=False)
    assert len(fast_swamp(networks.build("tied"), *digits, config=config).history) == 2


class Sentences(nn.Module):
    """A network that takes token ids with a padding mask, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        states = self.lstm(self.embed(ids))[0] * mask[..., None]
        return {"logits": self.head(torch.tanh(self.mix(states.sum(1) / mask.sum(1, keepdim=True))))}


class Tokens(torch.utils.data.Dataset):
    """A Dataset of sequences of different lengths."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int):
        return torch.arange(1 + index % 7) * 3 % 20, index % 3


def padded(items):
    longest = max(len(ids) for ids, _ in items)
    ids = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids, _ in items])
    mask = torch.stack([(torch.arange(longest) < len(ids)).double() for ids, _ in items])
    return {"ids": ids, "mask": mask}, torch.tensor([target for _, target in items])


def test_dicts_collate_functions_and_recurrent_networks(digits):
    loader = torch.utils.data.DataLoader(Tokens(), batch_size=16, shuffle=True, collate_fn=padded)
    settings = {name: value for name, value in SETTINGS.items() if name != "batch_size"} | {"precision": "float64"}
    model = Sentences()
    fast, naive = (
        function(
            *(model, loader, loader),
            forward=lambda module, inputs: module(**inputs)["logits"],
            prunable=["mix", "lstm.weight_*"],
            **settings,
        )
        for function in (fast_swamp, naive_swamp)
    )
    assert set(fast.masks) == {"mix.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    for name, value in naive.state_dict.items():
        assert torch.allclose(fast.state_dict[name], value, atol=1e-9), name
    assert fast.history[-1]["accuracy"] == naive.history[-1]["accuracy"]


@pytest.mark.parametrize(
    ("norm", "pruned"),
    [
        (nn.utils.parametrizations.weight_norm, set()),
        (nn.utils.parametrizations.spectral_norm, {"first.parametrizations.weight.original"}),
    ],
)
def test_parametrised_modules(norm, pruned, digits):
    """The tensors from which a parametrisation computes a weight are trained; only spectral norm's is also pruned."""
    model = networks.build("tied")
    norm(model.first)
    settings = SETTINGS | {"precision": "float64"}
    fast, naive = (function(model, *digits, **settings) for function in (fast_swamp, naive_swamp))
    assert set(fast.masks) == {"middle.weight", *pruned}
    for name, value in naive.state_dict.items():
        assert torch.allclose(fast.state_dict[name], value, atol=1e-9), name


def test_a_float64_model_and_a_float32_run(digits):
    """The result has the run's precision; the user's model keeps its own."""
    model = networks.build("residual").double()
    result = fast_swamp(model, *digits, **SETTINGS)
    assert {value.dtype for value in result.model.state_dict().values()} == {torch.float32, torch.int64}
    assert model.stem.weight.dtype == torch.float64
    assert result.model is result.model
    result.model(torch.randn(2, 1, 8, 8))
