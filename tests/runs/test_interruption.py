"""A run that is interrupted at any moment and resumed gives the same bits as an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import networks
import pytest
import torch
from paths import ROOT
from stops import ALWAYS, MODES, Interrupted, before_steps, stop_at
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.durability import RECIPES, crash, same_bits
from swamp_fast import SwampConfig, fast_swamp
from swamp_fast.data import samples
from swamp_fast.engines.fused.compact import Compact, CompactBank
from swamp_fast.engines.selection import named
from swamp_fast.particles.bank import ParticleBank
from swamp_fast.particles.layout import Layout
from swamp_fast.runs.files import load_tensors, read_json, write_json
from swamp_fast.runs.folder import RunDirectory

# Execution mode -> the steps before which a run is interrupted. Steps 0-2 train the ticket, 3-11 and 12-20 the cycles.
# The interruptions lie inside an epoch, between epochs, in the SWA window, and in the second cycle, which is sparse.
INTERRUPTED_AT = {"lanes": (1, 6, 20), "fold": (13,), "fold_grouped": (19,), "fused": (4, 14), "by density": (11, 16)}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumed_inside_a_training_equals_an_uninterrupted_one(mode, on, digits, tmp_path):
    settings = on(mode) | {"checkpoint_minutes": ALWAYS, "keep_particles": True, "val": 0.1}
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    for moment in INTERRUPTED_AT[mode]:
        with before_steps(stop_at(moment)), pytest.raises(Interrupted):
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
        with before_steps() as count:
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
            assert count[0] == 21 - moment, "the resumed run must continue at the step of the interruption"
        assert same_bits(tmp_path / "whole", tmp_path / "cut"), moment
        assert not list((tmp_path / "cut").glob("training*"))
        shutil.rmtree(tmp_path / "cut")


class Shaken(TensorDataset):
    """A Dataset that draws random numbers in __getitem__, as users' augmentations do."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + 0.1 * torch.rand(()), target


