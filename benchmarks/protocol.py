"""The whole protocol on one GPU, on CIFAR-10, in slices: started again and again it goes on where it was.

    python -m benchmarks.protocol --budget-minutes 8 --out DIR [--data cifar10.npz] [--only gpu cost runs/resnet20_30]
    python -m benchmarks.protocol --out DIR --export STATE.zip      what another machine needs to go on, small
    python -m benchmarks.protocol --out DIR --import STATE.zip      there, with the next slice
    python -m benchmarks.protocol tables [--out DIR]                tables and figures anew, from protocol.json

In this order: the tables of `benchmarks.gpu`; what the naive loop costs; ResNet-20 by swamp, imp and imp+swa, 14 cycles
of 30 epochs, seeds packed as lanes; the same at 150 epochs, swamp and imp, seed 0; WRN-28-2 at 30 epochs, seed by seed;
N = 1, 2, 4, 8, 16. After the runs of each network the barriers and the Hessian's traces of the first three seeds. A
slice stops as a signal stops a run, with a checkpoint, and ends with what is done and left; each leaves
benchmarks/results/protocol_*.

Data: an .npz with train_images, train_labels, test_images, test_labels, as shared/data/decode_cifar10.py writes it from
the JPEG copy beside it; where that script is there, it is run and --data may be left out. Accuracies on the JPEG copy
compare with each other, not with published CIFAR-10 figures, and those of 30 epochs are not of the paper's 150.

An export takes at most 3 MB, so that it may be committed: the runs that are furthest; one that has no room begins anew
there, and is named. A run of ResNet-20 takes 2.0 MB after cycle 0, 1.3 MB after cycle 6 and 0.1 MB when it is finished,
where its analysis has kept up; 1.0 MB of it is the ticket, which the methods of a seed share. On machines that are had
for minutes, --seeds-at-once 1 leaves no more unfinished than fits.

--rehearse does all of it at a tiny size, on the CPU and on scikit-learn's digits. Without a GPU results stay under DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from benchmarks import gpu, protocol_results, timing
from benchmarks.cifar10 import decoded
from swamp_fast import SwampConfig, naive_swamp, sweep
from swamp_fast.analysis import Analysis, hessian_trace, loss_barrier
from swamp_fast.engines.fused.estimate import estimate, measured_ceilings
from swamp_fast.methods import METHODS
from swamp_fast.models import build_model
from swamp_fast.problem.arguments import Arguments
from swamp_fast.problem.prepare import prepare
from swamp_fast.runs.checkpoint import (
    RunDirectory,
    Snapshot,
    checksum,
    load_tensors,
    read_snapshot,
    save_tensors,
    write,
)

SOFT = 0.9  # of the budget: a run that is under way then stops in order; what has not stopped at its end stops at once
LOOKED_AT = 3  # seeds whose runs are analysed
VAL = 0.1  # of the training data, held out
LARGEST = 2_900_000  # bytes of what an export holds; its directory of names takes under 100 kB


@dataclass(frozen=True)
class Study:
    """Runs that are told of together: methods, by their settings, under the same seeds."""

    name: str
    model: str
    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: range
    at_once: int | None = None  # so many seeds in a bank; None: all

    def packs(self) -> list[range]:
        """The seeds that are trained in one bank, if they fit it."""
        step = self.at_once or len(self.seeds)
        return [self.seeds[begin : begin + step] for begin in range(0, len(self.seeds), step)]

    def config(self, method: str, seed: int) -> SwampConfig:
        """The settings of one run."""
        return SwampConfig.of(None, {**self.settings, **self.methods[method], "seed": seed})


@dataclass(frozen=True)
class Item:
    """A part of the protocol; `do` returns whether it is over. One that is not resumable is done within one slice."""

    name: str
    do: Callable[[], bool]
    resumable: bool = True


class Budget:
    """A context in which the system's timer sends this process SIGTERM at SOFT of the budget, and from its end on.

    What is `working` then ends with SystemExit; a run ends after its step. One signal isn't enough, since Python
    ignores an exception that is raised in a destructor.
    """

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds
        self.working = self.asked = False

    @property
    def spent(self) -> float:
        """The fraction of the budget that is spent."""
        return (time.monotonic() - self.began) / self.seconds

    def __enter__(self) -> Budget:
        self.before = signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, SOFT * self.seconds, (1 - SOFT) * self.seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, self.before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.working:
            raise SystemExit(128 + number)


class Protocol:
    """The items and the folder that holds what came of them.

    marks  DIR/protocol.json: item -> "done", or how it failed
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
        """All, in order."""
        items = [Item(f"gpu/{name}", partial(self.table_of, name), False) for name in gpu.SLICES]
        resnet20, long, wrn, particles = self.studies
        for model in dict.fromkeys((resnet20.model, wrn.model)):
            items += [Item(f"cost/{what.__name__}_{model}", partial(what, model), False)
                      for what in (self.naive, self.roofline)]  # fmt: skip
        for study in (resnet20, long, wrn, particles):
            for seeds in study.packs():
                of = study.name if seeds == study.seeds else f"{study.name}/{'-'.join(map(str, seeds))}"
                items.append(Item(f"runs/{of}", partial(self.run, study, seeds)))
                if study is not particles and seeds[0] < LOOKED_AT:
                    items.append(Item(f"analysis/{of}", partial(self.analyse, study, seeds, f"runs/{of}")))
        return items

    def go_on(self, minutes: float, only: Sequence[str] = ("",)) -> list[str]:
        """Do what is left, in order, until the budget is spent; returns the names of what is left then."""
        items = [item for item in self.items() if item.name.startswith(tuple(only))]
        with Budget(60 * minutes) as budget:
            for item in items:
                if item.name in self.marks:
                    continue
                if budget.asked:
                    break
                began, files = budget.spent, self.files()
                print(f"{item.name}: begins at {began:.0%} of the budget", flush=True)
                try:
                    budget.working = True
                    over = item.do()
                    budget.working = False
                    if over:
                        self.mark(item, "done")
                except (SystemExit, Exception) as error:  # C code makes SystemErrors of a SystemExit
                    budget.working = False
                    budget.asked = budget.asked or budget.spent >= SOFT or isinstance(error, SystemExit)
                    if not budget.asked:
                        traceback.print_exc()
                        self.mark(item, f"failed: {type(error).__name__}: {error}")
                    elif began < 0.1 and budget.spent >= SOFT and not item.resumable:
                        self.mark(item, f"failed: it takes longer than {minutes:g} minutes")
                    elif item.resumable and files == self.files():
                        print(f"{item.name}: nothing of it could be kept; a slice must outlast its start", flush=True)
            if budget.asked and budget.spent < SOFT:  # someone else's signal
                raise SystemExit(128 + signal.SIGTERM)
        return [item.name for item in items if item.name not in self.marks]

    def files(self) -> dict[Path, int]:
        """What is in the folder, and since when."""
        return {path: path.stat().st_mtime_ns for path in self.out.rglob("*") if path.is_file()}

    def mark(self, item: Item, what: str) -> None:
        """Record that an item is over."""
        self.marks[item.name] = what
        self.write("protocol.json", self.marks)

    def read(self, name: str) -> Any:
        """The content of a JSON file, None if there is none."""
        path = self.out / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all."""
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        write(self.out / name, (json.dumps(content, indent=1) + "\n").encode())

    def source(self) -> str:
        """What trains: digits in a rehearsal, else the .npz, decoded from the JPEG copy if none is given."""
        if self.rehearse:
            return "digits"
        if self.data is None:
            self.data = decoded()
        return str(self.data)

    def model(self, name: str) -> nn.Module:
        """A network for the pictures."""
        return build_model(name, *self.shape, 10)

    def table_of(self, slice_: str) -> bool:
        """One slice of benchmarks.gpu, in a process of its own that ends with this one."""
        if not self.rehearse and not torch.cuda.is_available():
            print("skipped: no CUDA device here", flush=True)
            return False
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", slice_, "--out", str(self.out / "gpu")]
        command += ["--rehearse"] if self.rehearse else ["--data", self.source()]
        (self.out / "gpu").mkdir(exist_ok=True)
        process = subprocess.Popen(command, cwd=timing.ROOT, start_new_session=True)
        try:
            if process.wait():
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return True

    def naive(self, model: str) -> bool:
        """Time the naive loop on a few epochs of one particle, channels last, after as many to warm up."""
        study = next(study for study in self.studies if study.model == model)
        epochs = 1 if self.rehearse else 5
        own = {**study.settings, "particles": 1, "cycles": 1, "epochs": epochs, "ticket_epochs": 0, "progress": False}
        network = self.model(model).to(memory_format=torch.channels_last)
        row = naive_swamp(network, self.source(), val=VAL, **own).history[-1]
        found = {"epochs": epochs, "seconds_an_epoch": row["train_seconds"] / epochs}
        found["evaluation_seconds_a_model"] = (row["seconds"] - row["train_seconds"]) / 2  # the particle, the average
        self.write(f"cost/naive_{model}.json", {**found, "precision": study.settings["precision"]})
        return True

    def roofline(self, model: str) -> bool:
        """How long a particle's step takes at the device's measured ceilings, if products and bytes overlap."""
        study = next(study for study in self.studies if study.model == model)
        config = study.config(next(iter(study.methods)), 0)
        problem = prepare(
            self.model(model), self.source(), None, Arguments(val=VAL), config=config, settings={"progress": False}
        )
        ceilings = measured_ceilings(problem.device, config.precision)
        pictures = torch.zeros(config.batch_size, *self.shape)
        _, cost = estimate(problem.original, pictures, config.precision)
        found = {"steps_an_epoch": len(problem.bounds), "seconds_a_step": cost.seconds(ceilings)}
        self.write(
            f"cost/roofline_{model}.json", {**found, **asdict(ceilings), "moved": cost.moved, "flop": cost.flops}
        )
        return True

    def run(self, study: Study, seeds: range) -> bool:
        """Train what is missing, the runs that can share a step in one bank."""
        there = {(method, seed) for method, seed, folder in self.runs_of(study) if finished(folder)}
        points = [
            {**own, "seed": seed}
            for seed in seeds
            for method, own in study.methods.items()
            if (method, seed) not in there
        ]
        make = partial(self.model, study.model)
        found = sweep(make, self.source(), grid=points, out=self.out / study.model, val=VAL, **study.settings)
        errors = [f"{run.point}: {run.error}" for run in found.runs if run.error is not None]
        if errors:
            raise RuntimeError("; ".join(errors))
        return True

    def runs_of(self, study: Study) -> Iterator[tuple[str, int, Path]]:
        """Method, seed and folder of each run that was begun."""
        there = {}
        for path in (self.out / study.model / "runs").glob("*/run.json"):
            there[_key(SwampConfig.of(None, json.loads(path.read_text())["config"]))] = path.parent
        for method, seed in itertools.product(study.methods, study.seeds):
            folder = there.get(_key(study.config(method, seed)))
            if folder is not None:
                yield method, seed, folder

    def analyse(self, study: Study, seeds: range, runs: str) -> bool:
        """Barrier to the next cycle and trace of the Hessian, of each cycle that can be looked at; float32, no TF32."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # nothing else here has float32
        on: Analysis | None = None
        probes, samples = (2, 128) if self.rehearse else (32, 2048)
        for method, seed, folder in self.runs_of(study):
            if seed not in seeds[:LOOKED_AT]:
                continue
            config, name = study.config(method, seed), f"analysis/{folder.name}.json"
            rows = self.read(name) or []
            last = RunDirectory(folder).cycles_done() - 1
            for cycle in range(len(rows), last + (last == config.cycles)):
                if on is None:
                    own = config.replace(precision="float32", progress=False)
                    kept = 256 if self.rehearse else 10_000
                    on = Analysis(self.model(study.model), self.source(), val=VAL, config=own, samples=kept)
                here = read_snapshot(RunDirectory(folder).cycle_path(cycle))
                trace = hessian_trace(on, here.state, here.masks, probes=probes, samples=samples)
                row = {"cycle": cycle, "density": here.row["density"], "trace": trace.trace, "scaled": trace.scaled}
                row |= {"half_width": trace.half_width, "norm": trace.norm, "probes": probes}
                if cycle < last:
                    after = read_snapshot(RunDirectory(folder).cycle_path(cycle + 1))
                    row["barriers"] = loss_barrier(on, here.state, after.state).barriers()
                rows.append(row)
                self.write(name, rows)
        return runs in self.marks

    def collected(self) -> dict[str, Any]:
        """All that was measured so far, for the tables."""
        rows: list[dict[str, Any]] = []
        looked_at: list[dict[str, Any]] = []
        for study in self.studies:
            for method, seed, folder in self.runs_of(study):
                about = json.loads((folder / "run.json").read_text())
                own = {"study": study.name, "method": method, "seed": seed}
                told = {"at_once": about.get("at_once", 1), "engine": about["engine"].get("engine"), **about["place"]}
                for row in history(folder):
                    rows.append({**own, **{name: row[name] for name in protocol_results.KEPT}, **told})
                looked_at += [{**own, **row} for row in self.read(f"analysis/{folder.name}.json") or []]
        cost = {path.stem: json.loads(path.read_text()) for path in sorted((self.out / "cost").glob("*.json"))}
        tables = {path.stem: json.loads(path.read_text()) for path in sorted((self.out / "gpu").glob("*.json"))}
        about = timing.header(1) | {"data": Path(self.source()).name, "items": self.marks}
        about["note"] = "a rehearsal, whose figures mean nothing" if self.rehearse else protocol_results.NOTE
        told = {study.name: {"model": study.model, **study.settings} for study in self.studies}
        return {**about, "studies": told, "rows": rows, "analysis": looked_at, "cost": cost, "gpu": tables}

    def export(self, file: Path) -> None:
        """Write what another machine needs to go on at each run's last whole cycle, as a .zip.

        Of a run that is its ticket, its last cycle and the cycles that are still to be analysed; of the other cycles
        the row. A ticket that several runs have is there once; a finished run needs none. Runs that have no room in
        LARGEST bytes are left out, those first that have done least.
        """
        analysed = {
            folder: len(self.read(f"analysis/{folder.name}.json") or [])
            for study in self.studies[:-1]
            for _, seed, folder in self.runs_of(study)
            if seed < LOOKED_AT
        }
        runs = sorted(self.out.glob("*/runs/*/run.json"))
        runs.sort(key=lambda path: len(history(path.parent)), reverse=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as made, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in itertools.chain.from_iterable(self.out.glob(f"{part}*.json") for part in ("", "cost/", "gpu/")):
                archive.write(path, path.relative_to(self.out))
            for path in runs:
                own, place = Path(made) / path.parent.name, path.parent.relative_to(self.out)
                ticket = _slim(path.parent, own, analysed.get(path.parent))
                found = {each: f"{place}/{each.name}" for each in sorted(own.iterdir())}
                analysis = self.out / "analysis" / f"{own.name}.json"
                if analysis.exists():
                    found[analysis] = f"analysis/{own.name}.json"
                if ticket is not None and f"tickets/{ticket.name}" not in archive.namelist():
                    found[ticket] = f"tickets/{ticket.name}"
                if sum(info.compress_size for info in archive.infolist()) + sum(map(_compressed, found)) > LARGEST:
                    print(f"no room for {place}, which begins anew there", flush=True)
                    continue
                for each, name in found.items():
                    archive.write(each, name)
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB", flush=True)

    def take_over(self, file: Path) -> None:
        """Unpack what `export` wrote; what the folder has already is left as it is."""
        with tempfile.TemporaryDirectory() as made:
            shutil.unpack_archive(file, made, "zip")
            for path in sorted(each for each in Path(made).rglob("*") if each.is_file()):
                to = self.out / path.relative_to(made)
                if path.parent.name != "tickets" and not to.exists():
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, to)
            for path in Path(made).glob("*/runs/*/run.json"):
                _restore(RunDirectory(self.out / path.parent.relative_to(made)), Path(made) / "tickets")
        self.marks = self.read("protocol.json") or {}


