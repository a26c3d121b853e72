"""test_ptx asks of the interpreted kernels what test_cuda_kernels asks: it imports it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
