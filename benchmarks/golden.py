"""Whether the bits of results are still those of another commit: python -m benchmarks.golden --against COMMIT.

Eight small calls (benchmarks/golden_calls.py) run with that commit's code and with this checkout's, each in a process
of its own, on the same machine and with as many threads; masks, weights of every cycle and histories are compared, but
for seconds and memory. The first difference of each call is named, and any makes the status 1. A call is compared as it
is: bits that the earlier code left to a stopwatch differ by themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import golden_calls
from swamp_fast import _C

ROOT = Path(__file__).parent.parent
LINKS = {"swamp_fast/kernels": "kernels", "swamp_fast/cuda_sources": "csrc/cuda"}  # as they are installed
BUILT_FROM = ("setup.py", "csrc/cpu")


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The files of a commit, with its extension, in a folder that is there for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            install(tree, commit)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*command: str) -> None:
    """Run git in this checkout. Raises CalledProcessError."""
    subprocess.run(["git", *command], cwd=ROOT, check=True)


def install(tree: Path, commit: str) -> None:
    """Put what installing would put into a tree; the extension is built unless it would be the one that is here."""
    for link, target in LINKS.items():
        if not (tree / link).exists() and (tree / target).exists():
            (tree / link).symlink_to(tree / target)
    if subprocess.run(["git", "diff", "--quiet", commit, "--", *BUILT_FROM], cwd=ROOT).returncode == 0:
        extension = Path(_C.__file__)
        (tree / "swamp_fast" / extension.name).symlink_to(extension)
        return
    print(f"building the extension of {commit}", flush=True)
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=True)


def results(trees: Sequence[Path], name: str) -> list[dict[str, Any]]:
    """What one call gives with the code of each tree, in processes of their own, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"results {number}" for number in range(len(trees))]
        command = [sys.executable, "-W", "ignore", golden_calls.__file__]
        running = [
            subprocess.Popen([*command, tree, name, out], cwd=folder) for tree, out in zip(trees, outs, strict=True)
        ]
        codes = [process.wait() for process in running]  # of all, before any is looked at
        if any(codes):
            raise RuntimeError(f"{name} failed; what it said stands above.")
        return [torch.load(out) for out in outs]  # one after the other: torch.load is not safe in two threads


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing, in the order of the earlier results, that isn't the same to the bit; None if nothing."""
    for name in [*before, *now]:
        if name not in before or name not in now:
            return f"{name} is {'new' if name in now else 'gone'}"
        one, other = before[name], now[name]
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.dtype != other.dtype or one.shape != other.shape:
                return f"{name} was {one.dtype} {list(one.shape)}, is {other.dtype} {list(other.shape)}"
            unequal = (bits(one) != bits(other)).any(-1).nonzero().flatten().tolist()
            if unequal:
                was, is_now = (each.flatten()[unequal[0]].item() for each in (one, other))
                return f"{name}: {len(unequal)} of {one.numel()} differ; [{unequal[0]}] was {was!r}, is {is_now!r}"
        elif repr(one) != repr(other):
            return f"{name} was {one!r}, is {other!r}"
    return None


def bits(tensor: Tensor) -> Tensor:
    """The bytes of each number [numel, bytes], by which NaN equals itself and 0 isn't -0."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def main(argv: list[str] | None = None) -> int:
    """0 if all calls give the same bits, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks.golden", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", required=True, metavar="COMMIT", help="whose results are right")
    parser.add_argument("--only", nargs="+", choices=golden_calls.CALLS, default=list(golden_calls.CALLS))
    arguments = parser.parse_args(argv)
    differ = 0
    with tree_of(arguments.against) as tree:
        for name in arguments.only:
            began = time.perf_counter()
            before, now = results((tree, ROOT), name)
            found = difference(before, now)
            differ += found is not None
            seconds = time.perf_counter() - began
            print(f"{name}: {found or f'{len(now)} results, the same bits'} ({seconds:.0f} s)", flush=True)
    print(f"{differ} of {len(arguments.only)} calls differ from {arguments.against}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
