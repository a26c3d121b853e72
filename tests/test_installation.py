"""What is installed: every package and template, one copy of the kernels, and a core that needs none of the extras."""

from __future__ import annotations

import functools
import subprocess
import sys
import tomllib
from pathlib import Path

from paths import ROOT

import swamp_fast


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
    """Start a process in which no extra can be imported, and use the package there. Returns the lines it prints."""
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