def studies(seeds: int, rehearse: bool, at_once: int | None = None) -> list[Study]:
    """ResNet-20 at 30 and at 150 epochs, WRN-28-2, and numbers of particles."""
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


def _key(config: SwampConfig) -> str:
    return json.dumps(config.identity(), sort_keys=True)


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's cycles."""
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(folder: Path) -> bool:
    """Whether all cycles of a run are done, here or where it was exported."""
    return len(history(folder)) > RunDirectory(folder).about()["config"]["cycles"]


def _slim(folder: Path, to: Path, analysed: int | None) -> Path | None:
    """Copy a run's files, with nothing but the row of cycles that nobody needs; returns its ticket, if it needs one.

    analysed  how many cycles are; None: none will be
    """
    there, copy = RunDirectory(folder), RunDirectory(to)
    there.about()  # whose files these are
    copy.make()
    for name in ("run.json", "config.toml", "history.jsonl"):
        if (folder / name).exists():
            shutil.copy(folder / name, to / name)
    done, over = there.cycles_done(), finished(folder)
    needed = done if analysed is None else analysed
    if not over:
        needed = min(needed, done - 1)
    elif needed >= done:
        return None
    for cycle in range(done):
        if cycle >= needed:
            shutil.copy(there.cycle_path(cycle), to)
            continue
        tensors, metadata = Snapshot({}, {}, there.cycle(cycle).row).packed()
        save_tensors(copy.cycle_path(cycle), tensors, {**metadata, "run": there.run})
    ticket = there.ticket()
    if over or ticket is None:
        return None
    path = to.parent / f"{checksum(ticket, {})}.safetensors"
    save_tensors(path, ticket)
    (to / "ticket").write_text(path.stem)
    return path


