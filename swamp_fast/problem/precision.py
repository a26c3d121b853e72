"""The number formats of a run."""

from __future__ import annotations

import torch

from swamp_fast.config import SwampConfig


def weight_dtype(config: SwampConfig) -> torch.dtype:
    """Of weights, momentum and SWA."""
    return torch.float64 if config.precision == "float64" else torch.float32
