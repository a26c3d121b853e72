"""A run that is stopped at any moment goes on to the same bits; what can't be written or read is told, and nothing is
lost; a particle that diverges touches no other.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.durability import crash, same_bits
from swamp_fast import SwampConfig, engines, fast_swamp, lock, naive_swamp
from swamp_fast.bank import ParticleBank
from swamp_fast.checkpoint import Damaged, RunDirectory, Unfinished, load_tensors, save_tensors, write
from swamp_fast.data import samples
from swamp_fast.engines import by_density
from swamp_fast.engines.eager import Choice, EagerEngine
from swamp_fast.engines.fused.compact import Compact, CompactBank
from swamp_fast.engines.trainer import Trainer
from swamp_fast.layout import Layout

ALWAYS = 1e-9  # minutes: a checkpoint after every step
RUN = {"batch_size": 64, "cycles": 1, "epochs": 3, "ticket_epochs": 1, "particles": 2, "prune": 0.5, "progress": False}
STEPS = 3  # of an epoch: 160 samples
WAYS = ["lanes", "fold", "fold grouped", "fused", "by density"]


class Interrupted(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def on(monkeypatch):
    """The settings by which a run is on a way, with what a stopwatch would choose fixed."""

    def settings(way: str) -> dict[str, object]:
        choice = Choice("lanes" if way in ("fused", "by density") else way, False, "forced", {})
        monkeypatch.setattr(engines, "choose", lambda *_: choice)
        if way == "by density":

            def seconds(engine, problem, mask):
                return 1.0 if isinstance(engine, EagerEngine) else 1.5 * float(mask.float().mean())

            for module in (engines, by_density):
                monkeypatch.setattr(module, "seconds_of_steps", seconds)
        return RUN | {"engine": {"fused": "fused", "by density": "auto"}.get(way, "eager")}

    return settings


@contextmanager
def before_steps(action=lambda trainer, step: None):
    """Call action(trainer, number) before each step of all trainings; gives their count, in a list."""
    step, count = Trainer.step, [0]

    def counted(trainer, handle):
        action(trainer, count[0])
        count[0] += 1
        step(trainer, handle)

    Trainer.step = counted
    try:
        yield count
    finally:
        Trainer.step = step


def stop_at(number: int):
    def stop(trainer, step):
        if step == number:
            raise Interrupted

    return stop


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Of the steps of a ticket (0-2) and of two trainings (3-11, 12-20): inside an epoch, between two, in the SWA window,
# and in the second cycle, whose mask is sparse.
MOMENTS = {"lanes": (1, 6, 20), "fold": (13,), "fold grouped": (19,), "fused": (4, 14), "by density": (11, 16)}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_inside_a_training_is_uninterrupted(way, on, digits, tmp_path, monkeypatch):
    settings = on(way) | {"checkpoint_minutes": ALWAYS, "keep_particles": True, "val": 0.1}
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    for moment in MOMENTS[way]:
        with before_steps(stop_at(moment)), pytest.raises(Interrupted):
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
        with before_steps() as count:
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
            assert count[0] == 21 - moment, "it went on at the step"
        assert same_bits(tmp_path / "whole", tmp_path / "cut"), moment
        assert not list((tmp_path / "cut").glob("training*"))
        shutil.rmtree(tmp_path / "cut")


class Shaken(TensorDataset):
    """Draws in __getitem__, as user's augmentations do."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + 0.1 * torch.rand(()), target


class Counting(networks.Tied):
    """Has buffers of its own that its forward changes."""

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
def test_on_a_gpu_too(on, digits, tmp_path):
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
        (lambda: networks.build("tied"), "stored", {"swa": False, "transform": lambda x: x + torch.rand_like(x)}),
        (lambda: networks.build("residual"), "stored", {"augment": "crop_flip", "precision": "bfloat16"}),
        (
            lambda: networks.build("tied"),
            "stored",
            {"optimizer": "adamw", "lr": 1e-3, "swa_lr": 5e-4, "clip_norm": 1.0},
        ),
    ],
)
def test_whatever_a_step_depends_on_is_kept(model, data, change, on, digits, tmp_path, capsys):
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


