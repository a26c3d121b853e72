"""The commands for studies of many runs, which a TOML file describes: sweep, compare."""

from __future__ import annotations

import argparse
import functools
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from swamp_fast import distributed
from swamp_fast.cli.flags import Commands, add_command, add_model_arguments
from swamp_fast.cli.networks import picture_shape
from swamp_fast.config import SwampConfig
from swamp_fast.models import model_factory
from swamp_fast.report.tables import summary_table
from swamp_fast.studies.compare import compare
from swamp_fast.studies.grid import MODEL
from swamp_fast.studies.sweep import sweep

# The keys that each kind of file may have, and the types of their values.
COMMON_KEYS = {"model": str, "data": str, "test": str, "val": float, "out": str}
COMMON_KEYS |= {"model_args": dict, "settings": dict}
SWEEP_KEYS = {**COMMON_KEYS, "grid": dict, "points": list}
COMPARE_KEYS = {**COMMON_KEYS, "methods": list, "seeds": list, "baseline": str}


def add_sweep(commands: Commands) -> None:
    """Register the command `sweep` and its flags."""
    parser = add_command(commands, "sweep", run_sweep)
    parser.add_argument("file", metavar="FILE.toml", help="model, model_args, data, [settings], a [grid] or [[points]]")
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="folder for the sweep; to continue it, repeat the command")


def run_sweep(given: argparse.Namespace) -> None:
    """Run a grid of settings. Compatible runs are trained together, and no run is repeated."""
    study = _read(given.file, SWEEP_KEYS)
    lacks_data = "model" not in study or "data" not in study
    if lacks_data or ("grid" in study) == ("points" in study):
        raise ValueError(f"{given.file} must have `model`, `data`, and either a table [grid] or tables [[points]].")
    config = SwampConfig.of(None, study.get("settings", {}))
    result = sweep(
        *(_factory(study, given.model_args, config), study["data"], study.get("test")),
        _flat(study["grid"]) if "grid" in study else [*map(_flat, study["points"])],
        out=given.out or study.get("out"),
        val=study.get("val"),
        config=config,
    )
    if not distributed.current().first:
        return
    print(summary_table(result.summary(), result.names))
    failed = [run for run in result.runs if run.error is not None]
    for run in failed:
        print(f"{run.point}: {type(run.error).__name__}: {run.error}", file=sys.stderr)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(result.runs)} runs failed.")


def add_compare(commands: Commands) -> None:
    """Register the command `compare` and its flags."""
    parser = add_command(commands, "compare", run_compare)
    parser.add_argument(
        "file", metavar="FILE.toml", help="model, model_args, data, methods, seeds, baseline, [settings]"
    )
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="folder for the comparison; to continue it, repeat the command")


def run_compare(given: argparse.Namespace) -> None:
    """Compare methods under the same seeds: accuracy over density, differences paired by seed, and cost."""
    study = _read(given.file, COMPARE_KEYS)
    missing = [name for name in ("model", "data", "methods", "seeds") if name not in study]
    if missing:
        raise ValueError(f"{given.file} lacks {', '.join(missing)}; known: {', '.join(COMPARE_KEYS)}.")
    config = SwampConfig.of(None, study.get("settings", {}))
    result = compare(
        *(_factory(study, given.model_args, config), study["data"], study.get("test")),
        *(study["methods"], study["seeds"]),
        out=given.out or study.get("out"),
        val=study.get("val"),
        baseline=study.get("baseline", "imp"),
        config=config,
    )
    if not distributed.current().first:
        return
    print(result.table())
    for error in result.errors:
        print(f"{error['method']}, seed {error['seed']}: {error['error']}", file=sys.stderr)
    if result.errors:
        raise RuntimeError(f"{len(result.errors)} of {len(result.runs)} runs failed.")


def _read(file: str, types: dict[str, type]) -> dict[str, Any]:
    """Read the file of a study. Raises ValueError for an unknown key, TypeError for a value of the wrong type."""
    try:
        study = tomllib.loads(Path(file).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error
    for name, value in study.items():
        if name not in types:
            raise ValueError(f"{file}: unknown `{name}`; known: {', '.join(types)}.")
        if not isinstance(value, types[name]):
            raise TypeError(f"{file}: `{name}` must be {types[name].__name__}, got {value!r}.")
    return study


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """A grid or a point with keys such as "model.width", which TOML may also write as a table [grid.model]."""
    if not isinstance(table, dict):
        raise TypeError(f"[[points]] must be tables, got {table!r}.")
    arguments = table.get("model")
    if not isinstance(arguments, dict):
        return table
    rest = {name: value for name, value in table.items() if name != "model"}
    return {**rest, **{f"{MODEL}{name}": value for name, value in arguments.items()}}


def _factory(study: dict[str, Any], flag: dict[str, Any], config: SwampConfig) -> Callable[..., nn.Module]:
    """A function that builds a new network for each run; the study sets the seed before each call.

    flag  the network's arguments by --model-args, which take precedence over the file's `model_args`; those of a grid
          take precedence over both
    """
    factory = model_factory(study["model"], *picture_shape(study["data"], config))
    return functools.partial(factory, **{**study.get("model_args", {}), **flag})
