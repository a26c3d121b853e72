"""What the runs of a sweep are made from: the points of its grid, the shared settings, and the models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swamp_fast.common.checked import checked_path, shown
from swamp_fast.common.format import described
from swamp_fast.common.signatures import misfit
from swamp_fast.config import SwampConfig
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.recipe import Recipe

Model = nn.Module | Callable[..., nn.Module]
Grid = Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Any]]
MODEL = "model."  # the prefix of a grid's keys that are arguments of the model factory


@dataclass(frozen=True)
class Point:
    """What one run of a sweep has of its own.

    given  key -> value, as in the grid. A key is the name of a setting, "model." followed by the name of an argument of
           the model factory, or "recipe". The value of "recipe" is a dict with one entry, {name: Recipe or None}
    """

    given: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which this point differs from the shared settings."""
        return {key: value for key, value in self.given.items() if key != "recipe" and not str(key).startswith(MODEL)}

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The arguments of the model factory."""
        return {key.removeprefix(MODEL): value for key, value in self.given.items() if str(key).startswith(MODEL)}

    def arguments(self, shared: Arguments) -> Arguments:
        """The shared arguments, with this point's recipe if it has one."""
        recipes = [*self.given.get("recipe", {}).values()]
        return dataclasses.replace(shared, recipe=recipes[0]) if recipes else shared

    @property
    def shown(self) -> dict[str, Any]:
        """The point as names and tables show it, with the recipe's name in place of the recipe.

        `layer_kept` is left out, because it is a whole table, too long for a name or a cell of a CSV file.
        """
        named = {key: next(iter(value)) if key == "recipe" else value for key, value in self.given.items()}
        return {key: value for key, value in named.items() if key != "layer_kept"}


def points_of(grid: Grid) -> list[Point]:
    """The points of a grid: every combination of a mapping's values, or the points of a list.

    Raises TypeError if a key has no list of values or a recipe has no name, and ValueError if there are no points or
    two recipes have the same name.
    """
    if isinstance(grid, Mapping):
        lists = {key: _values_of(key, values) for key, values in grid.items()}
        points = [Point(dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]
    elif isinstance(grid, str | bytes | Tensor) or not isinstance(grid, Iterable):
        raise TypeError(f"`grid` must be a dict of lists, or a list of points, got {shown(grid)}.")
    else:
        points = [_point_of(point) for point in grid]
    if not points:
        raise ValueError("`grid` is empty; give at least one point, such as {}.")
    _check_recipes(points)
    return points


def _point_of(point: object) -> Point:
    if not isinstance(point, Mapping):
        raise TypeError(f"`grid` as a list must hold points, each a dict from settings to values, got {shown(point)}.")
    return Point(dict(point))


def _values_of(key: str, values: object) -> list[Any]:
    """The values of one key as a list, because an iterator can be read only once."""
    if key == "recipe" and isinstance(values, Mapping):
        values = [{name: recipe} for name, recipe in values.items()]
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Tensor)
    listed = list(values) if several else []  # type: ignore[call-overload]
    if not listed:
        raise TypeError(f"`grid` must have a list of values for `{key}`, got {shown(values)}.")
    return listed


def _check_recipes(points: Iterable[Point]) -> None:
    """Check that every recipe of the points has a name, and that no two recipes have the same name."""
    named: dict[str, Recipe | None] = {}
    for point in points:
        given = point.given.get("recipe", {"": None})
        if not isinstance(given, Mapping) or len(given) != 1 or not all(isinstance(name, str) for name in given):
            raise TypeError(
                '`grid`: recipes must have names, as in {"recipe": {"sam": Recipe(optimizer=sam), "plain": '
                f"None}}}}; a point in a list has one recipe with its name. Got {given!r}. A Recipe is code, so no "
                "TOML file can hold it: call sweep from Python."
            )
        for name, recipe in given.items():
            if recipe is not None and not isinstance(recipe, Recipe):
                raise TypeError(f'`grid`: the recipe "{name}" must be a swamp_fast.Recipe or None, got {recipe!r}.')
            if named.setdefault(name, recipe) is not recipe:
                raise ValueError(f'`grid` has two recipes with the name "{name}"; give each its own.')


def shared_settings(config: SwampConfig | None, settings: Mapping[str, Any]) -> SwampConfig:
    """The settings that all runs share. Raises TypeError if they name a run folder, since each run has its own."""
    shared = SwampConfig.of(config, settings)
    if shared.run_dir is not None:
        raise TypeError("`run_dir` is the folder of one run; a sweep has `out`, a folder for all of them.")
    return shared


def folder_named(out: str | Path) -> Path:
    """The folder of a study as an absolute path, since the working directory may change. Raises if it isn't a path."""
    return checked_path("out", out).absolute()


def check_factory(model: Model, points: Iterable[Point]) -> None:
    """Raise TypeError if `model` is neither a module nor a factory, or doesn't take the arguments of a point."""
    if not isinstance(model, nn.Module) and not callable(model):
        raise TypeError(f"`model` must be a module or a factory of one, got {type(model).__name__}.")
    for point in points:
        arguments = point.model_arguments
        keys = ", ".join(f"`{MODEL}{name}`" for name in arguments)
        if isinstance(model, nn.Module) and arguments:
            raise TypeError(
                f"{keys}: `model` is a module, so it takes no arguments. Pass a factory that takes "
                f"{', '.join(arguments)}, such as the module's class."
            )
        reason = None if isinstance(model, nn.Module) else misfit(model, arguments)
        if reason is not None:
            raise TypeError(f"{keys or '`model`'}: the model factory {reason}.")


def model_of(model: Model, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """The model of one run: `model` itself if it is a module, else a new one from the factory under the run's seed."""
    if isinstance(model, nn.Module):
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return model(**arguments)
        except Exception as error:  # the factory is the user's code
            if not arguments:
                raise
            given = ", ".join(f"`{MODEL}{name}` = {value!r}" for name, value in arguments.items())
            raise ValueError(f"{given}: the model factory raises {described(error)}.") from error
