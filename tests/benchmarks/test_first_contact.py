"""benchmarks.first_contact: steps that pass, fail, hang or have no time left, and the files packed after each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from paths import ROOT

from benchmarks import children as module
from benchmarks import first_contact, measuring
from benchmarks.bench import Bench
from benchmarks.children import Child, Visit
from benchmarks.launches import table
from benchmarks.steps import errors
from swamp_fast.engines.fused.cpu.runner import CpuLanes


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def hanging(folder: Path) -> list[str]:
    """Return a command that hangs. It starts a child that ignores SIGTERM, and writes the child's pid to a file."""
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    return python(
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        f"pathlib.Path({str(folder)!r}, 'grandchild').write_text(str(child.pid))\n"
        "print('about to hang')\n"
        "time.sleep(60)"
    )


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def visit_of(tmp_path: Path, seconds: float) -> Visit:
    return Visit(tmp_path / "out", tmp_path / "work", seconds, os.environ, tmp_path, "A visit")


def archived(visit: Visit) -> set[str]:
    with tarfile.open(visit.out / "results.tgz") as archive:
        return {Path(name).name for name in archive.getnames()} - {"results"}


def test_children_that_pass_fail_hang_and_come_too_late(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(module, "PACKING_SECONDS", 0.0)
    monkeypatch.setattr(module, "MIN_SECONDS", 2.0)
    visit, packed = visit_of(tmp_path, 6), []
    pack = visit.pack
    monkeypatch.setattr(visit, "pack", lambda: (pack(), packed.append(archived(visit))))
    steps = [
        Child("passes", 5, python("print('fine')")),
        Child("fails", 5, python("print('first'); raise SystemExit('why it failed')")),
        Child("hangs", 2, hanging(tmp_path)),
        Child("goes on", 5, python("print('still here')")),
        Child("uses it up", 60, python("import time; time.sleep(60)")),
        Child("comes too late", 1, python("open('never', 'w')")),
    ]
    began = time.monotonic()
    visit.run(steps)
    assert time.monotonic() - began < 15
    assert [(row.name, row.result.split(" after")[0]) for row in visit.rows] == [
        ("passes", "passed"),
        ("fails", "failed, exit code 1"),
        ("hangs", "killed"),
        ("goes on", "passed"),
        ("uses it up", "killed"),
        ("comes too late", "skipped, too late"),
    ]
    assert [row.last_line for row in visit.rows] == ["fine", "why it failed", "about to hang", "still here", "", ""]
    assert visit.rows[2].seconds < 4
    assert not is_running(int((tmp_path / "grandchild").read_text()))
    assert not (tmp_path / "never").exists()
    names = [f"{step.name}.log" for step in steps[:5]]
    assert packed == [set(names[: count + 1]) for count in range(5)] + [set(names)]  # after each step
    assert {path.name for path in visit.out.iterdir()} == {"results.tgz", "steps.md"}
    text = (visit.out / "steps.md").read_text()
    assert "| fails | failed, exit code 1 | 0 | why it failed |" in text
    assert "To fix first: fails (failed, exit code 1); then hangs, uses it up." in text
    capsys.readouterr()
    assert not visit.conclude()
    last = capsys.readouterr().out.strip().splitlines()
    assert last[-3].startswith("2 of 6 steps went well; no time was left for comes too late. To fix first: fails")
    assert last[-2:] == ["first", "why it failed"]


def test_a_long_child_leaves_time_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKING_SECONDS", 0.0)
    monkeypatch.setattr(module, "MIN_SECONDS", 1.0)
    visit = visit_of(tmp_path, 9)
    sleeps = python("import time; time.sleep(60)")
    visit.run(
        [
            Child("long", 60, sleeps, leaves=7),
            Child("next", 7, python("print('there')")),
            Child("late", 9, sleeps, leaves=9),
        ]
    )
    assert [row.result for row in visit.rows] == ["killed after 2 s", "passed", "skipped, too late"]


def test_when_all_goes_well(tmp_path, capsys):
    visit = visit_of(tmp_path, 60)
    visit.run([Child("passes", 20, python("print('fine')"))])
    assert visit.conclude()
    assert capsys.readouterr().out.strip().splitlines()[-1] == "1 of 1 steps went well. Nothing to fix."


@pytest.mark.parametrize(
    ("last_line", "result"),
    [
        ("3 passed, 2 skipped in 1.0s", "passed"),
        ("7 skipped, 5 deselected in 0.1s", "needs a GPU"),
        ("no tests ran in 0.01s", "failed, no test ran"),
    ],
)
def test_a_test_run_without_tests_has_not_passed(last_line, result, tmp_path):
    visit = visit_of(tmp_path, 60)
    visit.run([Child("tests", 20, python(f"print({last_line!r})"), tests=True)])
    assert visit.rows[0].result == result


def test_a_child_can_report_that_it_needs_a_gpu_and_learns_its_minutes(tmp_path):
    visit = visit_of(tmp_path, 600)
    code = "import sys; print('needs a GPU:', sys.argv[1])"
    visit.run([Child("needs", 60, [*python(code), "{minutes}"])])
    assert (visit.rows[0].result, visit.rows[0].last_line) == ("needs a GPU", "needs a GPU: 0.90")


def test_a_signal_ends_the_child_and_leaves_the_results(tmp_path):
    """A machine whose time ends early sends such a signal."""
    code = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.children import Child, Visit
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
visit = Visit(pathlib.Path("out"), pathlib.Path("work"), 60, os.environ, ".", "A visit")
visit.run([Child("hangs", 50, {hanging(tmp_path)!r})])
"""
    process = subprocess.Popen(python(code), cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "grandchild").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
    assert "| hangs | stopped by a signal |" in (tmp_path / "out" / "steps.md").read_text()
    assert not is_running(int((tmp_path / "grandchild").read_text()))


def test_the_steps_in_their_order(tmp_path):
    first, second = (first_contact.children(visit, tmp_path, tmp_path, False) for visit in (1, 2))
    assert [child.name for child in first] == [
        *("probe", "cuda_kernels", "ceilings", "step", "profile", "light", "fused_engine", "capture_and_resume"),
        *("bank", "ops", "epoch"),
    ]
    assert [child.name for child in second] == [
        *("compiled", "eager", "networks", "scale", "variants", "protocol", "protocol_export"),
    ]
    named = {part for child in first for part in child.command if part.startswith("tests/")}
    assert all((ROOT / name).exists() for name in named)
    assert len(named) == 5 + len(first_contact.OPS)


def test_a_tree_is_put_in_place_once(tmp_path, monkeypatch):
    """A copy of the tree works without installation, with the extension and the cache that were carried along."""
    root, carried = tmp_path / "tree", tmp_path / "carried"
    for folder in (root / "swamp_fast", root / "kernels", root / "csrc" / "cuda", carried / "triton" / "KEY"):
        folder.mkdir(parents=True)
    (root / "kernels" / "__init__.py").touch()
    extension = f"_C{first_contact.sysconfig.get_config_var('EXT_SUFFIX')}"
    (carried / extension).write_text("built")
    (carried / ".commit").write_text("abc1234\n")
    group = carried / "triton" / "KEY" / "__grp__kernel.json"
    (group.parent / "kernel.cubin").touch()
    members = {name: f"/elsewhere/triton/KEY/{name}" for name in ("kernel.cubin", "kernel.ptx")}
    group.write_text(json.dumps({"child_paths": members}))
    monkeypatch.setattr(first_contact, "ROOT", root)
    for _ in range(2):
        environment = first_contact.put_in_place(carried)
    assert (root / "swamp_fast" / "kernels" / "__init__.py").exists()
    assert (root / "swamp_fast" / "cuda_sources").resolve() == root / "csrc" / "cuda"
    assert (root / "swamp_fast" / extension).read_text() == "built"
    assert (root / ".commit").read_text() == "abc1234\n"
    assert json.loads(group.read_text())["child_paths"] == {"kernel.cubin": str(group.parent / "kernel.cubin")}
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(root)
    assert environment["TRITON_CACHE_DIR"] == str(carried / "triton")


def test_what_was_compiled_there_is_brought_back(tmp_path):
    (tmp_path / "triton" / "OLD").mkdir(parents=True)
    (tmp_path / "triton" / "OLD" / "kernel.cubin").touch()
    before = first_contact._compiled(tmp_path)
    first_contact.pack_caches(tmp_path, before, tmp_path / "caches.tgz")
    assert not (tmp_path / "caches.tgz").exists()
    (tmp_path / "cubins").mkdir()
    (tmp_path / "cubins" / "new.cubin").touch()
    first_contact.pack_caches(tmp_path, before, tmp_path / "caches.tgz")
    with tarfile.open(tmp_path / "caches.tgz") as archive:
        assert archive.getnames() == ["cubins/new.cubin"]


def test_of_too_many_compiled_files_the_smallest_are_brought_back(tmp_path, monkeypatch):
    (tmp_path / "cubins").mkdir()
    for size in (10, 5000, 20):
        (tmp_path / "cubins" / f"{size}.cubin").write_bytes(b"0" * size)
    monkeypatch.setattr(first_contact, "MAX_CACHE_BYTES", 1000)
    first_contact.pack_caches(tmp_path, set(), tmp_path / "caches.tgz")
    with tarfile.open(tmp_path / "caches.tgz") as archive:
        assert archive.getnames() == ["cubins/10.cubin", "cubins/20.cubin"]


def test_a_command_that_is_missing_is_a_row_and_a_summary_may_be_followed_by_other_lines(tmp_path):
    visit = Visit(tmp_path / "out", tmp_path / "work", 60, os.environ, tmp_path, "a visit")
    passed = Child("late line", 20, [sys.executable, "-c", "print('3 passed in 1 s'); print('bye')"], True)
    visit.run([Child("missing", 20, [str(tmp_path / "nothing")]), passed])
    assert [row.result.partition(":")[0] for row in visit.rows] == ["failed to start", "passed"]


def test_a_copy_without_git_knows_its_commit(tmp_path, monkeypatch):
    """The commit is found, even if the copy lies inside another repository."""
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(measuring, "ROOT", copy)
    assert measuring.commit() == "unknown"
    (copy / ".commit").write_text("abc1234 and uncommitted changes\n")
    assert measuring.commit() == "abc1234 and uncommitted changes"
    monkeypatch.setenv("PATH", "")
    assert measuring.commit() == "abc1234 and uncommitted changes"


def test_contenders_are_kept_apart(tmp_path):
    """A contender that can't be built, or fails later, becomes a row; the others are timed, and all tables written."""
    bench, calls = Bench(tmp_path, None, rehearse=True), []

    def fails():
        raise ValueError("as it does\nwith details")

    def breaks():
        calls.append(1)
        if len(calls) > 4:  # in the turns with the others
            raise RuntimeError("late")

    written = []
    contenders = {
        "good": (1, lambda: lambda: time.sleep(0.002)),
        "bad": (2, fails),
        "late": (2, lambda: breaks),
        "last": (4, lambda: lambda: time.sleep(0.001)),
    }
    write = bench.write
    bench.write = lambda slice_, table, **more: (
        written.append([row[""] for row in table]),
        write(slice_, table, **more),
    )
    with pytest.raises(RuntimeError, match=r"bad failed: ValueError: as it does; late failed: RuntimeError: late"):
        bench.steps("made_up", contenders, "good")
    assert written == [["good"], ["good", "bad"], ["good", "bad", "late"], [*contenders], [*contenders]]
    rows = {row[""]: row for row in json.loads((tmp_path / "gpu_made_up_cpu.json").read_text())["table"]}
    assert rows["bad"]["ms a particle-step"] == "failed: ValueError: as it does"
    assert rows["late"]["ms a particle-step"] == "failed: RuntimeError: late"
    assert rows["good"]["this / good"] == 1.0
    assert 0.2 < rows["last"]["ms a particle-step"] < rows["good"]["ms a particle-step"]


def test_a_network_is_planned_and_checked_once(tmp_path, monkeypatch):
    bench, seen = Bench(tmp_path, None, rehearse=True), []
    check = bench._check
    monkeypatch.setattr(bench, "_check", lambda problem: (seen.append(problem), check(problem))[1])
    for particles in (1, 2, 1):
        engine, problem = bench.engine("small_cnn", particles)
        assert (engine.plan is bench.checked["small_cnn"][0], problem.config.particles) == (True, particles)
    assert len(seen) == 1
    monkeypatch.setattr(bench, "_check", lambda problem: (seen.append(problem), "it is not covered")[1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it is not covered"):
            bench.engine("mlp", 1)
    assert len(seen) == 2


def test_a_wrong_step_gets_no_time(tmp_path, monkeypatch):
    """A step is not timed if its gradients differ from those of autograd in float64."""
    bench = Bench(tmp_path, None, rehearse=True)
    engine, problem = bench.engine("small_cnn", 2)
    report = errors(engine, problem, 2)
    assert 0 < report["gradients, error"] < 2 * report["gradients, autograd's error"]
    backward = CpuLanes.backward

    def doubled(self, batch, step_keys):
        losses = backward(self, batch, step_keys)
        self.grads[1].mul_(2)
        return losses

    monkeypatch.setattr(CpuLanes, "backward", doubled)
    with pytest.raises(RuntimeError, match="the gradients of a step have a relative error of 1 against float64"):
        errors(engine, problem, 2)


def test_launches_are_summed_by_kernel_and_grid():
    def event(name: str, grid: list[int], ts: float, dur: float) -> dict[str, object]:
        return {"name": name, "ts": ts, "dur": dur, "args": {"grid": grid, "registers per thread": 40}}

    events = [event("norm", [8, 1, 1], 0, 4), event("norm", [4, 1, 1], 4, 1), event("norm", [8, 1, 1], 10, 6)]
    rows, sums = table([*events, {"name": "Memset", "ts": 16, "dur": 4}], 2)
    assert [(row["kernel"], row["grid"], row["us a launch"], row["us a step"]) for row in rows] == [
        ("norm", "8x1x1", 5.0, 5.0),
        ("Memset", "", 4.0, 2.0),
        ("norm", "4x1x1", 1.0, 0.5),
    ]
    assert rows[0]["registers"] == 40
    assert sums == {"launches": 2.0, "us_a_step": 7.5, "busy": "75%"}
    with pytest.raises(RuntimeError, match="recorded no launch"):
        table([], 2)
