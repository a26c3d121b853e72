"""Runs the whole protocol of experiments on CIFAR-10, on one GPU, in slices: each call continues the one before.

    python -m benchmarks.protocol --budget-minutes 8 --out DIR [--data cifar10.npz] [--only gpu cost runs/resnet20_30]
    python -m benchmarks.protocol --out DIR --export STATE.zip      write a small file to continue from elsewhere
    python -m benchmarks.protocol --out DIR --import STATE.zip      continue there with the next slice
    python -m benchmarks.protocol tables [--out DIR]                rewrite tables and figures from protocol.json

The items, in order:

1. the tables of `benchmarks.gpu`, and the cost of the naive loop
2. ResNet-20 by swamp, imp and imp+swa: 14 cycles of 30 epochs, with the seeds trained together in one bank
3. ResNet-20 by swamp and imp with 150 epochs, seed 0 only
4. WRN-28-2 with 30 epochs, one seed after the other
5. swamp with N = 1, 2, 4, 8, 16 particles

After the runs of each network, barriers and Hessian traces of the first three seeds are computed. At its end, a slice
stops with a checkpoint, as a run does at a signal, prints what is done and what is left, and writes
benchmarks/results/protocol_*.

Data: an .npz with train_images, train_labels, test_images, test_labels, such as shared/data/decode_cifar10.py makes
from the JPEG copy beside it. If that script exists it is run, and --data may be omitted. Accuracies on the JPEG copy
can't be compared with published CIFAR-10 results, nor can those of 30 epochs with the paper's 150.

An export takes at most 3 MB, so that it can be committed. It holds the runs with the most finished cycles. A run that
doesn't fit is named in the output, and starts from the beginning on the other machine. A run of ResNet-20 takes 2.0 MB
after cycle 0, 1.3 MB after cycle 6, and 0.1 MB once it is finished and analysed. Of this, 1.0 MB is the ticket, which
all methods of a seed share. On machines that are available for minutes only, --seeds-at-once 1 keeps the unfinished
runs small enough.

--rehearse does everything at a tiny size, on the CPU and on scikit-learn's digits. Without a GPU, results go to DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import gpu, measuring, protocol_results
from benchmarks.budget import Budget
from benchmarks.children import child_process
from benchmarks.cifar10 import decoded
from benchmarks.protocol_transport import export_state, finished, history, import_state
from swamp_fast import SwampConfig, naive_swamp, sweep
from swamp_fast.analysis import Analysis, hessian_trace, loss_barrier
from swamp_fast.engines.fused.estimate import estimate, measured_ceilings
from swamp_fast.methods import METHODS
from swamp_fast.models import build_model
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare
from swamp_fast.runs.files import write
from swamp_fast.runs.folder import RunDirectory, read_snapshot

ANALYSED_SEEDS = 3  # number of seeds of each study that are analysed
VAL = 0.1  # fraction of the training data to hold out


@dataclass(frozen=True)
class Study:
    """Runs that are reported together: methods, given by their settings, under the same seeds.

    at_once  number of seeds that are trained in one bank; None means all
    """

    name: str
    model: str
    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: range
    at_once: int | None = None

    def packs(self) -> list[range]:
        """Return the groups of seeds that are to be trained in one bank, if memory suffices."""
        step = self.at_once or len(self.seeds)
        return [self.seeds[begin : begin + step] for begin in range(0, len(self.seeds), step)]

    def config(self, method: str, seed: int) -> SwampConfig:
        """Return the settings of one run."""
        return SwampConfig.of(None, {**self.settings, **self.methods[method], "seed": seed})


@dataclass(frozen=True)
class Item:
    """A part of the protocol. `do` works on it and returns whether it is complete.

    An item that is not resumable must be completed in one slice.
    """

    name: str
    do: Callable[[], bool]
    resumable: bool = True


class Protocol:
    """The items of the protocol, and the folder with their results.

    marks  content of DIR/protocol.json: item -> "done", or its error
    """

    def __init__(
        self, out: Path, data: Path | None = None, seeds: int = 5, rehearse: bool = False, at_once: int | None = None
    ) -> None:
        self.out, self.data, self.rehearse = out, data, rehearse
        out.mkdir(parents=True, exist_ok=True)
        self.marks: dict[str, str] = self.read("protocol.json") or {}
        self.shape = (1, 8, 8) if rehearse else (3, 32, 32)
        self.studies = studies(seeds, rehearse, at_once)

    def items(self) -> list[Item]:
        """Return all items in order."""
        items = [Item(f"gpu/{name}", partial(self.table_of, name), False) for name in gpu.SLICES]
        resnet20, long, wrn, particles = self.studies
        for model in dict.fromkeys((resnet20.model, wrn.model)):
            items += [Item(f"cost/{what.__name__}_{model}", partial(what, model), False)
                      for what in (self.naive, self.roofline)]  # fmt: skip
        for study in (resnet20, long, wrn, particles):
            for seeds in study.packs():
                name = study.name if seeds == study.seeds else f"{study.name}/{'-'.join(map(str, seeds))}"
                items.append(Item(f"runs/{name}", partial(self.run, study, seeds)))
                if study is not particles and seeds[0] < ANALYSED_SEEDS:
                    items.append(Item(f"analysis/{name}", partial(self.analyse, study, seeds, f"runs/{name}")))
        return items

    def run_items(self, minutes: float, only: Sequence[str] = ("",)) -> list[str]:
        """Work on unfinished items in order until the budget is spent. Return the names of those still unfinished.

        only  prefixes of the names of the items to work on
        """
        items = [item for item in self.items() if item.name.startswith(tuple(only))]
        with Budget(60 * minutes) as budget:
            for item in items:
                if item.name not in self.marks and not budget.interrupted:
                    self._run_item(item, budget, minutes)
            if budget.interrupted and not budget.is_over:  # the signal came from outside, not from the budget
                raise SystemExit(128 + signal.SIGTERM)
        return [item.name for item in items if item.name not in self.marks]

    def _run_item(self, item: Item, budget: Budget, minutes: float) -> None:
        began, files = budget.spent, self.files()
        print(f"{item.name}: starts at {began:.0%} of the budget", flush=True)
        try:
            budget.working = True
            complete = item.do()
            budget.working = False
            if complete:
                self.mark(item, "done")
        except (SystemExit, Exception) as error:  # Exception too, since C code turns a SystemExit into a SystemError
            budget.working = False
            budget.interrupted = budget.interrupted or budget.is_over or isinstance(error, SystemExit)
            if not budget.interrupted:
                traceback.print_exc()
                self.mark(item, f"failed: {type(error).__name__}: {error}")
            elif began < 0.1 and budget.is_over and not item.resumable:
                self.mark(item, f"failed: it takes longer than {minutes:g} minutes")
            elif item.resumable and files == self.files():
                print(f"{item.name}: the slice ended before anything could be kept; give it more minutes", flush=True)

    def files(self) -> dict[Path, int]:
        """Return the files in the folder, with the time of the last change of each."""
        return {path: path.stat().st_mtime_ns for path in self.out.rglob("*") if path.is_file()}

    def mark(self, item: Item, outcome: str) -> None:
        """Record the outcome of an item that has ended."""
        self.marks[item.name] = outcome
        self.write("protocol.json", self.marks)

    def read(self, name: str) -> Any:
        """Return the content of a JSON file, or None if there is none."""
        path = self.out / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file atomically."""
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        write(self.out / name, (json.dumps(content, indent=1) + "\n").encode())

    def source(self) -> str:
        """Return the training data: digits in a rehearsal, else the given .npz or the decoded JPEG copy."""
        if self.rehearse:
            return "digits"
        if self.data is None:
            self.data = decoded()
        return str(self.data)

    def model(self, name: str) -> nn.Module:
        """Build a network for pictures of the protocol's data."""
        return build_model(name, *self.shape, 10)

    def table_of(self, slice_: str) -> bool:
        """Run one slice of benchmarks.gpu in a child process, which is ended if this process ends."""
        if not self.rehearse and not torch.cuda.is_available():
            print("skipped: there is no CUDA device", flush=True)
            return False
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", slice_, "--out", str(self.out / "gpu")]
        command += ["--rehearse"] if self.rehearse else ["--data", self.source()]
        (self.out / "gpu").mkdir(exist_ok=True)
        with child_process(command, cwd=measuring.ROOT) as process:
            if process.wait():
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        return True

    def naive(self, model: str) -> bool:
        """Time a few epochs of the naive loop with one particle, channels last, after as many warm-up epochs."""
        study = next(study for study in self.studies if study.model == model)
        epochs = 1 if self.rehearse else 5
        changed = {"particles": 1, "cycles": 1, "epochs": epochs, "ticket_epochs": 0, "progress": False}
        network: Any = self.model(model)
        network = network.to(memory_format=torch.channels_last)
        row = naive_swamp(network, self.source(), val=VAL, **{**study.settings, **changed}).history[-1]
        # The time to evaluate one model. The run evaluated two, the particle and the average.
        evaluation = (row["seconds"] - row["train_seconds"]) / 2
        cost = {"epochs": epochs, "seconds_an_epoch": row["train_seconds"] / epochs}
        cost |= {"evaluation_seconds_a_model": evaluation, "precision": study.settings["precision"]}
        self.write(f"cost/naive_{model}.json", cost)
        return True

    def roofline(self, model: str) -> bool:
        """Compute the time of a particle-step at the device's measured ceilings, if arithmetic and copies overlap."""
        study = next(study for study in self.studies if study.model == model)
        config = study.config(next(iter(study.methods)), 0)
        problem = prepare(
            self.model(model), self.source(), None, Arguments(val=VAL), config=config, settings={"progress": False}
        )
        ceilings = measured_ceilings(problem.device, config.precision)
        pictures = torch.zeros(config.batch_size, *self.shape)
        _, cost = estimate(problem.original, pictures, config.precision)
        steps = {"steps_an_epoch": len(problem.bounds), "seconds_a_step": cost.seconds(ceilings)}
        content = {**steps, **asdict(ceilings), "moved": cost.moved, "flop": cost.flops}
        self.write(f"cost/roofline_{model}.json", content)
        return True

    def run(self, study: Study, seeds: range) -> bool:
        """Train the missing runs of these seeds. Runs that can share a bank are trained together."""
        done = {(method, seed) for method, seed, folder in self.runs_of(study) if finished(folder)}
        points = [
            {**settings, "seed": seed}
            for seed in seeds
            for method, settings in study.methods.items()
            if (method, seed) not in done
        ]
        make = partial(self.model, study.model)
        swept = sweep(make, self.source(), grid=points, out=self.out / study.model, val=VAL, **study.settings)
        errors = [f"{run.point}: {run.error}" for run in swept.runs if run.error is not None]
        if errors:
            raise RuntimeError("; ".join(errors))
        return True

    def runs_of(self, study: Study) -> Iterator[tuple[str, int, Path]]:
        """Yield the method, seed and folder of each run that was started."""
        folders = {}
        for path in (self.out / study.model / "runs").glob("*/run.json"):
            folders[_identity(SwampConfig.of(None, json.loads(path.read_text())["config"]))] = path.parent
        for method, seed in itertools.product(study.methods, study.seeds):
            folder = folders.get(_identity(study.config(method, seed)))
            if folder is not None:
                yield method, seed, folder

    def analyse(self, study: Study, seeds: range, runs: str) -> bool:
        """Compute each cycle's Hessian trace and barrier to the next cycle, in float32 without TF32.

        runs  name of the item that trains these runs; the analysis can't be complete before that item is
        """
        # This stays off for later items too, none of which uses float32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        analysis: Analysis | None = None
        probes, samples = (2, 128) if self.rehearse else (32, 2048)
        for method, seed, folder in self.runs_of(study):
            if seed not in seeds[:ANALYSED_SEEDS]:
                continue
            config, name = study.config(method, seed), f"analysis/{folder.name}.json"
            rows = self.read(name) or []
            last = RunDirectory(folder).cycles_done() - 1
            for cycle in range(len(rows), last + (last == config.cycles)):
                if analysis is None:
                    changed = config.replace(precision="float32", progress=False)
                    count = 256 if self.rehearse else 10_000
                    analysis = Analysis(self.model(study.model), self.source(), val=VAL, config=changed, samples=count)
                snapshot = read_snapshot(RunDirectory(folder).cycle_path(cycle))
                trace = hessian_trace(analysis, snapshot.state, snapshot.masks, probes=probes, samples=samples)
                row = {"cycle": cycle, "density": snapshot.row["density"], "trace": trace.trace, "scaled": trace.scaled}
                row |= {"half_width": trace.half_width, "norm": trace.norm, "probes": probes}
                if cycle < last:
                    after = read_snapshot(RunDirectory(folder).cycle_path(cycle + 1))
                    row["barriers"] = loss_barrier(analysis, snapshot.state, after.state).barriers()
                rows.append(row)
                self.write(name, rows)
        return bool(runs in self.marks)

    def measurements(self) -> dict[str, Any]:
        """Return all measurements so far, from which the tables are made."""
        rows: list[dict[str, Any]] = []
        analyses: list[dict[str, Any]] = []
        for study in self.studies:
            for method, seed, folder in self.runs_of(study):
                about = json.loads((folder / "run.json").read_text())
                run = {"study": study.name, "method": method, "seed": seed}
                place = {"at_once": about.get("at_once", 1), "engine": about["engine"].get("engine"), **about["place"]}
                for row in history(folder):
                    rows.append({**run, **{name: row[name] for name in protocol_results.COLUMNS}, **place})
                analyses += [{**run, **row} for row in self.read(f"analysis/{folder.name}.json") or []]
        cost = {path.stem: json.loads(path.read_text()) for path in sorted((self.out / "cost").glob("*.json"))}
        tables = {path.stem: json.loads(path.read_text()) for path in sorted((self.out / "gpu").glob("*.json"))}
        about = measuring.header(1) | {"data": Path(self.source()).name, "items": self.marks}
        about["note"] = "a rehearsal, whose figures mean nothing" if self.rehearse else protocol_results.NOTE
        settings = {study.name: {"model": study.model, **study.settings} for study in self.studies}
        return {**about, "studies": settings, "rows": rows, "analysis": analyses, "cost": cost, "gpu": tables}

    def export(self, file: Path) -> None:
        """Write a .zip with which another machine can continue."""
        analysed = {
            folder: len(self.read(f"analysis/{folder.name}.json") or [])
            for study in self.studies[:-1]
            for _, seed, folder in self.runs_of(study)
            if seed < ANALYSED_SEEDS
        }
        export_state(self.out, file, analysed)

    def take_over(self, file: Path) -> None:
        """Take over the state that `export` wrote on another machine."""
        import_state(self.out, file)
        self.marks = self.read("protocol.json") or {}