class Counting(networks.Tied):
    """A network with buffers that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen += x.mean()
        return super().forward(x)


@pytest.mark.gpu
def test_a_run_resumed_on_a_gpu(on, digits, tmp_path):
    settings = on("fused") | {"checkpoint_minutes": ALWAYS}
    on_gpu = settings | {"device": "cuda"}
    fast_swamp(networks.build("dropout"), *digits, **on_gpu, run_dir=tmp_path / "whole")
    for name, begun in (("cut", on_gpu), ("moved", settings | {"device": "cpu"})):
        with before_steps(stop_at(13)), pytest.raises(Interrupted):
            fast_swamp(networks.build("dropout"), *digits, **begun, run_dir=tmp_path / name)
    fast_swamp(networks.build("dropout"), *digits, **on_gpu, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    with pytest.warns(UserWarning, match="device was cpu, is cuda"):
        moved = fast_swamp(networks.build("dropout"), *digits, **on_gpu, run_dir=tmp_path / "moved")
    assert len(moved.history) == 2


def seeded(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model()


@pytest.mark.parametrize(
    ("model", "data", "change"),
    [
        (lambda: networks.build("dropout"), "streamed", {}),
        (lambda: seeded(Counting), "stored", {"rewind": "average", "nesterov": True}),
        (lambda: networks.build("tied"), "stored", {"average": "none", "transform": lambda x: x + torch.rand_like(x)}),
        (lambda: networks.build("residual"), "stored", {"augment": "crop_flip", "precision": "bfloat16"}),
        (
            lambda: networks.build("tied"),
            "stored",
            {"optimizer": "adamw", "lr": 1e-3, "swa_lr": 5e-4, "clip_norm": 1.0},
        ),
    ],
)
def test_all_that_a_step_depends_on_is_kept(model, data, change, on, digits, tmp_path, capsys):
    (inputs, targets), test = digits
    train = (inputs, targets)
    if data == "streamed":
        train = Shaken(inputs.float() / 16, targets)
        test = test[0].float() / 16, test[1]
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS, "progress": True} | change
    fast_swamp(model(), train, test, **settings, run_dir=tmp_path / "whole")
    assert ("streamed" in capsys.readouterr().err) == (data == "streamed")
    with before_steps(stop_at(14)), pytest.raises(Interrupted):
        fast_swamp(model(), train, test, **settings, run_dir=tmp_path / "cut")
    assert load_tensors(tmp_path / "cut" / "training.safetensors")[0]["done"] == 2
    fast_swamp(model(), train, test, **settings, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_killed_at_a_random_moment(tmp_path):
    """Kill a real process, whose run uses both engines. The slow tests kill many, and test each engine alone."""
    crashes = crash("by density", tmp_path, times=1, seed=7)
    assert (len(crashes.moments), crashes.equal) == (1, crashes.ended), crashes
    assert crashes.codes == [-signal.SIGKILL]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "fused", "by density"])
@pytest.mark.parametrize(("by", "times"), [(signal.SIGKILL, 34), (signal.SIGTERM, 4), (signal.SIGINT, 4)])
def test_stopped_at_many_random_moments(engine, by, times, tmp_path):
    crashes = crash(engine, tmp_path, times, seed=int(by), by=by)
    print(f"{engine}, signal {by}: {crashes}")
    assert len(crashes.moments) == times
    assert crashes.equal == crashes.ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "recipe"),
    [(engine, name) for engine in ("eager", "fused") for name in RECIPES if (engine, name) != ("fused", "closure")],
)
def test_recipes_killed_at_random_moments(engine, recipe, tmp_path):
    crashes = crash(engine, tmp_path, times=5, seed=3, recipe=recipe)
    assert (len(crashes.moments), crashes.equal) == (5, crashes.ended), crashes


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(number, error, on, digits, tmp_path, capsys):
    settings = on("fused")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    with (
        before_steps(lambda trainer, step: signal.raise_signal(number) if step == 13 else None),
        pytest.raises(error) as stopped,
    ):
        fast_swamp(networks.build("dropout"), *digits, **settings | {"progress": True}, run_dir=tmp_path / "cut")
    assert number == signal.SIGINT or stopped.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "to continue, repeat the call with run_dir" in capsys.readouterr().err
    assert RunDirectory(tmp_path / "cut").training_paths()[0].exists()
    with before_steps() as count:
        fast_swamp(networks.build("dropout"), *digits, **settings | {"progress": True}, run_dir=tmp_path / "cut")
    assert count[0] == 21 - 14
    assert "resumed  in cycle 1 of 1, after step 2" in capsys.readouterr().err
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_other_signal_handlers_are_left_alone(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"cycles": 0, "ticket_epochs": 0}
    seen = []
    before = signal.getsignal(signal.SIGINT)

    def look(row):
        seen.append(signal.getsignal(signal.SIGINT) == before)

    fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=look)  # without a folder, no handler is installed
    thread = threading.Thread(
        target=lambda: fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=look, run_dir=tmp_path / "a")
    )
    thread.start()
    thread.join()
    fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=look, run_dir=tmp_path / "b")
    assert seen == [True, True, False]

    def twice(trainer, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # stops the run at once, without a checkpoint

    with before_steps(twice), pytest.raises(KeyboardInterrupt):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "c")
    assert not list((tmp_path / "c").glob("training*"))
    assert signal.getsignal(signal.SIGINT) == before
    # A signal during the evaluation of the last cycle takes effect after the cycle is written, as no step follows.
    monkeypatch.setattr("swamp_fast.cycle.averaging.reestimate", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "d")
    assert (tmp_path / "d" / "cycle_00.safetensors").exists()


def test_a_model_with_hidden_state_has_one_checkpoint_per_cycle(on, digits, tmp_path, capsys):
    class Stateful(networks.Tied):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    settings = on("lanes") | {"checkpoint_minutes": ALWAYS, "cycles": 0, "progress": True}
    look = lambda row: seen.extend(tmp_path.glob("training*"))  # noqa: E731
    seen: list[Path] = []
    fast_swamp(Stateful(), *digits, **settings, on_cycle=look, run_dir=tmp_path)
    assert not seen
    assert "no checkpoints inside a cycle, because the model keeps state that" in capsys.readouterr().err


def test_continuing_elsewhere_is_reported(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS, "run_dir": tmp_path, "engine": "eager"}
    with before_steps(stop_at(10)), pytest.raises(Interrupted):
        fast_swamp(networks.build("tied"), *digits, **settings)
    about = read_json(tmp_path / "run.json")
    elsewhere = {"device": "cuda", "processor": "a GPU", "torch": about["place"]["torch"]}
    write_json(tmp_path / "run.json", {**about, "place": elsewhere})
    monkeypatch.setattr("swamp_fast.engines.start.by_rule", lambda *_: named("eager:lanes", "chosen anew"))
    with before_steps() as count, pytest.warns(UserWarning, match="device was cuda, is cpu") as warned:
        result = fast_swamp(networks.build("tied"), *digits, **settings)
    assert "Results may differ from here on. The engine is chosen anew" in str(warned[0].message)
    assert result.history[0]["warnings"][0] == str(warned[0].message)
    assert count[0] == 21 - 10
    assert result.engine["why"] == "chosen anew"
    after = read_json(tmp_path / "run.json")
    assert after["moved"] == [{"cycle": 0, "from": elsewhere, "engine": about["engine"]}]
    assert after["place"] == about["place"]
    write_json(tmp_path / "run.json", {**after, "place": {**after["place"], "threads": 99}})
    fast_swamp(networks.build("tied"), *digits, **settings)  # warns of nothing, because a finished run is only read


@pytest.mark.parametrize("reordered", [False, True])
def test_the_state_of_a_bank_is_the_same_for_every_engine(reordered):
    """The state is also the same if an engine stores a layer's remaining channels first, as on CUDA."""
    model = networks.build("residual")
    layout = Layout.of(model.named_parameters(), {"conv.weight", "stem.weight"})
    config = SwampConfig()
    mask = torch.rand(layout.Q) < 0.3
    full = ParticleBank(layout, [config], 3, torch.float32, torch.device("cpu"))
    first = {name: torch.tensor([1, 3]) for name, _ in model.named_parameters() if name.endswith("bias")}
    compact = CompactBank([Compact(layout, mask, first if reordered else None)], [config], 3, torch.float32)
    compact.masks.copy_(torch.arange(compact.layout.Q) < len(compact.compacts[0].kept))
    full.masks.copy_(mask)
    for tensor in full.moving().values():
        tensor.normal_()
        tensor[:, : layout.Q].mul_(mask)
    state = full.state()
    compact.load_state_(state)
    again = compact.state()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert torch.equal(compact.solutions(False), full.weights)


class Slow(TensorDataset):
    def __getitem__(self, index):
        time.sleep(0.003)
        return super().__getitem__(index)


def with_workers(folder: str) -> None:
    """Do a run whose data are read by worker processes."""
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    samples.collected = lambda source, device: (source, "as it is")
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    train = DataLoader(Slow(inputs, (inputs[:, 0] > 0).long()), batch_size=32, num_workers=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    settings = {"cycles": 0, "epochs": 8, "ticket_epochs": 0, "particles": 2, "engine": "eager", "progress": False}
    fast_swamp(model, train, **settings, run_dir=folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_lets_the_step_end(number, tmp_path):
    """Terminals and batch systems signal all processes of a group, including the workers that read the data."""
    code = f"import test_interruption; test_interruption.with_workers({str(tmp_path)!r})"
    paths = [str(Path(__file__).parent), str(ROOT / "tests" / "support"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "ticket.safetensors").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1.0)
        os.killpg(process.pid, number)
        error = process.communicate()[1].decode()
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), error
    assert (tmp_path / "training.safetensors").exists()
