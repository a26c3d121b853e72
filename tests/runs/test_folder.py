"""A run's folder: files that can't be written or read are reported, and no checkpoint is lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import networks
import pytest
import torch
from paths import ROOT
from stops import ALWAYS, Interrupted, before_steps, files, stop_at

from benchmarks.durability import same_bits
from swamp_fast import SwampConfig, fast_swamp
from swamp_fast.runs import lock
from swamp_fast.runs.files import Damaged, load_tensors, save_tensors, write
from swamp_fast.runs.folder import RunDirectory, Unfinished


def a_folder(path: Path) -> tuple[RunDirectory, Unfinished]:
    """Create a run's folder. Returns it and the state of an unfinished training, which is not written yet."""
    folder = RunDirectory(path)
    about = {"driver": "fast_swamp", "config": {}, "fingerprints": {}, "engine": {}, "standardise": None, "place": {}}
    folder.create(about, "")
    tensors = {"done": torch.tensor(5), "weights/kept": torch.randn(40), "n": torch.arange(3), "e": torch.zeros(0)}
    return folder, Unfinished(2, {1: 3}, 4.5, tensors)


def test_a_checkpoint_cut_or_changed_at_any_byte_is_rejected(tmp_path):
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
        with pytest.raises(
            ValueError, match=r"is damaged|doesn't belong to this run|is not a checkpoint of swamp_fast"
        ):
            folder.training(path)


def test_the_last_whole_checkpoint_is_used(on, digits, tmp_path):
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
        with before_steps() as count, pytest.warns(UserWarning, match="is damaged") as warned:
            fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=folder)
        assert count[0] == steps, damaged
        texts = [
            str(warning.message).split(" is damaged")[0] for warning in warned if " is damaged" in str(warning.message)
        ]
        assert texts == [str(folder / name) for name in damaged]
        assert all((folder / f"{name}.damaged").exists() for name in damaged)
        assert same_averages(tmp_path / "whole", folder)


def same_averages(a: Path, b: Path) -> bool:
    for path in (b / "cycle_00.safetensors", b / "cycle_01.safetensors"):
        tensors, other = load_tensors(path)[0], load_tensors(a / path.name)[0]
        assert tensors.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in tensors.items())
    return True


