"""Reads CIFAR-10 from an .npz, which a script makes from a JPEG copy if that script is available."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import ROOT

SCRIPT = Path("data") / "decode_cifar10.py"


def decoded() -> Path:
    """Return an .npz with train_images, train_labels, test_images and test_labels, decoded once per machine.

    Raises FileNotFoundError if the decoding script is not found.
    """
    scripts = [folder / SCRIPT for folder in (ROOT / "shared", ROOT.parent / "shared", ROOT / ".first_contact")]
    script = next((path for path in scripts if path.exists()), None)
    if script is None:
        raise FileNotFoundError(
            f"pass --data cifar10.npz, because none of these decoding scripts exists: {', '.join(map(str, scripts))}."
        )
    path = Path(tempfile.gettempdir()) / "cifar10_jpeg_decoded.npz"
    if not path.exists():
        part = path.with_name(f"part_{path.name}")
        subprocess.run([sys.executable, script, part], check=True)
        part.replace(path)
    return path


def pictures(path: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` pictures of a split as uint8 [B, 3, 32, 32], and their labels [B]."""
    loaded = np.load(path)
    images = torch.from_numpy(loaded[f"{split}_images"][:count]).movedim(-1, 1)
    return images, torch.from_numpy(loaded[f"{split}_labels"][:count])
