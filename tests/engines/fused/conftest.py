"""Lets test_ptx import test_cuda_kernels, whose tests it repeats on interpreted kernels."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
