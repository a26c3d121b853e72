"""The command line: swamp-fast demo, run, sweep, compare, show, analyze, ticket, report, plan, backends."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from swamp_fast import analysis, distributed
from swamp_fast.common.memory import free_memory
from swamp_fast.config import CHOICES, SwampConfig
from swamp_fast.data.samples import one_input
from swamp_fast.data.sources import Arrays, Source, open_source
from swamp_fast.driver import fast_swamp
from swamp_fast.engines.fused.estimate import estimate, measured_ceilings
from swamp_fast.engines.fused.trace import NotCovered
from swamp_fast.models import MODELS, SmallCNN, build_model
from swamp_fast.ops.backends import backends
from swamp_fast.report.figures import accuracy_over_sparsity
from swamp_fast.report.tables import history_table, summary_table
from swamp_fast.report import write_report
from swamp_fast.runs.checkpoint import write
from swamp_fast.runs.result import SwampResult
from swamp_fast.studies.compare import compare
from swamp_fast.studies.sweep import sweep
from swamp_fast.version import __version__

DEMO = SwampConfig(particles=4, cycles=14, epochs=12, ticket_epochs=4, batch_size=64)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if it went well, 2 for a mistake in what was asked, 130 when interrupted."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        with distributed.start(getattr(given, "device", None) or "auto"):
            given.command(given)
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        RuntimeError,
        MemoryError,
        FloatingPointError,
    ) as error:
        print(f"swamp-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "swamp-fast: interrupted; started again, a run with --out goes on from its last checkpoint", file=sys.stderr
        )
        return 130
    return 0


def demo(given: argparse.Namespace) -> None:
    """Four particles of a small network on scikit-learn's digits, pruned through 14 cycles."""
    out = Path(given.out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEMO.seed)
        model = SmallCNN(1, 10)
    settings = {} if given.epochs is None else {"epochs": given.epochs}
    result = fast_swamp(model, "digits", config=DEMO, run_dir=out / "run", progress=not given.quiet, **settings)
    _report(result, out, "SWAMP, a small CNN on digits, 4 particles")
    print(f"\nThe same in a script:\n  result = fast_swamp(model, train, test)\nThe run is in {out / 'run'}.")


def run(given: argparse.Namespace) -> None:
    """A network by name or factory on any data, with every setting as a flag or from TOML."""
    chosen = {name: getattr(given, name) for name in SETTINGS if hasattr(given, name)}
    base = SwampConfig.from_toml(Path(given.config)) if given.config is not None else None
    config = SwampConfig.of(base, {**chosen, "run_dir": given.out} if given.out is not None else chosen)
    shape = _shape(open_source(given.data, "train", config.data_dir).source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(given.model, *shape)
    result = fast_swamp(model, given.data, given.test, val=given.val, config=config)
    if not distributed.current().first:
        return
    _report(result, None if given.out is None else Path(given.out), f"SWAMP, {given.model} on {given.data}")


SWEEP = {"model": str, "data": str, "test": str, "val": float, "out": str}  # what a sweep's file may hold
SWEEP |= {"settings": dict, "grid": dict, "points": list}
COMPARE = {name: kind for name, kind in SWEEP.items() if name not in ("grid", "points")}
COMPARE |= {"methods": list, "seeds": list, "baseline": str}


def run_sweep(given: argparse.Namespace) -> None:
    """Runs over a grid of settings; those that can share a step are trained together, none is computed twice."""
    wanted = _read(given.file, SWEEP)
    missing = [name for name in ("model", "data") if name not in wanted]
    if missing or ("grid" in wanted) == ("points" in wanted):
        raise ValueError(f"{given.file} must have `model`, `data`, and either a table [grid] or tables [[points]].")
    config = SwampConfig.of(None, wanted.get("settings", {}))
    found = sweep(
        *(_factory(wanted, config), wanted["data"], wanted.get("test")),
        wanted.get("grid", wanted.get("points")),
        out=given.out or wanted.get("out"),
        val=wanted.get("val"),
        config=config,
    )
    if not distributed.current().first:
        return
    print(summary_table(found.summary(), found.names))
    failed = [run for run in found.runs if run.error is not None]
    for run in failed:
        print(f"{run.point}: {type(run.error).__name__}: {run.error}", file=sys.stderr)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found.runs)} runs failed.")


