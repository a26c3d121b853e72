"""The packages and the order between them: each imports only what stands below it, and one name has one meaning."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from pathlib import Path

import pytest
from paths import ROOT

# The modules of a package in layers, from top to bottom. A module imports only modules of the layers below its own.
LAYERS = {
    "": [
        ["__main__"],
        ["cli"],
        ["__init__"],
        ["studies"],
        ["analysis"],
        ["report", "methods"],
        ["driver", "naive", "models"],
        ["cycle"],
        ["engines"],
        ["runs"],
        ["problem"],
        ["data"],
        ["particles"],
        ["ops", "distributed", "config"],
        ["common", "kernels", "version", "_C"],
    ],
    "engines": [
        ["footprint"],
        ["start"],
        ["switching"],
        ["selection"],
        ["eager", "fused"],
        ["step_time"],
        ["bank_engine"],
        ["self_check"],
        ["trainer"],
        ["lane_by_lane", "lane_optimizers"],
    ],
    "engines.fused": [
        ["check"],
        ["engine", "estimate"],
        ["coverage"],
        ["trace"],
        ["reader"],
        ["cpu", "cuda"],
        ["compact", "buffers"],
        ["plan", "nodes"],
    ],
}

# File names that occur in several packages, and what all files of that name contain.
SHARED_NAMES = {
    "check": "the check of an engine against autograd",
    "compact": "the tensors and kernels of the channels that masks leave",
    "convolution": "convolutions as a kernel computes them",
    "engine": "an engine",
    "footprint": "the memory that is taken",
    "program": "the kernel calls of a step on a device",
    "progress": "what is done and how long the rest takes",
    "result": "what a call returns",
    "runner": "the lane runner of a device",
}


@functools.cache
def imports(path: Path) -> set[str]:
    """The modules of swamp_fast that a file imports, as dotted paths below it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "swamp_fast":
            below = node.module.split(".")[1:]
            imported |= {module_of([*below, alias.name]) or module_of(below) for alias in node.names}
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("swamp_fast.")}
    return imported


def module_of(parts: list[str]) -> str:
    """The dotted path of a module or package below swamp_fast, empty if there is none; `__init__` is swamp_fast's."""
    path = ROOT.joinpath("swamp_fast", *parts)
    if not parts:
        return "__init__"
    exists = path.is_dir() or path.with_suffix(".py").exists() or path.with_suffix(".pyi").exists()
    return ".".join(parts) if exists else ""


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_only_what_stands_below(package):
    layer_of = {name: row for row, names in enumerate(LAYERS[package]) for name in names}
    folder, prefix = ROOT.joinpath("swamp_fast", *package.split(".")), f"{package}." if package else ""
    for path in python_files(str(folder)):
        importer = path.relative_to(folder).with_suffix("").parts[0]
        if package and importer == "__init__":
            continue
        for target in imports(path):
            name = target.removeprefix(prefix).split(".")[0]
            if target.startswith(prefix) and name != importer:
                assert name in layer_of, f"{path} imports {target}, which has no layer"
                assert layer_of[importer] < layer_of[name], f"{path} imports {target}, which doesn't stand below it"


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {}
    for path in python_files("swamp_fast"):
        parts = path.relative_to(ROOT / "swamp_fast").with_suffix("").parts
        graph[".".join(part for part in parts if part != "__init__")] = imports(path)

    def reached_from(start: str) -> set[str]:
        reached: set[str] = set()
        open_ends = [start]
        while open_ends:
            new = graph.get(open_ends.pop(), set()) - reached
            reached |= new
            open_ends += new
        return reached

    assert not [name for name in graph if name and name in reached_from(name)]


def test_kernels_references_and_the_oracle_stand_alone():
    assert not [path for path in python_files("kernels") if imports(path)]
    for path in python_files("swamp_fast/ops/reference"):
        assert all(target.startswith("ops.reference") for target in imports(path)), path
    naive = imports(ROOT / "swamp_fast" / "naive.py")  # it shares nothing of how the engines compute
    engine_code = ("ops", "engines", "cycle", "particles.bank", "particles.layout", "particles.norms")
    assert not {name for name in naive if name.startswith((*engine_code, "particles.schedule"))}
    users = [path for path in python_files("swamp_fast") if "naive" in imports(path)]
    assert users == [ROOT / "swamp_fast" / "__init__.py"]


def test_at_most_ten_modules_stand_beside_the_packages():
    assert len(list((ROOT / "swamp_fast").glob("*.py"))) <= 10


def test_an_op_has_one_name_everywhere():
    module, stubs = (ROOT / "csrc/cpu/module.cpp").read_text(), (ROOT / "swamp_fast/_C.pyi").read_text()
    benchmark = (ROOT / "benchmarks/test_ops.py").read_text()
    ops = {path.stem for path in (ROOT / "swamp_fast" / "ops").glob("*.py")} - {"__init__", "contracts", "backends"}
    for op in ops:
        assert (ROOT / "swamp_fast" / "ops" / "reference" / f"{op}.py").exists()
        assert (ROOT / "kernels" / f"{op}.py").exists()
        assert (ROOT / "csrc" / "cpu" / f"{op}.h").exists()
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
        assert f'"{op}' in module
        assert f"def {op}" in stubs
        assert op in benchmark


def test_files_of_one_name_hold_the_same_thing():
    files_of = defaultdict(list)
    for folder in ("swamp_fast", "kernels", "benchmarks"):
        for path in python_files(folder):
            files_of[path.stem].append(path.relative_to(ROOT))
    several = {name: paths for name, paths in files_of.items() if len(paths) > 1 and name != "__init__"}
    ops = {path.stem for path in (ROOT / "swamp_fast/ops/reference").glob("*.py")}
    assert set(several) - ops == set(SHARED_NAMES), {name: several[name] for name in set(several) - ops}
