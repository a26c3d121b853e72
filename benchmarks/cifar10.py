"""The JPEG copy of CIFAR-10, decoded where the script that decodes it is at hand."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import ROOT

SCRIPT = Path("data") / "decode_cifar10.py"


def decoded() -> Path:
    """An .npz with train_images, train_labels, test_images, test_labels, decoded once a machine.

    Raises FileNotFoundError where there is no script beside the copy.
    """
    scripts = [folder / SCRIPT for folder in (ROOT / "shared", ROOT.parent / "shared", ROOT / ".first_contact")]
    script = next((path for path in scripts if path.exists()), None)
    if script is None:
        raise FileNotFoundError(f"--data cifar10.npz is needed: none of {', '.join(map(str, scripts))} is there.")
    found = Path(tempfile.gettempdir()) / "cifar10_jpeg_decoded.npz"
    if not found.exists():
        part = found.with_name(f"part_{found.name}")
        subprocess.run([sys.executable, script, part], check=True)
        part.replace(found)
    return found