@pytest.mark.parametrize("engine", ["eager", "fused", "by density"])
def test_killed_at_a_random_moment(engine, tmp_path):
    """SIGKILL to a real process; with --slow many more of them."""
    found = crash(engine, tmp_path, times=1, seed=7)
    assert (len(found.moments), found.equal) == (1, found.ended), found
    assert found.codes == [-signal.SIGKILL]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "fused", "by density"])
@pytest.mark.parametrize(("by", "times"), [(signal.SIGKILL, 8), (signal.SIGTERM, 4), (signal.SIGINT, 4)])
def test_stopped_at_many_random_moments(engine, by, times, tmp_path):
    found = crash(engine, tmp_path, times, seed=int(by), by=by)
    print(f"{engine}, signal {by}: {found}")
    assert len(found.moments) == times
    assert found.equal == found.ended


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(number, error, on, digits, tmp_path, monkeypatch, capsys):
    settings = on("fused")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    with (
        before_steps(lambda trainer, step: signal.raise_signal(number) if step == 13 else None),
        pytest.raises(error) as stopped,
    ):
        fast_swamp(networks.build("dropout"), *digits, **settings | {"progress": True}, run_dir=tmp_path / "cut")
    assert number == signal.SIGINT or stopped.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert "started again with run_dir" in capsys.readouterr().err
    assert RunDirectory(tmp_path / "cut").training_paths()[0].exists()
    with before_steps() as count:
        fast_swamp(networks.build("dropout"), *digits, **settings | {"progress": True}, run_dir=tmp_path / "cut")
    assert count[0] == 21 - 14
    assert "resumed  in cycle 1 of 1, after step 2" in capsys.readouterr().err
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_signals_elsewhere_are_left_alone(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"cycles": 0, "ticket_epochs": 0}
    seen = []
    before = signal.getsignal(signal.SIGINT)

    def look(row):
        seen.append(signal.getsignal(signal.SIGINT) == before)

    fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=look)  # no folder
    thread = threading.Thread(
        target=lambda: fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=look, run_dir=tmp_path / "a")
    )
    thread.start()
    thread.join()
    fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=look, run_dir=tmp_path / "b")
    assert seen == [True, True, False]

    def twice(trainer, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # at once: no checkpoint

    with before_steps(twice), pytest.raises(KeyboardInterrupt):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "c")
    assert not list((tmp_path / "c").glob("training*"))
    assert signal.getsignal(signal.SIGINT) == before
    # While the average is evaluated there is no next step; the cycle is written first.
    monkeypatch.setattr("swamp_fast.driver.reestimate", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "d")
    assert (tmp_path / "d" / "cycle_00.safetensors").exists()


def test_a_model_with_state_of_its_own_has_a_checkpoint_a_cycle(on, digits, tmp_path, capsys):
    class Stateful(networks.Tied):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    settings = on("lanes") | {"checkpoint_minutes": ALWAYS, "cycles": 0, "progress": True}
    look = lambda row: seen.extend(tmp_path.glob("training*"))  # noqa: E731
    seen: list[Path] = []
    fast_swamp(Stateful(), *digits, **settings, on_cycle=look, run_dir=tmp_path)
    assert not seen
    assert "a checkpoint a cycle alone: the model keeps state of its own" in capsys.readouterr().err


def a_folder(path: Path) -> tuple[RunDirectory, Unfinished]:
    """A run's folder with a training under way in it."""
    folder = RunDirectory(path)
    about = {"driver": "fast_swamp", "config": {}, "fingerprints": {}, "engine": {}, "standardise": None, "place": {}}
    folder.create(about, "")
    tensors = {"done": torch.tensor(5), "weights/kept": torch.randn(40), "n": torch.arange(3), "e": torch.zeros(0)}
    return folder, Unfinished(2, {1: 3}, 4.5, tensors)


