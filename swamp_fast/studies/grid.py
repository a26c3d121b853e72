"""What the runs of a sweep are made from: the points of its grid, the shared settings, and the models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.checked import checked_path, shown
from swamp_fast.config import SwampConfig

Model = nn.Module | Callable[[], nn.Module]
Grid = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]


def points_of(grid: Grid) -> list[dict[str, Any]]:
    """The points of a grid: every combination of a mapping's values, or the points of a list.

    Raises TypeError if a setting has no list of values, ValueError if the list of points is empty.
    """
    if isinstance(grid, Mapping):
        lists = {name: _values_of(name, values) for name, values in grid.items()}
        return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    if isinstance(grid, str | bytes | Tensor) or not isinstance(grid, Iterable):
        raise TypeError(f"`grid` must be a dict of lists, or a list of points, got {shown(grid)}.")
    points = []
    for point in grid:
        if not isinstance(point, Mapping):
            raise TypeError(
                f"`grid` as a list must hold points, each a dict from settings to values, got {shown(point)}."
            )
        points.append(dict(point))
    if not points:
        raise ValueError("`grid` is empty; give at least one point, such as {}.")
    return points


def _values_of(name: str, values: object) -> list[Any]:
    """The values of one setting as a list: an iterator can be read only once."""
    listed = (
        list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Tensor) else []
    )
    if not listed:
        raise TypeError(f"`grid` must have a list of values for `{name}`, got {shown(values)}.")
    return listed


def shared_settings(config: SwampConfig | None, settings: Mapping[str, Any]) -> SwampConfig:
    """The settings that all runs share. Raises TypeError if they name a run folder, as each run has a folder."""
    shared = SwampConfig.of(config, settings)
    if shared.run_dir is not None:
        raise TypeError("`run_dir` is the folder of one run; a sweep has `out`, a folder for all of them.")
    return shared


def folder_named(out: str | Path) -> Path:
    """The folder of a study as an absolute path, since the working directory may change. Raises if it is no path."""
    return checked_path("out", out).absolute()


def model_of(model: Model, seed: int) -> nn.Module:
    """The model of one run: `model` itself if it is a module, else a new one from the factory under the run's seed."""
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"`model` must be a module or a factory of one, got {type(model).__name__}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model()
