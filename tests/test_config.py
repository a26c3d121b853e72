"""SwampConfig: invalid settings, settings computed from others, and TOML."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest

from swamp_fast import SwampConfig

BAD = [
    ({"particle": 3}, TypeError, r"unknown setting `particle`. Did you mean `particles`\?"),
    ({"zzz": 3}, TypeError, "unknown setting `zzz`. Known: particles, cycles"),
    ({"particles": 0}, ValueError, "`particles` must be at least 1"),
    ({"particles": [4, 0], "cycles": 1}, ValueError, "`particles` must be at least 1"),
    ({"particles": [4, 4], "cycles": 3}, ValueError, r"one number per training, cycles \+ 1 = 4; got 2"),
    ({"layer_kept": [3]}, TypeError, "`layer_kept` must be a list of ints, got 3"),
    ({"layer_kept": 3}, TypeError, "`layer_kept` must be a list of lists of ints, got 3"),
    ({"layer_kept": [[3]]}, ValueError, '`layer_kept` needs mask_score="random" and one list for each of 14'),
    ({"particles": 2.5}, TypeError, "`particles` must be int | a list of ints, got 2.5"),
    ({"cycles": -1}, ValueError, "`cycles` must be at least 0"),
    ({"prune": 0.0}, ValueError, "`prune` must lie strictly between 0 and 1"),
    ({"prune": 1.0}, ValueError, "`prune` must lie strictly between 0 and 1"),
    ({"epochs": 0}, ValueError, "`epochs` must be at least 1"),
    ({"ticket_epochs": -1}, ValueError, "`ticket_epochs` must be at least 0"),
    ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    ({"lr": float("nan")}, ValueError, "`lr` must be at least 0 and finite, got nan"),
    ({"lr": -0.1}, ValueError, "`lr` must be at least 0 and finite, got -0.1"),
    ({"swa_lr": -0.1}, ValueError, "`swa_lr` must be at least 0"),
    ({"weight_decay": float("inf")}, ValueError, "`weight_decay` must be at least 0 and finite, got inf"),
    ({"momentum": 1.0}, ValueError, r"`momentum` must lie in \[0, 1\)"),
    ({"nesterov": True, "momentum": 0.0}, ValueError, "`nesterov` needs momentum"),
    ({"optimizer": "adam"}, ValueError, '`optimizer` must be one of "sgd", "adamw"; got "adam"'),
    ({"optimizer": "adamw", "nesterov": True}, ValueError, '`nesterov` is a setting of optimizer="sgd", got nesterov'),
    ({"optimizer": "adamw", "momentum": 0.5}, ValueError, 'momentum = 0.5 with .* Leave it at 0.9, or set optimizer="'),
    ({"beta1": 0.5}, ValueError, '`beta1` is a setting of optimizer="adamw", got beta1 = 0.5 with optimizer="sgd"'),
    ({"adam_eps": 1e-6}, ValueError, '`adam_eps` is a setting of optimizer="adamw"'),
    ({"optimizer": "adamw", "beta2": 1.0}, ValueError, r"`beta2` must lie in \[0, 1\), got 1.0"),
    ({"optimizer": "adamw", "adam_eps": 0.0}, ValueError, "`adam_eps` must be at least 1.17549e-38 and finite"),
    ({"clip_norm": 0.0}, ValueError, "`clip_norm` must be above 0 and finite, got 0.0; None doesn't clip"),
    ({"clip_norm": float("nan")}, ValueError, "`clip_norm` must be above 0 and finite, got nan"),
    ({"groups": {"params": "*", "lr": 1.0}}, TypeError, "`groups` must be a list of tables such as"),
    ({"groups": ["*"]}, TypeError, r"`groups\[0\]` must be a table such as .*, got '\*'"),
    (
        {"groups": [{"params": "*", "lrs": 1.0}]},
        ValueError,
        r"`groups\[0\]` has the key 'lrs', but the keys of a group",
    ),
    ({"groups": [{"lr": 1.0}]}, ValueError, r"`groups\[0\]` needs params, a pattern .* got params = None"),
    ({"groups": [{"params": [], "lr": 1.0}]}, ValueError, r"`groups\[0\]` needs params, .* got params = \[\]"),
    ({"groups": [{"params": ["*", 3], "lr": 1.0}]}, ValueError, r"`groups\[0\]` needs params, .* got params = "),
    ({"groups": [{"params": "*"}]}, ValueError, r"`groups\[0\]` sets nothing. Give it lr"),
    ({"groups": [{"params": "*", "lr": "1"}]}, TypeError, r"`groups\[0\]`: lr must be a number, got '1'"),
    ({"groups": [{"params": "*", "lr": True}]}, TypeError, r"`groups\[0\]`: lr must be a number, got True"),
    ({"groups": [{"params": "*", "lr": math.nan}]}, ValueError, r"`groups\[0\]`: lr must be at least 0 and finite"),
    ({"groups": [{"params": "*", "lr": 10**400}]}, ValueError, r"`groups\[0\]`: lr must be at least 0 and finite"),
    (
        {"groups": [{"params": "a", "lr": 1}, {"params": "b", "weight_decay": -1}]},
        ValueError,
        r"`groups\[1\]`: weight_decay must be at least 0 and finite, got -1",
    ),
    ({"decay_norms_and_biases": 0}, TypeError, "`decay_norms_and_biases` must be bool, got 0"),
    ({"swa_start": 1.0}, ValueError, r"`swa_start` must lie in \[0, 1\)"),
    ({"swa_start": -0.1}, ValueError, r"`swa_start` must lie in \[0, 1\)"),
    ({"swa_lr": 0.2}, ValueError, "`swa_lr` must be at most `lr`, got swa_lr = 0.2 and lr = 0.1"),
    ({"target_density": 0.05, "cycles": 3}, ValueError, "0.05 takes 14 cycles at prune = 0.2, but cycles = 3 was"),
    ({"target_density": 1.0}, ValueError, "`target_density` must lie strictly between 0 and 1"),
    (
        {"engine": "quick"},
        ValueError,
        r'`engine` must be one of "auto", "eager", "fused", "fastest", or a result.s engine.*; got "quick"',
    ),
    ({"precision": "float16"}, ValueError, "`precision` must be one of"),
    ({"rewind": "zero"}, ValueError, "`rewind` must be one of"),
    ({"augment": "flip"}, ValueError, "`augment` must be one of"),
    ({"seed": True}, TypeError, "`seed` must be int, got True"),
    ({"seed": 1 << 63}, ValueError, "`seed` must fit 64 bits"),
    ({"lr": "fast"}, TypeError, "`lr` must be float, got 'fast'"),
    ({"nesterov": 1}, TypeError, "`nesterov` must be bool, got 1"),
]


@pytest.mark.parametrize(("settings", "kind", "text"), BAD)
def test_refuses(settings, kind, text):
    with pytest.raises(kind, match=text):
        SwampConfig.of(None, settings)


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(SwampConfig) if "float" in str(field.type)]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True])
def test_no_number_may_be_nan_infinite_or_a_truth_value(name, value):
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        SwampConfig(**{name: value})


def test_defaults_are_those_of_the_method():
    config = SwampConfig()
    assert (config.particles, config.cycles, config.prune, config.epochs, config.ticket_epochs) == (4, 14, 0.2, 150, 10)
    assert (config.initial_lr, config.window_lr, config.swa_start, config.momentum) == (0.1, 0.05, 0.75, 0.9)
    adamw = SwampConfig(optimizer="adamw")
    assert (adamw.initial_lr, adamw.window_lr) == (1e-3, 5e-4)
    one = SwampConfig(lr=0.01)
    assert (one.initial_lr, one.window_lr) == (0.01, 0.005)
    assert (one.replace(swa_lr=0.002).window_lr, one.replace(lr=None).initial_lr) == (0.002, 0.1)
    assert one.identity() == SwampConfig(lr=0.01, swa_lr=0.005).identity()
    assert (config.weight_decay, config.batch_size) == (5e-4, 128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


def test_every_field_is_documented():
    for field in dataclasses.fields(SwampConfig):
        assert f"\n    {field.name}: " in inspect.getdoc(SwampConfig), field.name


@pytest.mark.parametrize(
    ("target", "prune", "cycles"), [(0.8, 0.2, 1), (0.512, 0.2, 3), (0.05, 0.2, 14), (0.0115, 0.2, 21), (0.25, 0.5, 2)]
)
def test_target_density_stands_for_cycles(target, prune, cycles):
    config = SwampConfig(target_density=target, prune=prune)
    assert config.cycles == cycles
    assert (1 - prune) ** cycles <= target * (1 + 1e-9)
    assert config.replace(cycles=2).target_density is None
    assert config.replace(target_density=0.5, prune=0.2).cycles == 4


def test_to_toml_and_back(tmp_path):
    configs = [
        SwampConfig(),
        SwampConfig.quick(particles=(1, 1, 4), cycles=2, run_dir='a "b" \\ ü', lr=1e-5, swa_lr=1e-7),
        SwampConfig(target_density=0.1, seed=-5, average="none", lr=0.01),
        SwampConfig(optimizer="adamw", beta1=0.8, beta2=0.99, adam_eps=1e-6, clip_norm=0.5, lr=1e-3, swa_lr=5e-4),
        SwampConfig(groups=[{"params": 'a "b" \\ ü', "lr": 0}, {"params": ["*", "a.b"], "weight_decay": 1e-7}]),
        SwampConfig(groups=[{"params": "*.bias", "lr": 2.0, "weight_decay": 0.1}], decay_norms_and_biases=False),
    ]
    for config in configs:
        assert SwampConfig.from_toml(config.to_toml()) == config
        (tmp_path / "settings.toml").write_text(config.to_toml())
        assert SwampConfig.from_toml(tmp_path / "settings.toml") == config
        assert SwampConfig.from_toml(str(tmp_path / "settings.toml")) == config
    with pytest.raises(ValueError, match="not valid TOML"):
        SwampConfig.from_toml("lr = = 1")
    with pytest.raises(TypeError, match="unknown setting `learning_rate`"):
        SwampConfig.from_toml("learning_rate = 0.1")


def test_groups_are_plain_values_outside_and_hashable_inside():
    table = {"params": ["head.*"], "lr": 0.1}
    config = SwampConfig(groups=[table, {"params": "*.bias", "weight_decay": 0}])
    assert config.to_dict()["groups"] == [table, {"params": ["*.bias"], "weight_decay": 0.0}]
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    again = SwampConfig(**config.to_dict())
    assert (again, hash(again)) == (config, hash(config))
    assert config.replace(seed=1).groups == config.groups
    tables = "[[groups]]\nparams = 'head.*'\nlr = 0.1\n[[groups]]\nparams = ['*.bias']\nweight_decay = 0\n"
    assert SwampConfig.from_toml(tables) == config


def test_settings_take_precedence_over_config():
    config = SwampConfig(epochs=3)
    assert SwampConfig.of(config, {"seed": 5}) == SwampConfig(epochs=3, seed=5)
    with pytest.raises(TypeError, match="`config` must be a SwampConfig, got dict"):
        SwampConfig.of({"epochs": 3}, {})


def test_numpy_numbers_are_numbers():
    import numpy as np

    config = SwampConfig(seed=np.int64(3), lr=np.float32(0.5), particles=np.int32(2))
    assert (type(config.seed), type(config.lr), type(config.particles)) == (int, float, int)


def test_a_toml_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.toml", str(tmp_path / "none.toml")):
        with pytest.raises(FileNotFoundError, match="the file of the settings can't be read: .*none.toml"):
            SwampConfig.from_toml(path)