def test_a_checkpoint_that_is_cut_or_changed_at_any_byte_is_seen(tmp_path):
    folder, state = a_folder(tmp_path)
    folder.write_training(state)
    path = folder.training_paths()[0]
    content = path.read_bytes()
    back = folder.training(path)
    assert (back.cycle, back.dropped, back.seconds, back.steps) == (2, {1: 3}, 4.5, 5)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in state.tensors.items())
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(Damaged, match=r"training.safetensors is damaged"):
            folder.training(path)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"is damaged|is no file of this run|is no checkpoint of swamp_fast"):
            folder.training(path)


def test_the_last_whole_checkpoint_is_used(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS}
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    with before_steps(stop_at(17)), pytest.raises(Interrupted):
        fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
    before = files(tmp_path / "cut")
    expected = {
        ("training.safetensors",): 21 - 17 + 1,
        ("training.safetensors", "training.previous.safetensors"): 9,
        ("cycle_00.safetensors",): 18,
        ("ticket.safetensors",): 3 + 9,
    }
    for damaged, steps in expected.items():
        folder = tmp_path / "-".join(damaged)
        shutil.copytree(tmp_path / "cut", folder)
        for name in damaged:
            (folder / name).write_bytes(before[name][: len(before[name]) // 2])
        with before_steps() as count, pytest.warns(UserWarning, match="is damaged") as told:
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=folder)
        assert count[0] == steps, damaged
        texts = [str(each.message).split(" is damaged")[0] for each in told if " is damaged" in str(each.message)]
        assert texts == [str(folder / name) for name in damaged]
        assert all((folder / f"{name}.damaged").exists() for name in damaged)
        assert same_averages(tmp_path / "whole", folder)


def same_averages(a: Path, b: Path) -> bool:
    for path in (b / "cycle_00.safetensors", b / "cycle_01.safetensors"):
        tensors, other = load_tensors(path)[0], load_tensors(a / path.name)[0]
        assert tensors.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())
    return True


