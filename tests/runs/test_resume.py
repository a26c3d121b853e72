"""A run's folder on disk: its files, resuming from it, refusing another run's folder, and reporting damaged files."""

from __future__ import annotations

import json
import shutil

import networks
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import swamp_fast.runs.record as run_module
from swamp_fast import SwampConfig, SwampResult, fast_swamp, naive_swamp
from swamp_fast.runs.files import load_tensors, read_json, write, write_json
from swamp_fast.runs.folder import Snapshot

SETTINGS = {
    "engine": "eager",
    "batch_size": 32,
    "cycles": 3,
    "epochs": 2,
    "ticket_epochs": 1,
    "particles": 2,
    "progress": False,
}


class Interrupted(Exception):
    """Raised in place of an interruption between two cycles."""


def stop_after(cycle: int):
    def stop(row):
        if row["cycle"] == cycle:
            raise Interrupted

    return stop


def same(a: SwampResult, b: SwampResult) -> None:
    """Assert that two results are equal bit for bit, except for the measured times and memory."""
    for cycle in range(len(a.history)):
        states = a._snapshot(cycle).state, b._snapshot(cycle).state
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert all(torch.equal(mask, b._snapshot(cycle).masks[name]) for name, mask in a._snapshot(cycle).masks.items())
        clock = ("seconds", "train_seconds", "peak_memory")
        rows = [{k: v for k, v in each.history[cycle].items() if k not in clock} for each in (a, b)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("function", [fast_swamp, naive_swamp])
@pytest.mark.parametrize("rewind", ["ticket", "average"])
@pytest.mark.parametrize("cycle", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(function, rewind, cycle, digits, tmp_path):
    settings = SETTINGS | {"rewind": rewind, "run_dir": tmp_path / "run", "keep_particles": True}
    with pytest.raises(Interrupted):
        function(networks.build("dropout"), *digits, val=0.2, on_cycle=stop_after(cycle), **settings)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = []
    resumed = function(networks.build("dropout"), *digits, val=0.2, on_cycle=rows.append, **settings)
    assert [row["cycle"] for row in rows] == list(range(cycle + 1, 4))
    if function is fast_swamp:
        assert resumed.engine == about["engine"]
    whole = function(networks.build("dropout"), *digits, val=0.2, **settings | {"run_dir": tmp_path / "whole"})
    same(resumed, whole)
    assert all(torch.equal(resumed.particles[name], value) for name, value in whole.particles.items())


def test_a_finished_run_is_read_not_run_again(digits, tmp_path, monkeypatch):
    settings = SETTINGS | {"run_dir": str(tmp_path), "keep_particles": True}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    monkeypatch.setattr(run_module.Run, "step", lambda *_: pytest.fail("it trained"))
    again = fast_swamp(networks.build("tied"), *digits, **settings)
    same(first, again)
    assert again.particles.keys() == first.particles.keys()


def test_the_files_are_plain(digits, tmp_path):
    result = fast_swamp(networks.build("residual"), *digits, **SETTINGS, run_dir=tmp_path, keep_particles=True)
    model = networks.build("residual")
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    for name, value in result.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    masks = safetensors.torch.load_file(tmp_path / "masks.safetensors")
    assert all(torch.equal(masks[name], mask) for name, mask in result.masks.items())
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    config = SwampConfig.from_toml(tmp_path / "config.toml")
    assert config == result.config
    particles = safetensors.torch.load_file(tmp_path / "particles.safetensors")
    assert particles["stem.weight"].shape == (2, 8, 1, 3, 3)
    sizes = [(tmp_path / f"cycle_{cycle:02d}.safetensors").stat().st_size for cycle in range(4)]
    assert sizes == sorted(sizes, reverse=True)  # later cycles are smaller, because pruned weights are not stored
    assert not list(tmp_path.glob("*.part"))


def test_tied_weights_load_into_plain_modules(digits, tmp_path):
    fast_swamp(networks.build("tied"), *digits, **SETTINGS, run_dir=tmp_path)
    model = networks.build("tied")
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert model.again.weight is model.middle.weight
    loaded = SwampResult.load(tmp_path, networks.build("tied")).model
    assert loaded.again.weight is loaded.middle.weight
    assert torch.equal(loaded.middle.weight, model.middle.weight)


def test_save_and_load(digits, tmp_path):
    result = fast_swamp(networks.build("residual"), *digits, **SETTINGS, keep_particles=True)
    result.save(tmp_path / "a")
    with pytest.raises(FileExistsError, match="must be an empty or new folder"):
        result.save(tmp_path / "a")
    bare = SwampResult.load(tmp_path / "a")
    same(result, bare)
    assert bare.history == result.history
    assert bare.config == result.config
    assert bare.standardise == result.standardise
    assert all(torch.equal(bare.ticket[name], value) for name, value in result.ticket.items())
    assert all(torch.equal(bare.particles[name], value) for name, value in result.particles.items())
    with pytest.raises(ValueError, match=r"loaded without a model; call SwampResult.load\(dir, model\)"):
        _ = bare.model
    full = SwampResult.load(tmp_path / "a", networks.build("residual"))
    inputs = torch.randn(5, 1, 8, 8)
    assert torch.equal(full.model(inputs), result.model(inputs))
    assert torch.equal(full.at(1)[0](inputs), result.at(1)[0](inputs))
    bare.save(tmp_path / "b")
    same(SwampResult.load(tmp_path / "b"), result)
    with pytest.raises(IndexError, match="`cycle` must lie in 0 … 3, got 4"):
        result.at(4)
    with pytest.raises(ValueError, match=r"doesn't fit this run: the model lacks \['conv.weight'"):
        SwampResult.load(tmp_path / "a", networks.build("tied"))
    with pytest.raises(
        ValueError, match=r"stem.weight has shape \[4, 1, 3, 3\], but in the run it has shape \[8, 1, 3, 3\]"
    ):
        SwampResult.load(tmp_path / "a", networks.ResidualCNN(channels=4))
    with pytest.raises(FileNotFoundError, match="holds no run of swamp_fast"):
        SwampResult.load(tmp_path / "nowhere")


def weighted(outputs, targets):
    return 2 * F.cross_entropy(outputs, targets, reduction="none")


OTHERS = [
    ({"lr": 0.2}, "lr was 0.1, is 0.2"),
    ({"cycles": 2}, "it has completed cycle 3, but cycles = 2"),
    ({"particles": 3, "seed": 1}, "seed was 0, is 1; particles was 2, is 3"),
    ({"model": "residual"}, "the model differs"),
    ({"loss": weighted}, "the loss differs"),
    ({"transform": lambda x: x}, "the transform differs"),
    ({"forward": lambda module, x: module(x)}, "the forward differs"),
    ({"val": 0.3}, "the training data differ; the validation data differ"),
    ({"few": 100}, "the training data differ"),
    ({"prunable": "middle"}, "the prunable parameters differ"),
    ({"initial_masks": {"middle.weight": torch.zeros(32, 32).bool()}}, "the initial masks differ"),
    ({"function": naive_swamp}, "it was computed by fast_swamp"),
]


@pytest.mark.parametrize(("change", "text"), OTHERS)
def test_another_run_is_refused_by_what_differs(change, text, digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path)}
    fast_swamp(networks.build("tied"), *digits, **settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change = dict(change)
    function = change.pop("function", fast_swamp)
    model = networks.build(change.pop("model", "tied"))
    few = change.pop("few", 160)
    train = digits[0][0][:few], digits[0][1][:few]
    with pytest.raises(ValueError, match="holds another run: ") as error:
        function(model, train, digits[1], **settings | change)
    assert text in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_device_and_progress_may_change(digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path)}
    fast_swamp(networks.build("tied"), *digits, **settings)
    fast_swamp(networks.build("tied"), *digits, **settings | {"device": "cpu", "progress": True, "data_dir": "x"})


def test_folders_that_are_no_runs(digits, tmp_path):
    def call(**change):
        return fast_swamp(networks.build("tied"), *digits, **SETTINGS | {"run_dir": str(tmp_path / "run")} | change)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no run.json"):
        call()
    assert (tmp_path / "run" / "thesis.tex").read_text() == "mine"
    (tmp_path / "run" / "thesis.tex").unlink()
    call(cycles=0)
    with pytest.raises(ValueError, match="holds a run already, and resume=False"):
        call(cycles=0, resume=False)
    about = tmp_path / "run" / "run.json"
    text = about.read_text()
    about.write_text(text.replace("swamp_fast 3", "swamp_fast 2"))
    with pytest.raises(ValueError, match='has the format "swamp_fast 2", but this version reads "swamp_fast 3"'):
        call(cycles=0)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="must be a folder, but it is a file"):
        call(run_dir=str(file))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_moved_aside_and_its_cycle_trained_again(share, digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path)}
    whole = fast_swamp(networks.build("tied"), *digits, **settings)
    snapshots = [whole._snapshot(cycle) for cycle in range(4)]
    path = tmp_path / "cycle_03.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cycle_03.safetensors is damaged"):
        SwampResult.load(tmp_path)
    assert path.exists()  # `load` only reads: it doesn't rename the damaged file
    with pytest.warns(
        UserWarning, match=r"is damaged .* renamed to cycle_03.safetensors.damaged. .* continues with cycle 3"
    ):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert (tmp_path / "cycle_03.safetensors.damaged").read_bytes() == content[: int(share * len(content))]
    assert "renamed" in again.history[3]["warnings"][0]
    for cycle in range(4):
        for name, value in snapshots[cycle].state.items():
            assert torch.equal(again._snapshot(cycle).state[name], value)


