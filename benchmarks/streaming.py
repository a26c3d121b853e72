"""Times a cycle on streamed data: N particles decode each sample N times, or once with shared_order.

    python -m benchmarks.streaming [--rounds R]

The samples are JPEG pictures that are decoded and mirrored at random, in this process. Each contender trains all
particles for one epoch, and "in memory" does so on pictures that are decoded. Writes benchmarks/results/streaming.*.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.measuring import header, interleaved, write
from benchmarks.steps import initial_solution
from swamp_fast import models
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.selection import eager_by_rule
from swamp_fast.particles.schedule import cycle_training
from swamp_fast.problem.prepare import prepare

SAMPLES, SIZE, BATCH = 256, 384, 64
PARTICLES = 4


class Jpegs(Dataset[tuple[Tensor, int]]):
    """Pictures that are kept as JPEG, decoded when they are read, mirrored at random, and scaled to 32x32."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.coded = []
        for _ in range(SAMPLES):
            coarse = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((SIZE, SIZE)).save(file, "jpeg", quality=90)
            self.coded.append(file.getvalue())

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.coded)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode a picture [3, 32, 32] in [0, 1]."""
        picture = Image.open(io.BytesIO(self.coded[index])).convert("RGB")
        if random.random() < 0.5:
            picture = ImageOps.mirror(picture)
        array = np.asarray(picture.resize((32, 32)), dtype=np.float32) / 255
        return torch.from_numpy(array).movedim(2, 0), index % 10


def cycle_of(data: object, particles: int, shared: bool = False) -> Callable[[], object]:
    """Return a function that trains the particles of a cycle for one epoch on the eager engine."""
    settings = {"batch_size": BATCH, "epochs": 1, "cycles": 0, "ticket_epochs": 0, "particles": particles}
    problem = prepare(
        models.SmallCNN(3, 10, width=8), data, settings=settings | {"shared_order": shared, "progress": False}
    )
    if problem.train.streamed != isinstance(data, Jpegs):
        raise SystemExit("the data are not streamed, so nothing is timed")
    engine, start = EagerEngine(problem, eager_by_rule(problem)), initial_solution(problem)

    def train() -> None:
        bank = engine.spawn(start, problem.mask, range(particles), 0)
        engine.train(bank, cycle_training(problem.config, problem.steps_per_epoch), lambda *_: None, lambda *_: None)

    return train


def main() -> None:
    """Time the contenders in turns and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    streamed = Jpegs()
    stored = torch.stack([streamed[index][0] for index in range(SAMPLES)]), torch.arange(SAMPLES) % 10
    times = interleaved(
        {
            "1 particle": cycle_of(streamed, 1),
            f"{PARTICLES} particles": cycle_of(streamed, PARTICLES),
            f"{PARTICLES} particles, shared order": cycle_of(streamed, PARTICLES, shared=True),
            f"{PARTICLES} particles, in memory": cycle_of(stored, PARTICLES),
        },
        rounds,
    )
    one = times["1 particle"]["median"]
    table = [
        {"": name, **{key: f"{value:.3f}" for key, value in quantiles.items()},
         "times 1 particle": round(quantiles["median"] / one, 2)}
        for name, quantiles in times.items()
    ]  # fmt: skip
    about = header(rounds) | {"samples": SAMPLES, "picture": f"{SIZE}x{SIZE}", "batch": BATCH, "times": "s per epoch"}
    write("streaming", "python -m benchmarks.streaming", about, table)


if __name__ == "__main__":
    main()