def test_what_follows_a_damaged_cycle_is_trained_again_and_kept(on, digits, tmp_path):
    settings = on("lanes") | {"cycles": 2, "epochs": 1, "keep_particles": True, "run_dir": tmp_path}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    expected = first.state_dict
    (tmp_path / "cycle_01.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="goes on from cycle 1 on"):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert (tmp_path / "cycle_02.safetensors.unused").exists()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict.items())
    (tmp_path / "particles.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="The last cycle is trained again"):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert (tmp_path / "cycle_02.safetensors.unused2").exists()
    assert all(torch.equal(tensor, first.particles[name]) for name, tensor in again.particles.items())


def test_another_runs_training_is_refused(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS}
    for seed in (0, 1):
        with before_steps(stop_at(2)), pytest.raises(Interrupted):
            fast_swamp(networks.build("tied"), *digits, **settings, seed=seed, run_dir=tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "training.safetensors", tmp_path / "0")
    before = files(tmp_path / "0")
    with pytest.raises(ValueError, match=r"training.safetensors is no file of this run: .* Move it away to go on"):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=tmp_path / "0")
    assert files(tmp_path / "0") == before


def test_a_full_disk(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS}
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "whole")
    flush, room = os.fsync, [True]

    def fsync(file):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    def fill(trainer, step):
        room[0] = step < 14

    monkeypatch.setattr("swamp_fast.checkpoint.os.fsync", fsync)
    with before_steps(fill), pytest.raises(OSError, match="No space left") as error:
        fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
    assert error.value.errno == errno.ENOSPC
    assert "training.safetensors can't be written" in str(error.value)
    assert "What the folder held is intact: make room" in str(error.value)
    assert not list((tmp_path / "cut").glob("*.part"))
    for path in RunDirectory(tmp_path / "cut").training_paths():
        load_tensors(path)
    room[0] = True
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def past_the_limit(folder: str) -> None:
    """In a process whose files may have 64 KB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    write(Path(folder) / "small", b"x")
    try:
        save_tensors(Path(folder) / "large", {"a": torch.zeros(1 << 16)})
    except OSError as error:
        raise SystemExit(3 if "large can't be written" in str(error) else 4) from None


def test_a_file_that_can_really_not_grow(tmp_path):
    code = f"import test_durability; test_durability.past_the_limit({str(tmp_path)!r})"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    (tmp_path / "large").write_bytes(b"what was there")
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 3
    assert files(tmp_path) == {"small": b"x", "large": b"what was there"}


@pytest.fixture
def as_nobody():
    """A folder anyone may enter, and, for root, being another user."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chmod(folder, 0o755)
    root = os.geteuid() == 0
    yield folder, (lambda: os.seteuid(65534)) if root else lambda: None
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written(as_nobody, on, digits):
    folder, become_nobody = as_nobody
    settings = on("lanes") | {"cycles": 0, "ticket_epochs": 0}
    fast_swamp(networks.build("tied"), *digits, **settings, run_dir=folder / "run")
    os.chmod(folder / "run", 0o555)
    before = files(folder / "run")
    become_nobody()
    with pytest.raises(OSError, match=r"run can't be written to .*Make it writable, or name another folder"):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=folder / "run")
    with pytest.raises(ValueError, match=r"run_dir .*new can't be made \(.*Permission denied.*name a folder that can"):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=folder / "new")
    with pytest.raises(OSError, match=r"a.json can't be written .*Permission denied.* What the folder held is intact"):
        write(folder / "run" / "a.json", b"x")
    assert files(folder / "run") == before


HOLDER = """
import sys, time
from pathlib import Path
from swamp_fast import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_in_one_folder(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"cycles": 0, "ticket_epochs": 0, "run_dir": tmp_path}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout.readline() == "held\n"
        text = rf"run_dir {tmp_path} is in use: process {process.pid} on .* Wait until it ends, stop it, or name"
        with pytest.raises(ValueError, match=text):
            fast_swamp(networks.build("tied"), *digits, **settings)
        assert list(files(tmp_path)) == ["lock"]
        process.kill()
    nested = []

    def again(row):  # of this process, in its own callback
        with pytest.raises(ValueError, match=rf"is in use: process {os.getpid()} "):
            fast_swamp(networks.build("tied"), *digits, **settings)
        nested.append(row)

    fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=again)  # a killed process's lock is no hindrance
    assert nested
    assert not (tmp_path / "lock").exists()
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    with pytest.warns(UserWarning, match="can't be locked .* see that one process uses it"):
        fast_swamp(networks.build("tied"), *digits, **settings)


def poison(lane: int, at: int):
    """NaN in a particle's weights before a step."""

    def put(trainer, step):
        if step == at and trainer.bank.lanes > lane:
            trainer.bank.weights[lane, 3] = float("nan")

    return put


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lane", [0, 2])
def test_a_particle_that_diverges_touches_no_other(way, lane, on, digits, monkeypatch):
    settings = on(way) | {"particles": 3, "on_divergence": "drop", "keep_particles": True, "val": 0.1}
    model = networks.build("residual")
    whole = fast_swamp(model, *digits, **settings)
    assert [row["dropped"] for row in whole.history] == [[], []]
    late = STEPS + 3 * STEPS + 4  # in the last cycle, in the second epoch
    with before_steps(poison(lane, late)), pytest.warns(UserWarning, match="epoch 2") as told:
        rest = fast_swamp(model, *digits, **settings)
    text = f"cycle 1, epoch 2: particle {lane} diverged to NaN or infinity and is in no average of the cycle."
    assert text in [str(each.message) for each in told]
    assert text == rest.history[1]["warnings"][0]
    row, before = rest.history[1], whole.history[1]
    assert row["dropped"] == [{"lane": lane, "epoch": 2}]
    assert row["particles"] == 3
    left = [each for each in range(3) if each != lane]
    for name in ("particle_accuracy", "train_loss"):
        assert row[name] == [before[name][each] for each in left]
    for name, each in rest.particles.items():
        assert torch.equal(each, whole.particles[name][left]), name
    averaged = {name: each.double().mean(0) for name, each in rest.particles.items() if "weight" in name}
    assert all(torch.allclose(rest.state_dict[name].double(), each, atol=1e-6) for name, each in averaged.items())
    assert all(bool(torch.isfinite(each).all()) for each in rest.state_dict.values())