def run_compare(given: argparse.Namespace) -> None:
    """Methods under the same seeds: accuracy over density, differences paired by seed, and what each costs."""
    wanted = _read(given.file, COMPARE)
    missing = [name for name in ("model", "data", "methods", "seeds") if name not in wanted]
    if missing:
        raise ValueError(f"{given.file} lacks {', '.join(missing)}; known: {', '.join(COMPARE)}.")
    config = SwampConfig.of(None, wanted.get("settings", {}))
    found = compare(
        *(_factory(wanted, config), wanted["data"], wanted.get("test"), wanted["methods"], wanted["seeds"]),
        out=given.out or wanted.get("out"),
        val=wanted.get("val"),
        baseline=wanted.get("baseline", "imp"),
        config=config,
    )
    if not distributed.current().first:
        return
    print(found.table())
    for each in found.errors:
        print(f"{each['method']}, seed {each['seed']}: {each['error']}", file=sys.stderr)
    if found.errors:
        raise RuntimeError(f"{len(found.errors)} of {len(found.runs)} failed.")


def _read(file: str, known: dict[str, type]) -> dict[str, Any]:
    """A sweep's or a comparison's file."""
    try:
        wanted = tomllib.loads(Path(file).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error
    for name, value in wanted.items():
        if name not in known:
            raise ValueError(f"{file}: unknown `{name}`; known: {', '.join(known)}.")
        if not isinstance(value, known[name]):
            raise TypeError(f"{file}: `{name}` must be {known[name].__name__}, got {value!r}.")
    return wanted


def _factory(wanted: dict[str, Any], config: SwampConfig) -> Callable[[], torch.nn.Module]:
    """Makes the network that a file names, for its data."""
    shape = _shape(open_source(wanted["data"], "train", config.data_dir).source)
    return lambda: build_model(wanted["model"], *shape)


def show(given: argparse.Namespace) -> None:
    """What a run's folder holds."""
    result = SwampResult.load(given.directory)
    print(result.config.to_toml())
    engine = {name: value for name, value in result.engine.items() if value not in (None, {}) and name != "rows"}
    print("engine: " + ", ".join(f"{name} = {value}" for name, value in engine.items()) + "\n")
    print(history_table(result.history))
    left = result.config.cycles + 1 - len(result.history)
    if left:
        print(f"\n{left} of {result.config.cycles + 1} trainings are still to come; call it again with --out to go on.")


def analyze(given: argparse.Namespace) -> None:
    """Connectivity, flatness, masks and cost of a finished run, into its folder's analysis.json."""
    if not distributed.current().first:
        return
    result = SwampResult.load(given.directory)
    changes = {name: getattr(given, name) for name in ("device", "engine", "data_dir")}
    config = result.config.replace(**{name: value for name, value in changes.items() if value is not None})
    shape = _shape(open_source(given.data, "train", config.data_dir).source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(given.model, *shape)
    SwampResult.load(given.directory, model)  # one that doesn't fit is told
    on = analysis.Analysis(
        *(model, given.data, given.test),
        val=given.val,
        prunable=sorted(result.masks),
        config=config,
        standardise=result.standardise,
        samples=given.samples,
    )
    against = None if given.against is None else SwampResult.load(given.against, model)
    _check_same(analysis.differing(on, result), given.anyway, "the run")
    if against is not None:
        _check_same(analysis.differing(on, against), given.anyway, given.against)
    names = ("points", "probes", "mixtures", "size", "repeats")
    own = {name: getattr(given, name) for name in names}
    found = analysis.analyze(on, result, **own, against=against, random=given.random_plane)
    if against is not None:
        found["against"]["run"] = Path(given.against).resolve().name
    found["about"] |= {"model": given.model, "data": given.data}
    path = Path(given.directory) / "analysis.json"
    write(path, json.dumps(found, indent=1).encode())
    print(f"{analysis.table(found)}\n\nall of it: {path}")


def _check_same(differs: list[str], anyway: bool, run: str) -> None:
    """Raises ValueError if a run was scored otherwise, or on other data and that isn't wanted."""
    own = [f"`{name}`" for name in ("loss", "forward") if name in differs]
    if own:
        raise ValueError(f"{run} had a {' and a '.join(own)} of its own: use swamp_fast.analysis from Python with it.")
    data = [name for name in ("train", "val", "test") if name in differs]
    if data and not anyway:
        raise ValueError(
            f"the {', '.join(data)} data are not {run}'s; give the --data, the --test and the --val that it had, or "
            "--anyway to have it analysed on these."
        )
    if data:
        print(f"swamp-fast: the {', '.join(data)} data are not {run}'s.", file=sys.stderr)


def ticket(given: argparse.Namespace) -> None:
    """Is the ticket late enough? Two children of each candidate, and the barrier between them on validation data."""
    chosen = {name: getattr(given, name) for name in SETTINGS if hasattr(given, name)}
    config = SwampConfig.of(None, {**chosen, "run_dir": given.out})
    shape = _shape(open_source(given.data, "train", config.data_dir).source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(given.model, *shape)
    own = {"epsilon": given.epsilon, "points": given.points, "samples": given.samples}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says it
        found = analysis.ticket_stability(model, given.data, given.val, given.candidates, config=config, **own)
    if distributed.current().first:
        print(found.table())


def report(given: argparse.Namespace) -> None:
    """A page of a run's, a comparison's or a sweep's folder: figures, tables, and what is missing."""
    print(write_report(given.directory, given.model))


def show_backends(given: argparse.Namespace) -> None:
    """What is active here, what is missing, and why."""
    for name, found in backends().items():
        details = ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("active", "why"))
        state = "active " if found["active"] else "missing"
        print(f"{name:<7} {state}  {found['why']}" + (f" ({details})" if details else ""))


def plan(given: argparse.Namespace) -> None:
    """What a step of the fused engine costs on this device, and how many particles fit; nothing is trained."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    channels, height, width = given.shape
    model = build_model(given.model, channels, height, width, given.classes)
    inputs = torch.zeros(given.batch_size, channels, height, width)
    try:
        found, cost = estimate(model, inputs, given.precision)
    except NotCovered as reason:
        raise ValueError(f"the fused engine doesn't cover {given.model}: {reason}; the eager engine runs it.") from None
    ceilings = measured_ceilings(device, given.precision)
    free, seconds = free_memory(device), cost.seconds(ceilings)
    print(", ".join(f"{count} {kind}" for kind, count in found.count().items()))
    print(
        f"a particle-step   {cost.flops / 1e9:.3g} GFLOP, {cost.moved / 1e9:.3g} GB through memory, at density 1\n"
        f"this device       {device}: copies {ceilings.bytes / 1e9:,.0f} GB/s, multiplies "
        f"{ceilings.flops / 1e12:.3g} TFLOP/s in {given.precision}, measured now\n"
        f"time              about {seconds * 1e3:.3g} ms a particle-step at best, "
        f"{seconds * given.particles * 1e3:.3g} ms a step of {given.particles}\n"
        f"memory            {(cost.state + cost.maps) / 1e6:,.0f} MB a particle, of them {cost.state / 1e6:,.0f} of "
        f"state; {free / 1e9:,.1f} GB are free: {cost.particles(free):,} particles fit at once"
    )


def _report(result: SwampResult, out: Path | None, title: str) -> None:
    print(history_table(result.history))
    if out is not None and result.history[-1]["accuracy"] is not None:
        try:
            print(f"\nfigure: {accuracy_over_sparsity(result.history, out / 'accuracy.png', title)}")
        except ImportError as error:
            print(f"\nno figure: {error}")


def _shape(source: Source) -> tuple[int, int, int, int]:
    """Channels, height, width and classes of pictures, for the networks that are known by name."""
    if isinstance(source, Arrays):
        sample, classes = source.inputs[0], int(source.targets.max()) + 1
    else:
        sample, classes = one_input(source), len(getattr(source.dataset, "classes", ())) or 10
    height, width, channels = sample.shape
    return channels, height, width, classes


SETTINGS = {
    field.name: field for field in dataclasses.fields(SwampConfig) if field.name not in ("run_dir", "layer_kept")
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="swamp-fast", description="SWAMP: prune with averaged particles, fast.")
    parser.add_argument("--version", action="version", version=f"swamp_fast {__version__}")
    commands = parser.add_subparsers(
        required=True,
        metavar="demo | run | sweep | compare | show | analyze | ticket | report | plan | backends",
    )

    each = commands.add_parser("demo", help=demo.__doc__, description=demo.__doc__)
    each.add_argument("--out", default="swamp_demo", metavar="DIR", help="where the run and the figure go")
    each.add_argument("--epochs", type=int, help="of a training, instead of 12")
    each.add_argument("--quiet", action="store_true", help="no progress")
    each.set_defaults(command=demo)

    each = commands.add_parser("run", help=run.__doc__, description=run.__doc__)
    each.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or package.module:factory")
    each.add_argument("--data", required=True, help="a named data set, an .npz, or a folder of images")
    each.add_argument("--test", metavar="DATA", help="test data, if --data brings none")
    each.add_argument("--val", type=float, metavar="FRACTION", help="of the training data to hold out")
    each.add_argument("--out", metavar="DIR", help="the run's folder; started again with it, the run goes on")
    each.add_argument("--config", metavar="FILE.toml", help="settings; flags take precedence")
    settings = each.add_argument_group("settings", "the fields of SwampConfig, see its docs")
    for name, field in SETTINGS.items():
        _add_setting(settings, name, field)
    each.set_defaults(command=run)

    each = commands.add_parser("sweep", help=run_sweep.__doc__, description=run_sweep.__doc__)
    each.add_argument("file", metavar="FILE.toml", help="model, data, [settings], and a [grid] or [[points]]")
    each.add_argument("--out", metavar="DIR", help="the sweep's folder; started again with it, the sweep goes on")
    each.set_defaults(command=run_sweep)

    each = commands.add_parser("compare", help=run_compare.__doc__, description=run_compare.__doc__)
    each.add_argument("file", metavar="FILE.toml", help="model, data, methods, seeds, baseline, and [settings]")
    each.add_argument("--out", metavar="DIR", help="its folder; started again with it, the comparison goes on")
    each.set_defaults(command=run_compare)

    each = commands.add_parser("show", help=show.__doc__, description=show.__doc__)
    each.add_argument("directory", metavar="DIR")
    each.set_defaults(command=show)

    each = commands.add_parser("analyze", help=analyze.__doc__, description=analyze.__doc__)
    each.add_argument("directory", metavar="RUN_DIR")
    each.add_argument("--model", required=True, help="as the run had it")
    each.add_argument("--data", required=True, help="as the run had it")
    each.add_argument("--test", metavar="DATA", help="as the run had it")
    each.add_argument("--val", type=float, metavar="FRACTION", help="as the run had it")
    each.add_argument("--points", type=int, default=11, help="of a path, default 11")
    each.add_argument("--probes", type=int, default=32, help="of the Hessian's trace, default 32; 0: none")
    each.add_argument("--mixtures", type=int, default=32, help="of the particles in the hull, default 32; 0: none")
    each.add_argument("--size", type=int, default=11, help="of the plane, points an axis, default 11; 0: none")
    each.add_argument("--against", metavar="RUN_DIR2", help="another run of the model: overlap of masks, and barriers")
    each.add_argument("--random-plane", action="store_true", help="also a random plane at the last average")
    each.add_argument("--repeats", type=int, default=15, help="of timing, default 15; 0: none")
    each.add_argument("--samples", type=int, metavar="N", help="N training samples stand for all")
    each.add_argument("--anyway", action="store_true", help="on other data than the run's too")
    each.add_argument("--engine", help="instead of the run's")
    each.add_argument("--device", help="instead of the run's")
    each.add_argument("--data-dir", help="instead of the run's")
    each.set_defaults(command=analyze)

    each = commands.add_parser("ticket", help=ticket.__doc__, description=ticket.__doc__)
    each.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or package.module:factory")
    each.add_argument("--data", required=True, help="a named data set, an .npz, or a folder of images")
    each.add_argument("--val", type=float, required=True, metavar="FRACTION", help="of the training data to hold out")
    each.add_argument("--candidates", type=_numbers, required=True, metavar="T0,T0,…", help="in epochs, such as 0,2,5")
    each.add_argument("--epsilon", type=float, default=0.02, help="the highest error barrier, default 0.02")
    each.add_argument("--points", type=int, default=11, help="of a path, default 11")
    each.add_argument("--samples", type=int, metavar="N", help="N training samples stand for all")
    each.add_argument("--out", metavar="DIR", help="a folder for the trainings; started again with it, it goes on")
    settings = each.add_argument_group("settings", "the fields of SwampConfig, see its docs")
    for name, field in SETTINGS.items():
        if name not in ("particles", "cycles", "ticket_epochs", "keep_particles"):
            _add_setting(settings, name, field)
    each.set_defaults(command=ticket)

    each = commands.add_parser("report", help=report.__doc__, description=report.__doc__)
    each.add_argument("directory", metavar="DIR", help="the folder; report.html, figures/ and numbers/ go into it")
    each.add_argument("--model", metavar="NAME", help="as for run, for the lines that load the model")
    each.set_defaults(command=report)

    each = commands.add_parser("plan", help=plan.__doc__, description=plan.__doc__)
    each.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or package.module:factory")
    each.add_argument("--particles", type=int, default=4, metavar="N")
    each.add_argument("--batch-size", type=int, default=128, metavar="B")
    each.add_argument(
        "--shape", type=_three, default=(3, 32, 32), metavar="C,H,W", help="of a picture; default 3,32,32"
    )
    each.add_argument("--classes", type=int, default=10)
    each.add_argument("--precision", choices=CHOICES["precision"], default="float32")
    each.add_argument("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one")
    each.set_defaults(command=plan)

    each = commands.add_parser("backends", help=show_backends.__doc__, description=show_backends.__doc__)
    each.set_defaults(command=show_backends)
    return parser


def _add_setting(group: Any, name: str, field: dataclasses.Field[Any]) -> None:
    """A flag for a field of SwampConfig; one that isn't given leaves no trace."""
    flag, shown = f"--{name.replace('_', '-')}", f"{_meaning(name)} Default: {field.default}"
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": shown}
    if isinstance(field.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif name == "particles":
        group.add_argument(flag, type=_particles, metavar="N | N,N,…", **common)
    else:
        kind = {"int": int, "float": float, "float | None": float}.get(str(field.type), str)
        group.add_argument(flag, type=kind, choices=CHOICES.get(name), **common)


def _meaning(name: str) -> str:
    """A setting's line in the docs of SwampConfig."""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^Raises)", inspect.getdoc(SwampConfig) or "", re.M | re.S)
    return " ".join(found[1].split()).replace("%", "%%") if found else ""


def _three(text: str) -> tuple[int, int, int]:
    channels, height, width = (int(part) for part in text.split(","))
    return channels, height, width


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _particles(text: str) -> int | list[int]:
    numbers = [int(part) for part in text.split(",")]
    return numbers if "," in text else numbers[0]