def studies(seeds: int, rehearse: bool, at_once: int | None = None) -> list[Study]:
    """Return the four studies: ResNet-20 with 30 and with 150 epochs, WRN-28-2, and several numbers of particles."""
    settings: dict[str, Any] = {"particles": 4, "cycles": 14, "epochs": 30, "ticket_epochs": 10, "batch_size": 128}
    settings |= {"augment": "crop_flip", "precision": "bfloat16" if torch.cuda.is_available() else "float32"}
    small, large, long, wide = "resnet20", "wrn28_2", {"epochs": 150}, range(10)
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    if rehearse:
        settings |= {"particles": 2, "cycles": 2, "epochs": 2, "ticket_epochs": 1, "augment": "none"}
        settings |= {"precision": "float32", "device": "cpu", "engine": "eager"}
        small, large, long, wide, counts, seeds = "small_cnn", "mlp", {"epochs": 3}, range(2), (1, 2, 4), min(seeds, 2)
    base = SwampConfig.of(None, settings)
    methods = {method: METHODS[method].settings(base) for method in ("swamp", "imp", "imp+swa")}
    two = {method: methods[method] for method in ("swamp", "imp")}
    by_count = {f"N = {count}": {"particles": count} for count in counts}
    return [
        Study(f"{small}_30", small, settings, methods, range(seeds), at_once),
        Study(f"{small}_150", small, {**settings, **long}, two, range(1)),
        Study(f"{large}_30", large, settings, methods, wide, 1),
        Study("particles", small, settings, by_count, range(seeds), at_once),
    ]


