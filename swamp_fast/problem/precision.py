"""The floating-point type of a run's weights."""

from __future__ import annotations

import torch

from swamp_fast.config import SwampConfig


def weight_dtype(config: SwampConfig) -> torch.dtype:
    """Return the type of weights, optimizer moments and SWA means."""
    return torch.float64 if config.precision == "float64" else torch.float32
