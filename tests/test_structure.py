"""The order of the house: packages import only what stands below them, and what must stand alone does."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import ROOT

import swamp_fast

# Of a package, from the top to the bottom: each row imports what stands below it; a package, its own modules too.
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
        ["start"],
        ["switching"],
        ["selection"],
        ["eager", "fused"],
        ["step_time"],
        ["bank_engine"],
        ["comparison"],
        ["lane_by_lane"],
        ["trainer"],
    ],
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, as dotted paths below it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "swamp_fast":
            inner = node.module.split(".")[1:]
            found |= {".".join(inner)} if inner else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("swamp_fast")}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", LAYERS)
def test_arrows_point_one_way(package):
    level = {name: row for row, names in enumerate(LAYERS[package]) for name in names}
    folder, prefix = ROOT / "swamp_fast" / package, f"{package}." if package else ""
    for path in files(f"swamp_fast/{package}"):
        place = path.relative_to(folder).with_suffix("").parts[0]
        if package and place == "__init__":
            continue
        for target in imports(path):
            name = target.removeprefix(prefix).split(".")[0]
            if target.startswith(prefix) and name != place:
                assert name in level, f"{path} imports {target}: give it a row"
                assert level[place] < level[name], f"{path} imports {target}, which doesn't stand below it"


def test_no_circles():
    """Modules beside each other in a layer don't import each other in a circle."""
    graph = {}
    for path in files("swamp_fast"):
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


def test_kernels_and_references_stand_alone():
    assert not [path for path in files("kernels") if imports(path)]
    for path in files("swamp_fast/ops/reference"):
        assert all(target.startswith("ops.reference") for target in imports(path)), path
    naive = imports(ROOT / "swamp_fast" / "naive.py")  # the oracle shares nothing of how the engines work
    own = ("ops", "engines", "cycle", "particles.bank", "particles.layout", "particles.norms", "particles.schedule")
    assert not {name for name in naive if name.startswith(own)}
    users = [path for path in files("swamp_fast") if "naive" in imports(path)]
    assert users == [ROOT / "swamp_fast" / "__init__.py"]


def test_the_top_level_is_small():
    assert len(list((ROOT / "swamp_fast").glob("*.py"))) <= 10


def test_an_op_has_one_name_everywhere():
    for path in files("swamp_fast/ops"):
        name = path.stem
        if name in ("__init__", "contracts", "backends") or "reference" in path.parts:
            continue
        assert (ROOT / "swamp_fast" / "ops" / "reference" / path.name).exists()
        assert (ROOT / "kernels" / path.name).exists()
        assert (ROOT / "csrc" / "cpu" / f"{name}.h").exists()
        assert (ROOT / "tests" / "ops" / f"test_{name}.py").exists()


def test_what_the_package_promises_is_there():
    assert {"fast_swamp", "naive_swamp", "SwampConfig", "SwampResult", "backends", "ops"} <= set(swamp_fast.__all__)
    for name in swamp_fast.__all__:
        assert getattr(swamp_fast, name) is not None
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{swamp_fast.__version__}"' in text
    assert f"\nversion: {swamp_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_package_is_installed():
    """An editable install finds what a wheel would lack."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "swamp_fast").rglob("__init__.py")}
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {
        "swamp_fast.kernels",
        "swamp_fast.cuda_sources",
    }


def test_every_template_is_installed():
    """Likewise for the report's templates."""
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "swamp_fast" / "report"
    installed = {path for pattern in package_data["swamp_fast.report"] for path in folder.glob(f"{pattern}/*")}
    assert {path for path in (folder / "templates").rglob("*.*") if path.is_file()} <= installed


@functools.cache
def imported_without_extras() -> list[str]:
    """Import the package in a process that lacks all extras, and run it. Returns the lines that the process prints."""
    code = """
import sys
for name in ("torchvision", "sklearn", "matplotlib", "PIL", "tensorboard"):
    sys.modules[name] = None
sys.path.insert(0, "tests")
import swamp_fast.kernels.philox
print([name for name in sys.modules if name.split(".")[0] == "kernels"], swamp_fast.kernels.__file__)
import swamp_fast, swamp_fast.cli, torch
result = swamp_fast.fast_swamp(torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.Linear(20, 2)),
    (torch.randn(64, 4), torch.arange(64) % 2), cycles=1, epochs=1, batch_size=16, progress=False)
for data in ("digits", "svhn", "tests/support"):
    try:
        swamp_fast.fast_swamp(result.model, data)
    except ImportError as error:
        print(error)
    else:
        raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.splitlines()


def test_kernels_are_imported_once():
    line = imported_without_extras()[0]
    assert line.startswith("[] ")
    assert line.endswith(str(Path("kernels") / "__init__.py"))


def test_importing_needs_none_of_the_extras():
    """The core runs without them; what needs one says which extra brings it."""
    errors = imported_without_extras()[1:]
    assert len(errors) == 3
    assert all("swamp-fast[data]" in error for error in errors)


def code_of(path: Path) -> list[tuple[int, str]]:
    """The numbered lines of a file without imports, docstrings, comments and signatures."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            skipped.update(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if number not in skipped]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def test_nothing_is_written_twice():
    """No 12 lines of code stand in two places."""
    places: dict[tuple[str, ...], str] = {}
    for path in files("swamp_fast") + files("benchmarks") + files("tests"):
        lines = code_of(path)
        for begin in range(len(lines) - 11):
            window = tuple(line for _, line in lines[begin : begin + 12])
            place = f"{path.relative_to(ROOT)}:{lines[begin][0]}"
            assert window not in places, f"{place} and {places[window]} have the same 12 lines"
            places[window] = place


def test_functions_are_short():
    """At most 70 lines; ruff bounds their complexity."""
    for path in files("swamp_fast") + files("benchmarks") + files("tests"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"


@pytest.mark.parametrize("pattern", [r"\bassert\b.*,\s*[\"']", r"except( Exception)?:\s*pass", r"(?<!\w)print\("])
def test_habits(pattern):
    """User errors are never asserts, nothing is swallowed, and only the console and the command line print."""
    for path in files("swamp_fast"):
        if "print" in pattern and (path.name == "console.py" or path.parent.name == "cli"):
            continue
        assert not re.search(pattern, path.read_text()), path