def _identity(config: SwampConfig) -> str:
    return json.dumps(config.identity(), sort_keys=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a slice, write the tables, and print what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "tables"], default="run")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for all results; the next slice continues from it"
    )
    parser.add_argument("--budget-minutes", type=float, default=8.0, help="minutes for this slice, default 8")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds of ResNet-20, default 5")
    parser.add_argument("--seeds-at-once", type=int, help="seeds of ResNet-20 in one bank, default all")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="only items whose names begin with this"
    )
    parser.add_argument("--retry", action="store_true", help="try failed items again")
    parser.add_argument("--export", type=Path, metavar="ZIP", help="write the state into this .zip and exit")
    parser.add_argument(
        "--import", type=Path, metavar="ZIP", dest="imported", help="first take over the state in this .zip"
    )
    parser.add_argument("--rehearse", action="store_true", help="run a tiny version on the CPU, with results in DIR")
    given = parser.parse_args(arguments)
    if given.what == "tables":
        protocol_results.tables(measuring.RESULTS if given.out is None else given.out / "results")
        return
    if given.out is None:
        parser.error("--out DIR is required")
    protocol = Protocol(given.out, given.data, given.seeds, given.rehearse, given.seeds_at_once)
    if given.imported is not None:
        protocol.take_over(given.imported)
    if given.export is not None:
        protocol.export(given.export)
        return
    if given.retry:
        protocol.marks = {name: outcome for name, outcome in protocol.marks.items() if outcome == "done"}
    protocol.source()  # if there are no data, raises before anything is started
    left = protocol.run_items(given.budget_minutes, given.only)
    on_gpu = torch.cuda.is_available() and not given.rehearse
    results = measuring.RESULTS if on_gpu else given.out / "results"
    protocol_results.keep(protocol.measurements(), results)
    protocol_results.tables(results)
    failed = [f"{name} {outcome}" for name, outcome in protocol.marks.items() if outcome != "done"]
    done = len(protocol.marks) - len(failed)
    print(
        "\n".join([*failed, f"{done} items done, {len(failed)} failed; left: {', '.join(left) or 'nothing'}"]),
        flush=True,
    )


if __name__ == "__main__":
    main()
