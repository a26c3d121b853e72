"""What the commands share: registering a command, flags for the settings, and parsing lists of numbers."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

from swamp_fast.config import CHOICES, SwampConfig
from swamp_fast.models import MODELS

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Handler = Callable[[argparse.Namespace], None]

# The fields of SwampConfig that have a flag. --out sets run_dir; layer_kept and groups are tables, too long for a flag.
WITHOUT_FLAG = ("run_dir", "layer_kept", "groups")
SETTINGS = {field.name: field for field in dataclasses.fields(SwampConfig) if field.name not in WITHOUT_FLAG}


def add_command(commands: Commands, name: str, handler: Handler) -> argparse.ArgumentParser:
    """Register a command, whose help text is the docstring of its handler. Returns its parser."""
    parser = commands.add_parser(name, help=handler.__doc__, description=handler.__doc__)
    parser.set_defaults(command=handler)
    return parser


def add_model(parser: argparse.ArgumentParser, text: str = f"{', '.join(MODELS)}, or package.module:factory") -> None:
    """Add the flags that name a network and its arguments."""
    parser.add_argument("--model", required=True, help=text)
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the arguments with which a network is made."""
    parser.add_argument(
        "--model-args",
        type=named_values,
        action=_Merged,
        default={},
        metavar="NAME=VALUE,…",
        help="the network's own arguments, such as width=32,depth=3",
    )


class _Merged(argparse.Action):
    """Merges the values of a flag that is given several times. A name may be given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add the values of one occurrence of the flag."""
        before = getattr(namespace, self.dest)
        twice = [name for name in values if name in before]
        if twice:
            parser.error(f"argument {option_string}: {twice[0]} is given twice")
        setattr(namespace, self.dest, {**before, **values})


def add_training_data(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names the training data."""
    parser.add_argument("--data", required=True, help="a named data set, an .npz file, or a folder of images")


def add_settings(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add a flag for every setting except those in `without`. A flag that isn't given sets no attribute."""
    group = parser.add_argument_group("settings", "the fields of SwampConfig; see its documentation")
    for name, field in SETTINGS.items():
        if name not in without:
            _add_setting(group, name, field)


def given_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name: getattr(given, name) for name in SETTINGS if hasattr(given, name)}


def numbers(text: str) -> list[int]:
    """Parse integers that are separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f'integers separated by commas are needed, got "{text}"') from None


def named_values(text: str) -> dict[str, Any]:
    """Parse NAME=VALUE pairs that are separated by commas. The values are literals of Python or TOML."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        if not isinstance(call, ast.Call) or not named or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("a value has no name")
        values = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        if len(values) < len(call.keywords):
            raise ValueError("a name is given twice")
        json.dumps(values)  # the analysis records them as JSON
        return values
    except (SyntaxError, ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"values with names are needed, such as width=32,act='\"relu\"' (texts in quotes); got {text}"
        ) from None


def _literal(value: ast.expr) -> Any:
    """The value of a literal of Python, or of TOML's true and false. Raises ValueError for anything else."""
    if isinstance(value, ast.Name) and value.id in ("true", "false"):
        return value.id == "true"
    return ast.literal_eval(value)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f'an integer of at least 1 is needed, got "{text}"')
    return number


def three_numbers(text: str) -> tuple[int, int, int]:
    """Parse three integers of at least 1 that are separated by commas."""
    found = numbers(text)
    if len(found) != 3 or min(found) < 1:
        raise argparse.ArgumentTypeError(f'three integers of at least 1 are needed, such as 3,32,32; got "{text}"')
    return found[0], found[1], found[2]


def _add_setting(group: argparse._ArgumentGroup, name: str, field: dataclasses.Field[Any]) -> None:
    flag = f"--{name.replace('_', '-')}"
    common: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": f"{_documentation_of(name)} Default: {field.default}",
    }
    if isinstance(field.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif str(field.type) == "int | tuple[int, ...]":
        group.add_argument(flag, type=_one_or_several, metavar="N | N,N,…", **common)
    else:
        kind = {"int": int, "float": float, "float | None": float}.get(str(field.type), str)
        group.add_argument(flag, type=kind, choices=CHOICES.get(name), **common)


def _documentation_of(name: str) -> str:
    """The description of a setting in the docstring of SwampConfig, escaped for argparse."""
    docstring = inspect.getdoc(SwampConfig) or ""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^Raises)", docstring, re.M | re.S)
    return " ".join(found[1].split()).replace("%", "%%") if found else ""


def _one_or_several(text: str) -> int | list[int]:
    values = numbers(text)
    return values if "," in text else values[0]
