"""Measures accuracy over sparsity in the run of the demo: scikit-learn's digits, 4 particles, 14 cycles.

    python -m benchmarks.digits

Writes benchmarks/results/digits, with a figure.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.measuring import RESULTS, header, write
from swamp_fast import fast_swamp
from swamp_fast.cli.demo_run_show import DEMO
from swamp_fast.common.format import percent
from swamp_fast.common.timing import Stopwatch
from swamp_fast.models import SmallCNN
from swamp_fast.report.figures import accuracy_over_sparsity


def main() -> None:
    """Run the demo and write its table and figure."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(DEMO.seed)
    watch = Stopwatch()
    result = fast_swamp(SmallCNN(1, 10), "digits", config=DEMO, progress=False)
    table = [
        {
            "cycle": row["cycle"],
            "density": percent(row["density"]),
            "average": percent(row["accuracy"]),
            "particles": " ".join(f"{accuracy * 100:.2f}" for accuracy in row["particle_accuracy"]),
            "their ensemble": percent(row["ensemble_accuracy"]),
            "kFLOP a picture": round(row["flops"] / 1e3),
        }
        for row in result.history
    ]
    engine = f"{result.engine['engine']}; {result.engine['why']}"
    about = header(1) | {"seconds": round(watch.seconds), "engine": engine, "test_pictures": 359}
    write("digits", "python -m benchmarks.digits", about, table)
    accuracy_over_sparsity(result.history, RESULTS / "digits.svg", "SWAMP on digits, a small CNN, 4 particles")


if __name__ == "__main__":
    main()