def test_cycles_after_a_damaged_one_are_kept_aside_and_trained_again(on, digits, tmp_path):
    settings = on("lanes") | {"cycles": 2, "epochs": 1, "keep_particles": True, "run_dir": tmp_path}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    expected = first.state_dict
    (tmp_path / "cycle_01.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="continues with cycle 1"):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert (tmp_path / "cycle_02.safetensors.unused").exists()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict.items())
    (tmp_path / "particles.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="The last cycle is computed again"):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert (tmp_path / "cycle_02.safetensors.unused2").exists()
    assert all(torch.equal(tensor, first.particles[name]) for name, tensor in again.particles.items())


def test_another_runs_training_is_refused(on, digits, tmp_path):
    settings = on("lanes") | {"checkpoint_minutes": ALWAYS}
    for seed in (0, 1):
        with before_steps(stop_at(2)), pytest.raises(Interrupted):
            fast_swamp(networks.build("tied"), *digits, **settings, seed=seed, run_dir=tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "training.safetensors", tmp_path / "0")
    before = files(tmp_path / "0")
    with pytest.raises(ValueError, match=r"training.safetensors doesn't belong to this run: .* to continue"):
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

    monkeypatch.setattr("swamp_fast.runs.files.os.fsync", fsync)
    with before_steps(fill), pytest.raises(OSError, match="No space left") as error:
        fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
    assert error.value.errno == errno.ENOSPC
    assert "training.safetensors can't be written" in str(error.value)
    assert "The folder's earlier content is intact: free some space" in str(error.value)
    assert not list((tmp_path / "cut").glob("*.part"))
    for path in RunDirectory(tmp_path / "cut").training_paths():
        load_tensors(path)
    room[0] = True
    fast_swamp(networks.build("dropout"), *digits, **settings, run_dir=tmp_path / "cut")
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def past_the_limit(folder: str) -> None:
    """Write a file that exceeds the process's limit of 64 KB per file, which fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    write(Path(folder) / "small", b"x")
    try:
        save_tensors(Path(folder) / "large", {"a": torch.zeros(1 << 16)})
    except OSError as error:
        raise SystemExit(3 if "large can't be written" in str(error) else 4) from None


def test_a_file_that_the_system_lets_not_grow(tmp_path):
    code = f"import test_folder; test_folder.past_the_limit({str(tmp_path)!r})"
    paths = [str(Path(__file__).parent), str(ROOT / "tests" / "support"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    (tmp_path / "large").write_bytes(b"what was there")
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 3
    assert files(tmp_path) == {"small": b"x", "large": b"what was there"}


@pytest.fixture
def as_nobody():
    """Yield a folder that any user may enter, and a function that turns root into an unprivileged user."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chmod(folder, 0o755)
    root = os.geteuid() == 0
    yield folder, (lambda: os.seteuid(65534)) if root else lambda: None
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_read_only_folder(as_nobody, on, digits):
    folder, become_nobody = as_nobody
    settings = on("lanes") | {"cycles": 0, "ticket_epochs": 0}
    fast_swamp(networks.build("tied"), *digits, **settings, run_dir=folder / "run")
    os.chmod(folder / "run", 0o555)
    before = files(folder / "run")
    become_nobody()
    with pytest.raises(OSError, match=r"run can't be written to .*Make it writable, or name another folder"):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=folder / "run")
    with pytest.raises(ValueError, match=r"run_dir .*new can't be made \(.*Permission denied.*name another folder"):
        fast_swamp(networks.build("tied"), *digits, **settings, run_dir=folder / "new")
    with pytest.raises(OSError, match=r"a.json can't be written .*Permission denied.* The folder's earlier content is"):
        write(folder / "run" / "a.json", b"x")
    assert files(folder / "run") == before


def test_a_folder_that_may_not_be_entered(as_nobody, on, digits):
    folder, become_nobody = as_nobody
    (folder / "closed").mkdir(mode=0o700)
    become_nobody()
    with pytest.raises(ValueError, match=r"run_dir .*closed/run can't be made .*name another folder"):
        fast_swamp(networks.build("tied"), *digits, **on("lanes"), run_dir=folder / "closed" / "run")


@pytest.mark.parametrize("name", ["config.toml", "history.jsonl", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"{name} can't be written .* A folder has this name: move it away"):
        write(tmp_path / name, b"x")
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError, match="can't be written .* Its folder was moved or deleted during the run"):
        write(tmp_path / "gone" / "run.json", b"x")


HOLDER = """
import sys, time
from pathlib import Path
from swamp_fast.runs import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_in_one_folder(on, digits, tmp_path, monkeypatch):
    settings = on("lanes") | {"cycles": 0, "ticket_epochs": 0, "run_dir": tmp_path}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout.readline() == "held\n"
        text = rf"{tmp_path} is in use by process {process.pid} on .* Wait until it ends, stop it, or name"
        with pytest.raises(ValueError, match=text):
            fast_swamp(networks.build("tied"), *digits, **settings)
        assert list(files(tmp_path)) == ["lock"]
        process.kill()
    nested = []

    def again(row):  # a second run in the same process, started by the first run's callback
        with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} "):
            fast_swamp(networks.build("tied"), *digits, **settings)
        nested.append(row)

    # The lock of the process that was killed above no longer holds.
    fast_swamp(networks.build("tied"), *digits, **settings, on_cycle=again)
    assert nested
    assert not (tmp_path / "lock").exists()
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    with pytest.warns(UserWarning, match="can't be locked .* make sure that only one process uses it"):
        fast_swamp(networks.build("tied"), *digits, **settings)


def test_the_settings():
    assert SwampConfig().checkpoint_minutes == 5
    with pytest.raises(ValueError, match="`checkpoint_minutes` must be at least 0"):
        SwampConfig(checkpoint_minutes=-1)
    with pytest.raises(ValueError, match='`on_divergence` must be one of "stop", "drop"'):
        SwampConfig(on_divergence="ignore")


def test_a_file_that_cannot_be_read_stops_the_run_and_stays(as_nobody, on, digits):
    """Only a file with other content than was written is damaged."""
    folder, become_nobody = as_nobody
    settings = on("lanes") | {"ticket_epochs": 0, "run_dir": folder / "run"}
    fast_swamp(networks.build("tied"), *digits, **settings)
    for path in [folder / "run", *(folder / "run").iterdir()]:
        os.chown(path, 65534, 65534)
    before = files(folder / "run")
    os.chmod(folder / "run" / "cycle_00.safetensors", 0)
    become_nobody()
    with pytest.raises(OSError, match=r"cycle_00.safetensors can't be read .*Permission denied.* Nothing was changed"):
        fast_swamp(networks.build("tied"), *digits, **settings)
    os.seteuid(0)
    assert files(folder / "run") == before


def test_a_link_to_a_missing_file_is_not_a_missing_file(on, digits, tmp_path):
    settings = on("lanes") | {"ticket_epochs": 0, "run_dir": tmp_path}
    fast_swamp(networks.build("tied"), *digits, **settings)
    for name in ("ticket", "cycle_01"):
        path = tmp_path / f"{name}.safetensors"
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match=rf"{name}.safetensors can't be read"):
            fast_swamp(networks.build("tied"), *digits, **settings)
        path.unlink()
        path.write_bytes(content)


def test_links_in_a_foreign_folder_lead_nowhere(tmp_path):
    mine, foreign = tmp_path / "mine", tmp_path / "foreign"
    mine.write_bytes(b"mine")
    foreign.mkdir()
    (foreign / "run.json.part").symlink_to(mine)
    (foreign / "lock").symlink_to(mine)
    write(foreign / "run.json", b"new")
    with pytest.raises(OSError, match="can't be written to"), lock.locked(foreign):
        pass
    assert mine.read_bytes() == b"mine"
    assert not (foreign / "run.json").is_symlink()


def test_every_file_says_what_it_is(on, digits, tmp_path):
    settings = on("lanes") | {"ticket_epochs": 0, "keep_particles": True}
    for seed in (0, 1):
        fast_swamp(networks.build("tied"), *digits, **settings, seed=seed, run_dir=tmp_path / str(seed))
    run, other = tmp_path / "0", tmp_path / "1"
    for path in run.glob("*.safetensors"):
        metadata = load_tensors(path)[1]
        assert {"run", "kind", "cycle", "checksum"} <= set(metadata), path
    for source, target, text in (
        (other / "particles.safetensors", "particles.safetensors", "doesn't belong to this run"),
        (run / "model.safetensors", "particles.safetensors", 'should hold "particles", but holds "model"'),
        (run / "cycle_01.safetensors", "ticket.safetensors", 'should hold "ticket", but holds "cycle"'),
    ):
        content = (run / target).read_bytes()
        shutil.copy(source, run / target)
        with pytest.raises(ValueError, match=text):
            fast_swamp(networks.build("tied"), *digits, **settings, seed=0, run_dir=run)
        (run / target).write_bytes(content)


def test_cycles_after_a_missing_one_are_not_believed(on, digits, tmp_path):
    settings = on("lanes") | {"cycles": 3, "epochs": 1, "prune": 0.3, "run_dir": tmp_path}
    first = fast_swamp(networks.build("tied"), *digits, **settings)
    (tmp_path / "cycle_01.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"cycle_01.safetensors is missing; later cycles were renamed"):
        again = fast_swamp(networks.build("tied"), *digits, **settings)
    assert again == first
    assert (tmp_path / "cycle_03.safetensors.unused").exists()


def test_a_checkpoint_left_after_the_last_cycle_is_removed(on, digits, tmp_path):
    settings = on("lanes") | {"run_dir": tmp_path}
    fast_swamp(networks.build("tied"), *digits, **settings)
    shutil.copy(tmp_path / "cycle_01.safetensors", tmp_path / "training.safetensors")
    fast_swamp(networks.build("tied"), *digits, **settings)
    assert not (tmp_path / "training.safetensors").exists()


FORKING = """
import os, sys, time
from pathlib import Path
from swamp_fast.runs import lock
with lock.locked(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("forked", flush=True)
    time.sleep(60)
"""


def test_the_children_of_a_dead_process_hold_no_lock(tmp_path):
    """A DataLoader's workers outlive a killed process for some seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, process_group=0) as process:
        assert process.stdout.readline() == "forked\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            with lock.locked(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
