"""Compiling without a GPU: another process, in a tree at another path, finds everything in the caches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

from benchmarks.first_contact import MAPPED

TREE = ("swamp_fast", "kernels", "csrc/cuda", "benchmarks")
CODE = """
import sys
import swamp_fast.kernels
from benchmarks import machine_code
print(swamp_fast.__file__, swamp_fast.kernels.__file__, sep="\\n")
sys.argv += ["--particles", "3", "--batch", "16"]
machine_code.main()
"""


def filled(tree, folder, model, precision) -> dict[str, int]:
    """Fill a folder, running the code in `tree`. Return how many kernels were compiled and how many were found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", CODE, "--fill", str(folder), "--model", model, "--precision", precision]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    package, kernels, counts = done.stdout.splitlines()
    assert package.startswith(str(tree))
    assert kernels.startswith(str(tree))
    return json.loads(counts)


def files_in(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model", "precision", "cubins"),
    [("mlp", "float32", 0), pytest.param("small_cnn", "bfloat16", 4, marks=pytest.mark.slow)],
)
def test_another_process_finds_all_of_it_from_another_path(model, precision, cubins, tmp_path):
    """The folder is moved too, because Triton's group files name their members by absolute paths."""
    made, moved, copy = tmp_path / "made", tmp_path / "moved" / "there", tmp_path / "copy"
    first = filled(ROOT, made, model, precision)
    assert first["triton_compiled"] > 30
    assert first["cubins_compiled"] >= cubins
    assert first["triton_found"] == first["cubins_found"] == 0
    for part in TREE:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "results", *MAPPED))
    for name, target in MAPPED.items():
        (copy / "swamp_fast" / name).symlink_to(target)
    moved.parent.mkdir()
    made.rename(moved)
    compiled = {name: time for name, time in files_in(moved).items() if name.suffix == ".cubin"}
    second = filled(copy, moved, model, precision)
    assert second["triton_compiled"] == second["cubins_compiled"] == 0
    assert (second["triton_found"], second["cubins_found"]) == (first["triton_compiled"], first["cubins_compiled"])
    assert {name: time for name, time in files_in(moved).items() if name.suffix == ".cubin"} == compiled