def test_a_foreign_checkpoint_is_refused(digits, tmp_path):
    fast_swamp(networks.build("tied"), *digits, **SETTINGS, run_dir=str(tmp_path))
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "cycle_03.safetensors")
    with pytest.raises(ValueError, match="cycle_03.safetensors doesn't belong to this run"):
        SwampResult.load(tmp_path)
    shutil.copy(tmp_path / "cycle_02.safetensors", tmp_path / "cycle_03.safetensors")
    with pytest.raises(ValueError, match="cycle_03.safetensors holds cycle 2: it was renamed"):
        SwampResult.load(tmp_path)
    fast_swamp(networks.build("tied"), *digits, **SETTINGS | {"seed": 1}, run_dir=str(tmp_path / "other"))
    for name in ("cycle_03.safetensors", "ticket.safetensors"):
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} doesn't belong to this run"):
            fast_swamp(networks.build("tied"), *digits, **SETTINGS, run_dir=str(tmp_path))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "cycle_03.safetensors")  # a pickle
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        SwampResult.load(tmp_path)


def test_a_missing_line_of_the_history_is_written_again(digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path)}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines()
    history.write_text("\n".join(lines[:-1]) + "\n")
    again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert history.read_text().splitlines() == lines
    assert again.engine == first.engine  # a call that trains nothing keeps the recorded engine