def test_dropping_is_as_in_the_naive_loop(on, digits):
    """By a transform that now and then spoils a batch, of one particle alone."""

    def spoilt(inputs: Tensor) -> Tensor:
        return inputs * (float("inf") if torch.rand(()) < 0.04 else 1.0)

    settings = on("lanes") | {"particles": 4, "on_divergence": "drop", "precision": "float64", "val": 0.1}
    settings |= {"ticket_epochs": 0, "transform": spoilt, "keep_particles": True, "cycles": 2}
    results = []
    for function in (fast_swamp, naive_swamp):
        with pytest.warns(UserWarning, match="diverged"):
            results.append(function(networks.build("tied"), *digits, **settings))
    fast, naive = results
    dropped = [row["dropped"] for row in fast.history]
    assert dropped == [row["dropped"] for row in naive.history]
    assert any(dropped)
    assert all(torch.equal(mask, naive.masks[name]) for name, mask in fast.masks.items())
    for result, other in ((fast.state_dict, naive.state_dict), (fast.particles, naive.particles)):
        assert all(torch.allclose(tensor, other[name], atol=1e-9) for name, tensor in result.items())
    for row, other in zip(fast.history, naive.history, strict=True):
        for name in ("particle_accuracy", "ensemble_accuracy", "train_loss", "best_accuracy"):
            assert row[name] == pytest.approx(other[name], abs=1e-9)


def test_stopped_by_a_particle_that_diverges(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"particles": 3}
    fatal = poison(1, STEPS + 1)

    def run(**change):
        return fast_swamp(networks.build("tied"), *digits, **settings | change)

    with before_steps(fatal), pytest.raises(FloatingPointError, match="cycle 0, epoch 1: particle 1 diverged") as error:
        run(run_dir=tmp_path / "cut")
    assert "other settings need another run_dir" in str(error.value)
    assert 'on_divergence="drop" goes on without' in str(error.value)
    kept = RunDirectory(tmp_path / "cut").training_paths()[0]
    assert bool(load_tensors(kept)[0]["weights/kept"].isnan().any())
    with before_steps() as count:
        with pytest.raises(FloatingPointError, match="cycle 0, epoch 1: particle 1 diverged"):
            run(run_dir=tmp_path / "cut")
        assert count[0] == 0, "it stops where it stopped"
    with before_steps(fatal), pytest.warns(UserWarning, match="diverged"):
        run(run_dir=tmp_path / "whole", on_divergence="drop")
    with pytest.warns(UserWarning, match="diverged"):
        run(run_dir=tmp_path / "cut", on_divergence="drop")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_where_no_particle_is_left(on, digits, tmp_path, monkeypatch):
    def all_of_them(trainer, step):
        trainer.bank.weights[:, 3] = float("inf")

    settings = on("lanes") | {"particles": 3, "on_divergence": "drop", "run_dir": tmp_path}
    with before_steps(all_of_them), pytest.raises(FloatingPointError, match="ticket, epoch 1: particle 0 diverged"):
        fast_swamp(networks.build("tied"), *digits, **settings)
    with before_steps(all_of_them), pytest.raises(FloatingPointError, match="epoch 1: particles 0, 1, 2 diverged"):
        fast_swamp(networks.build("tied"), *digits, **settings | {"ticket_epochs": 0, "run_dir": None})


