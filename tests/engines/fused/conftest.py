"""Lets test_ptx.py import test_cuda_kernels.py, whose tests it repeats in the PTX interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
