"""Checks that results are bit for bit equal to those of another commit.

    python -m benchmarks.golden --against COMMIT [--only NAME ...]

Eight small calls (benchmarks/golden_calls.py) run with the code of that commit and of this checkout, in separate
processes on the same machine, with the same number of threads. Masks, weights of every cycle and histories are
compared, except for seconds and memory. The first difference of each call is printed, and the exit status is 1 if there
is any. If code chooses by a stopwatch, results may differ although nothing was changed.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import golden_calls
from benchmarks.children import child_process
from benchmarks.measuring import ROOT
from swamp_fast import _C
from swamp_fast.common.timing import Stopwatch

LINKS = {"swamp_fast/kernels": "kernels", "swamp_fast/cuda_sources": "csrc/cuda"}  # as in an installed package
BUILT_FROM = ("setup.py", "csrc/cpu")


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A context with a temporary folder, into which a commit is checked out and its extension is built."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            install(tree, commit)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*command: str) -> None:
    """Run git in this checkout. Raises CalledProcessError if it fails."""
    subprocess.run(["git", *command], cwd=ROOT, check=True)


def install(tree: Path, commit: str) -> None:
    """Make a tree importable. The extension is built only if that of this checkout would differ."""
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
    """Run one call with the code of each tree, in parallel processes. Return the results of each."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"results {number}" for number in range(len(trees))]
        command = [sys.executable, "-W", "ignore", golden_calls.__file__]
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(child_process([*command, tree, name, out], cwd=folder))
                for tree, out in zip(trees, outs, strict=True)
            ]
            codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"{name} failed; its output is above.")
        return [torch.load(out) for out in outs]  # not in the threads, because torch.load is not thread-safe


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describe the first result whose bits differ, in the order of `before`. Return None if all are equal."""
    for name in [*before, *now]:
        if name not in before or name not in now:
            return f"{name} is {'new' if name in now else 'missing'}"
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
    """Return the bytes of each number, [numel, bytes]. Compared as bytes, NaN equals itself, and 0 differs from -0."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def main(argv: list[str] | None = None) -> int:
    """Compare the requested calls. Return 0 if all give the same bits, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the commit whose results are expected")
    parser.add_argument("--only", nargs="+", choices=golden_calls.CALLS, default=list(golden_calls.CALLS))
    arguments = parser.parse_args(argv)
    differ = 0
    with tree_of(arguments.against) as tree:
        for name in arguments.only:
            watch = Stopwatch()
            before, now = results((tree, ROOT), name)
            changed = difference(before, now)
            differ += changed is not None
            print(f"{name}: {changed or f'{len(now)} results, the same bits'} ({watch.seconds:.0f} s)", flush=True)
    print(f"{differ} of {len(arguments.only)} calls differ from {arguments.against}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
