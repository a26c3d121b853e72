"""Bank sizes, and helpers that copy and convert banks, for the tests of the ops that update a bank."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = [(1, 1, 1), (1, 5, 5), (3, 17, 9), (2, 4096, 4096), (4, 5001, 4100), (5, 9000, 0), (2, 0, 0)]


def ends_of_segments(runs: int, parameters: int, segments: int) -> Tensor:
    """Random ends [R, S] of segments, of which one is empty if there are more than two."""
    inner = torch.randint(0, parameters + 1, (runs, segments - 1)).sort(1).values
    inner[:, 1:2] = inner[:, :1]
    return torch.cat([inner, torch.full((runs, 1), parameters)], 1).contiguous()


def move(value: Tensor, device: torch.device) -> Tensor:
    return value if device.type == "cpu" else value.to(device)


def as_float64(given: dict[str, object]) -> dict[str, object]:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
