"""Runs tests and measurements on a GPU that is available for minutes only, the most important ones first.

    python -m benchmarks.first_contact --out DIR [--minutes 9] [--visit 1] [--carried FOLDER] [--data cifar10.npz]

Visit 1: a probe (versions, a launch of each kind, a captured graph), the tests of the CUDA kernels, ceilings, a
captured step of ResNet-20 with 8 particles against float64 and timed, microseconds of each of its launches, rivals that
need no compiler, the tests of the fused engine, of capture and of resuming, the bank's ops, an epoch of CIFAR-10.
Visit 2: compiled rivals, the eager engine, WRN-28-2 and VGG-19, 1 to 64 particles, variants of launch bounds, then the
protocol.

Each step is a process with a time limit, and --minutes limits all steps together. If a step fails or hangs, or if no
time is left for it, the report says so, and the next step starts. DIR gets steps.md and results.tgz after each step; at
the end caches.tgz with everything that was compiled on the GPU machine; and in visit 2 protocol.zip, for
`benchmarks.protocol --import`. The last lines say what to fix first. The exit status is 1 if anything must be fixed.

The GPU machine needs torch, Triton, NumPy, safetensors, Jinja2, MarkupSafe and pytest. Without hypothesis some tests of
ops fail, without scikit-learn some tests of capture, and without Pillow the epoch. To save most of the compiling there,
compile in advance on a machine without a GPU, with the same versions of Python, torch and Triton. For Python 3.12 and
an H100 or H200, and with the JPEG copy of CIFAR-10 and the script that decodes it:

    python3.12 -m benchmarks.machine_code --arch sm_90 --fill .first_contact --python python3.12
    cp -r FOLDER .first_contact/data  # FOLDER holds cifar10_jpeg.npz and decode_cifar10.py

This compiles for ResNet-20 in bfloat16 and any number of particles. For visit 2, repeat it with `--model wrn28_2
vgg19`. Copy this tree, including .first_contact, which git ignores, to any place on the GPU machine, and run there

    python3 -m benchmarks.first_contact --out DIR

For visit 2, first unpack the caches.tgz of visit 1 into .first_contact, then add `--visit 2`. If there was a visit 2
before, copy its protocol.zip into .first_contact too, and the protocol continues from it. --data replaces
.first_contact/data.

--rehearse runs each step on the CPU at a tiny size, and says which steps need a GPU. Its measurements mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import sysconfig
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from benchmarks.children import Child, Visit, pytest_command

ROOT = Path(__file__).parents[1]  # benchmarks.measuring has it too, but imports torch
CARRIED = ROOT / ".first_contact"
MAPPED = {"kernels": Path("..", "kernels"), "cuda_sources": Path("..", "csrc", "cuda")}  # as in pyproject.toml
OPS = ("clip_scale", "gather_augment", "global_threshold", "masked_adamw", "masked_sgd", "particle_mean", "philox")
NOT_CARRIED = {".source", ".ttir", ".ttgir", ".llir", ".ptx"}  # intermediate files of Triton's cache
MAX_CACHE_BYTES = 15_000_000  # a larger caches.tgz is not kept


def children(
    visit: int, work: Path, out: Path, rehearse: bool, data: Path | None = None, carried: Path = CARRIED
) -> list[Child]:
    """Return the steps of a visit in order.

    work  the folder that is packed; the protocol has another folder, which is too large and is exported instead
    """

    def slice_(name: str, seconds: float) -> Child:
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(work / "gpu"), "--only", name]
        command += ["--rehearse"] if rehearse else []
        command += ["--data", str(data)] if data is not None else []
        return Child(name, seconds, command)

    def tests(name: str, seconds: float, *options: str, tiny: str = "") -> Child:
        return Child(name, seconds, pytest_command(*options, *(["-k", tiny] if rehearse and tiny else [])), True)

    if visit == 1:
        probe = [sys.executable, "-m", "benchmarks.gpu_probe", *(["--rehearse"] if rehearse else [])]
        names = ("engines/test_capture", "runs/test_interruption", "engines/test_optimizers")
        on_gpu = [f"tests/{name}.py" for name in names]
        return [
            Child("probe", 60, probe),
            tests(
                "cuda_kernels",
                90,
                "tests/engines/fused/test_cuda_kernels.py",
                tiny="test_a_constant_channel or test_every_size",
            ),
            slice_("ceilings", 30),
            slice_("step", 120),
            slice_("profile", 75),
            slice_("light", 75),
            tests(
                "fused_engine",
                110,
                "tests/engines/fused/test_fused_cuda.py",
                tiny="test_cross_entropy or test_lanes_in_cache",
            ),
            tests("capture_and_resume", 75, "-m", "gpu", *on_gpu),
            slice_("bank", 40),
            tests("ops", 80, "-m", "gpu", *(f"tests/ops/test_{name}.py" for name in OPS)),
            slice_("epoch", 75),
        ]
    protocol = [sys.executable, "-m", "benchmarks.protocol", "--out", str(work.with_name("protocol"))]
    protocol += ["--rehearse"] if rehearse else ["--seeds-at-once", "1"]
    protocol += ["--data", str(data)] if data is not None else []
    state = carried / "protocol.zip"
    a_slice = ["--budget-minutes", "{minutes}", "--only", "cost", "runs", "analysis"]
    a_slice += ["--import", str(state)] if state.exists() else []
    return [
        slice_("compiled", 150),
        slice_("eager", 90),
        slice_("networks", 120),
        slice_("scale", 90),
        slice_("variants", 60),
        Child("protocol", 60 if rehearse else 480, [*protocol, *a_slice], leaves=35),
        Child("protocol_export", 30, [*protocol, "--export", str(out / "protocol.zip")]),
    ]


def put_in_place(carried: Path) -> dict[str, str]:
    """Make this tree usable without installation, with the carried files. Return the environment for children."""
    if _installed_from() != ROOT:
        for name, target in MAPPED.items():
            link = ROOT / "swamp_fast" / name
            if not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(target)
    extension = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if (carried / extension).exists() and not (ROOT / "swamp_fast" / extension).exists():
        shutil.copy(carried / extension, ROOT / "swamp_fast")
    if (carried / ".commit").exists() and not (ROOT / ".git").exists():
        shutil.copy(carried / ".commit", ROOT)
    relocate(carried / "triton")
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(carried / "triton")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return environment | {"SWAMP_FAST_CACHE": str(carried / "cubins"), "PYTHONPATH": path}


def _installed_from() -> Path | None:
    """Return the tree that an editable install of the package points to, if there is one."""
    try:
        about = json.loads(distribution("swamp-fast").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    return Path(about.get("url", "").removeprefix("file://")) if about.get("dir_info", {}).get("editable") else None


def relocate(cache: Path) -> None:
    """Repair a Triton cache that was copied from another path, perhaps without some of its files.

    The group file of a kernel lists its files by absolute paths, and Triton recompiles the kernel if one is missing.
    """
    for path in cache.glob("*/__grp__*.json"):
        group = json.loads(path.read_text())
        moved = {name: path.parent / Path(member).name for name, member in group["child_paths"].items()}
        members = {name: str(member) for name, member in moved.items() if member.exists()}
        if members != group["child_paths"]:
            path.write_text(json.dumps({**group, "child_paths": members}))


def pack_caches(carried: Path, before: set[Path], to: Path) -> None:
    """Archive the compiled files that are not in `before`. They go into the folder that the next visit carries."""
    new = sorted((path for path in _compiled(carried) if path not in before), key=lambda path: path.stat().st_size)
    packed = 0
    with tarfile.open(to, "w:gz", compresslevel=6) as archive:
        for path in new:
            if to.stat().st_size + path.stat().st_size > MAX_CACHE_BYTES:
                break
            archive.add(path, path.relative_to(carried))
            packed += 1
    print(f"\n{packed} of {len(new)} compiled files are packed, {to.stat().st_size / 1e6:.1f} MB", flush=True)
    if not packed:
        to.unlink()


def _compiled(carried: Path) -> set[Path]:
    files = (path for part in ("triton", "cubins") for path in (carried / part).rglob("*") if path.is_file())
    return {path for path in files if path.suffix not in NOT_CARRIED}


def main(arguments: list[str] | None = None) -> int:
    """Run a visit. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of all steps together, default 9")
    parser.add_argument("--visit", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--carried", type=Path, default=CARRIED, metavar="FOLDER", help="the carried folder, default .first_contact"
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz")
    parser.add_argument("--rehearse", action="store_true", help="run a tiny version on the CPU, to try the command")
    given = parser.parse_args(arguments)
    carried, out = given.carried.resolve(), given.out.resolve()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    environment = put_in_place(carried)
    before = _compiled(carried)
    title = f"First contact, visit {given.visit}" + ", rehearsed on a CPU: the numbers mean nothing" * given.rehearse
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "results"
        visit = Visit(out, work, 60 * given.minutes, environment, ROOT, title)
        data = None if given.data is None else given.data.resolve()
        visit.run(children(given.visit, work, out, given.rehearse, data, carried))
        try:
            pack_caches(carried, before, out / "caches.tgz")
        except OSError as error:
            print(f"the compiled files were not packed: {error}", flush=True)
        return 0 if visit.conclude() else 1


if __name__ == "__main__":
    sys.exit(main())