def test_a_dropped_particle_stays_dropped_when_resumed(on, digits, tmp_path, monkeypatch):
    settings = on("fused") | {"particles": 3, "on_divergence": "drop", "checkpoint_minutes": ALWAYS}
    spoil = poison(1, STEPS + 1)

    def until(number):
        def act(trainer, step):
            spoil(trainer, step)
            stop_at(number)(trainer, step)

        return act

    def run(name):
        return fast_swamp(networks.build("residual"), *digits, **settings, run_dir=tmp_path / name)

    with before_steps(spoil), pytest.warns(UserWarning, match="diverged"):
        run("whole")
    with before_steps(until(2 * STEPS + 2)), pytest.warns(UserWarning, match="diverged"), pytest.raises(Interrupted):
        run("cut")
    result = run("cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")  # the history's warnings too
    assert result.history[0]["dropped"] == [{"lane": 1, "epoch": 1}]
    assert not result.history[1]["dropped"]


def test_going_on_in_another_place_is_told(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS, "run_dir": tmp_path}
    with before_steps(stop_at(10)), pytest.raises(Interrupted):
        fast_swamp(networks.build("tied"), *digits, **settings)
    about = json.loads((tmp_path / "run.json").read_text())
    elsewhere = {"device": "cuda", "processor": "a GPU", "torch": about["place"]["torch"]}
    (tmp_path / "run.json").write_text(json.dumps({**about, "place": elsewhere}))
    monkeypatch.setattr(engines, "choose", lambda *_: Choice("lanes", True, "chosen anew", {}))
    with before_steps() as count, pytest.warns(UserWarning, match="device was cuda, is cpu") as told:
        result = fast_swamp(networks.build("tied"), *digits, **settings)
    assert "Bits may differ from here on. What the stopwatch chose is measured anew" in str(told[0].message)
    assert result.history[0]["warnings"][0] == str(told[0].message)
    assert count[0] == 21 - 10
    assert result.engine["why"] == "chosen anew"
    after = json.loads((tmp_path / "run.json").read_text())
    assert after["moved"] == [{"cycle": 0, "from": elsewhere, "engine": about["engine"]}]
    assert after["place"] == about["place"]
    (tmp_path / "run.json").write_text(json.dumps({**after, "place": {**after["place"], "threads": 99}}))
    fast_swamp(networks.build("tied"), *digits, **settings)  # finished: it is only read


@pytest.mark.parametrize("reordered", [False, True])
def test_the_state_of_a_bank_is_the_same_for_every_engine(reordered):
    """Also of one whose channels that are left come first, as on CUDA."""
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


def test_the_settings():
    assert SwampConfig().checkpoint_minutes == 5
    with pytest.raises(ValueError, match="`checkpoint_minutes` must be at least 0"):
        SwampConfig(checkpoint_minutes=-1)
    with pytest.raises(ValueError, match='`on_divergence` must be one of "stop", "drop"'):
        SwampConfig(on_divergence="ignore")


class Slow(TensorDataset):
    def __getitem__(self, index):
        time.sleep(0.003)
        return super().__getitem__(index)


def with_workers(folder: str) -> None:
    """A run whose data come from other processes."""
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
def test_a_signal_to_all_processes_lets_the_step_end(number, tmp_path):
    """As a terminal and a batch system send it: what reads the data gets it too."""
    code = f"import test_durability; test_durability.with_workers({str(tmp_path)!r})"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "ticket.safetensors").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1.0)
        os.killpg(process.pid, number)
        error = process.communicate()[1].decode()
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT), error
    assert (tmp_path / "training.safetensors").exists()