def _compressed(path: Path) -> int:
    """Bytes in an archive, about."""
    return len(zlib.compress(path.read_bytes()))


def _restore(folder: RunDirectory, tickets: Path) -> None:
    """Write the ticket of a run that goes on here."""
    of = folder.path / "ticket"
    if of.exists():
        folder.about()  # whose file it is
        folder.write_ticket(load_tensors(tickets / f"{of.read_text()}.safetensors")[0])
        of.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """Do a slice, write the tables, and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "tables"], default="run")
    parser.add_argument("--out", type=Path, help="the folder on which the next slice goes on")
    parser.add_argument("--budget-minutes", type=float, default=8.0)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an .npz")
    parser.add_argument("--seeds", type=int, default=5, help="of ResNet-20")
    parser.add_argument("--seeds-at-once", type=int, help="of ResNet-20, in one bank; all unless told")
    parser.add_argument("--only", nargs="+", default=[""], help="items whose names begin so")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--export", type=Path, help="write the state into this .zip, and end")
    parser.add_argument("--import", type=Path, dest="imported", help="take the state of this .zip over first")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, results under DIR")
    given = parser.parse_args(arguments)
    if given.what == "tables":
        protocol_results.tables(timing.RESULTS if given.out is None else given.out / "results")
        return
    if given.out is None:
        parser.error("--out DIR is needed")
    protocol = Protocol(given.out, given.data, given.seeds, given.rehearse, given.seeds_at_once)
    if given.imported is not None:
        protocol.take_over(given.imported)
    if given.export is not None:
        protocol.export(given.export)
        return
    if given.retry:
        protocol.marks = {name: what for name, what in protocol.marks.items() if what == "done"}
    protocol.source()  # without data nothing is begun
    left = protocol.go_on(given.budget_minutes, given.only)
    on_gpu = torch.cuda.is_available() and not given.rehearse
    results = timing.RESULTS if on_gpu else given.out / "results"
    protocol_results.keep(protocol.collected(), results)
    protocol_results.tables(results)
    failed = [f"{name} {what}" for name, what in protocol.marks.items() if what != "done"]
    done = len(protocol.marks) - len(failed)
    print(
        "\n".join([*failed, f"{done} items done, {len(failed)} failed; left: {', '.join(left) or 'nothing'}"]),
        flush=True,
    )


if __name__ == "__main__":
    main()