def test_incomplete_files_are_reported(digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path), "keep_particles": True}
    fast_swamp(networks.build("tied"), *digits, **settings)
    about = read_json(tmp_path / "run.json")
    for engine, text in (
        ({"name": "lanes"}, "names no engine that this version knows .name = 'lanes'."),
        ({"name": None}, "names no engine that this version knows .name = None."),
        ({"name": "fused", "rows": 5}, "names no engine that this version knows"),
        ({"name": "fused@0.5,eager:lanes", "fused": "x"}, "names no engine that this version"),
    ):
        write_json(tmp_path / "run.json", {**about, "engine": engine})
        with pytest.raises(ValueError, match=text):
            fast_swamp(networks.build("tied"), *digits, **settings)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "swamp_fast 3"}', "changed"])
def test_a_damaged_run_json_is_written_again_from_the_call(content, digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path)}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    before, content = (tmp_path / "run.json").read_text(), content if content != "changed" else None
    (tmp_path / "run.json").write_text(before.replace('"seed": 0', '"seed": 1') if content is None else content)
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        SwampResult.load(tmp_path)
    with pytest.warns(UserWarning, match=r"run.json is damaged .* It is written again from this call"):
        assert fast_swamp(networks.build("tied"), *digits, **settings) == first
    assert (tmp_path / "run.json.damaged").exists()
    assert SwampResult.load(tmp_path).config == first.config
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        fast_swamp(networks.build("tied"), *digits, **settings | {"seed": 1})


def test_another_run_than_the_damaged_run_json_described_is_refused(digits, tmp_path):
    fast_swamp(networks.build("tied"), *digits, **SETTINGS, run_dir=str(tmp_path))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"ticket.safetensors doesn't belong to this run"):
        fast_swamp(networks.build("tied"), *digits, **SETTINGS | {"seed": 1}, run_dir=str(tmp_path))
    assert (tmp_path / "run.json").read_text() == "{"


def test_missing_particles_are_computed_again(digits, tmp_path):
    settings = SETTINGS | {"run_dir": str(tmp_path), "keep_particles": True}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    (tmp_path / "particles.safetensors").unlink()
    with pytest.warns(UserWarning, match="lacks the particles of cycle 3, so that cycle is computed again"):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert again == first
    assert all(torch.equal(tensor, first.particles[name]) for name, tensor in again.particles.items())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write(path, b"first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write(path, b"second")
    assert path.read_bytes() == b"first"
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "none.safetensors")


def test_snapshots_pack_and_unpack():
    mask = torch.rand(5, 7) < 0.4
    state = {"w": torch.randn(5, 7) * mask, "b": torch.randn(3), "n": torch.tensor(4), "e": torch.zeros(0)}
    # Set some of the kept weights to 0, which can happen in a run.
    state["w"][mask] = torch.where(torch.rand(int(mask.sum())) < 0.2, 0.0, state["w"][mask])
    tensors, metadata = Snapshot(state, {"w": mask}, {"cycle": 1}).packed()
    assert tensors["values/w"].numel() == int(mask.sum())
    back = Snapshot.unpacked(tensors, metadata)
    assert list(back.state) == list(state)
    assert all(torch.equal(back.state[name], value) for name, value in state.items())
    assert torch.equal(back.masks["w"], mask)
    assert back.row == {"cycle": 1}
