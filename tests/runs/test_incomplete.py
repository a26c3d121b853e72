"""A folder that lacks files is not read as a shorter run, and odd files in place of run.json don't stop the process."""

from __future__ import annotations

import os

import networks
import pytest
import torch

from swamp_fast import SwampConfig, SwampResult, compare, fast_swamp, sweep
from swamp_fast.analysis import Analysis, hessian_trace
from swamp_fast.analysis.masks import densities

SETTINGS = {"batch_size": 32, "epochs": 2, "ticket_epochs": 0, "particles": 2, "cycles": 2, "progress": False}


def run(digits, **settings):
    return fast_swamp(networks.build("tied"), *digits, **SETTINGS | settings)


@pytest.mark.parametrize("name", ["cycle_00", "cycle_01", "cycle_02", "ticket", "particles"])
def test_a_missing_file_is_named(name, digits, tmp_path):
    whole = run(digits, run_dir=tmp_path, keep_particles=True)
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(
        ValueError, match=f"lacks {name}.safetensors, .* repeat the call|no cycle of this run is finished"
    ):
        SwampResult.load(tmp_path)
    assert run(digits, run_dir=tmp_path, keep_particles=True) == whole


def test_an_interrupted_run_loads_what_is_finished(digits, tmp_path):
    def stop(row):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(digits, run_dir=tmp_path, on_cycle=stop)
    assert len(SwampResult.load(tmp_path).history) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_in_place_of_run_json_is_refused(make, digits, tmp_path):
    run(digits, run_dir=tmp_path, cycles=0)
    path = tmp_path / "run.json"
    path.unlink()
    make(path)
    for call in (lambda: SwampResult.load(tmp_path), lambda: run(digits, run_dir=tmp_path, cycles=0)):
        with pytest.raises(OSError, match=r"run.json can't be read .*make the file readable, or move it away"):
            call()


def test_a_model_without_values_is_refused(digits, tmp_path):
    run(digits, run_dir=tmp_path, cycles=0)
    with pytest.raises(ValueError, match="`model` is on the meta device"):
        SwampResult.load(tmp_path, networks.build("tied").to("meta"))


def test_empty_names_are_refused(digits):
    for call in (
        lambda: fast_swamp(networks.build("tied"), "", **SETTINGS),
        lambda: run(digits, run_dir=""),
        lambda: sweep(networks.build("tied"), *digits, {"seed": [0]}, out="", **SETTINGS),
        lambda: compare(networks.build("tied"), *digits, ["imp"], [0], out="", **SETTINGS),
    ):
        with pytest.raises(
            (ValueError, TypeError), match="`(run_dir|out)` must be a path .* and not empty|is an empty text"
        ):
            call()


def test_tensors_that_are_not_dense_and_real_are_refused():
    inputs, labels = torch.randn(8, 6), torch.arange(8) % 4
    for data in ((inputs, labels + 1j), (inputs.to_sparse(), labels), (inputs.to("meta"), labels)):
        with pytest.raises(TypeError, match="`train`: (inputs|targets) must be dense tensors of real numbers"):
            fast_swamp(torch.nn.Linear(6, 4), data, **SETTINGS)
    with pytest.raises(TypeError, match=r"must be a pair \(inputs, targets\), got a dict"):
        fast_swamp(torch.nn.Linear(6, 4), {"x": inputs, "y": labels}, **SETTINGS)


@pytest.mark.parametrize("mask", [0.5, torch.ones(6).bool(), torch.ones(8, 1), None])
def test_masks_of_another_kind_are_refused(mask, digits):
    result = run(digits, cycles=0)
    name = next(iter(result.masks))
    on = Analysis(networks.build("tied"), *digits, batch_size=32)
    with pytest.raises((TypeError, ValueError), match=f"`masks`: .{name}. must (be a bool tensor|have shape)"):
        hessian_trace(on, result.state_dict, {**result.masks, name: mask}, 2)
    with pytest.raises(TypeError, match="`initial_masks` must be a dict"):
        run(digits, initial_masks=[mask])
    with pytest.raises(TypeError, match="must be a bool tensor"):
        densities({"w": torch.randn(3)})


def test_seeds_and_settings_of_other_kinds(digits):
    for seeds in (b"01", "01", None, 3, torch.tensor([1, 1])):
        with pytest.raises(TypeError, match="`seeds` must be a list; got"):
            compare(networks.build("tied"), *digits, ["imp"], seeds, baseline="imp", **SETTINGS)
    with pytest.raises(ValueError, match="`prune` must lie strictly between"):
        SwampConfig(prune=1e-17, target_density=0.5)
    with pytest.raises(TypeError, match="`text` must be TOML text or a path"):
        SwampConfig.from_toml(None)
