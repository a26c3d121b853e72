"""The memory that a run takes besides its model and data, predicted from the sizes of what the engines allocate.

Both engines train all particles in one bank, whose memory grows with the number of particles. The other memory of a
step is counted for one particle, because a CPU runs particles one after the other. On a GPU, the fused engine runs as
many particles at once as fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from swamp_fast.common.copying import copy_of
from swamp_fast.common.live_memory import LiveMemory
from swamp_fast.common.memory import free_memory
from swamp_fast.common.tree import tensors
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.cpu.footprint import building_bytes, program_bytes
from swamp_fast.engines.fused.plan import Plan
from swamp_fast.engines.lane_by_lane import channels_last
from swamp_fast.engines.start import Engine
from swamp_fast.particles.bank import MOMENTS
from swamp_fast.particles.dropout import DropoutStream
from swamp_fast.particles.random import generators_left_alone, lane_keys, stream_of
from swamp_fast.particles.schedule import kept_at
from swamp_fast.problem.checks import check_particles_fit
from swamp_fast.problem.problem import Problem
from swamp_fast.runs.record import Run

MEASURED_SAMPLES = 8  # at most, in the steps from which the activations of a whole batch are extrapolated
ORDER_BYTES = 24  # per sample, to draw the order of a particle's epoch: random words, places and their sorting
GATHERED = 2  # copies of a particle's weights in averaging on every engine: gathered, and stacked with the average
AVERAGED = 4  # copies of a particle's weights in averaging, at most
STATES = 4  # copies of the weights apart from the particles: the ticket, averages, and what is recorded


@dataclass(frozen=True)
class Phase:
    """The bytes that a part of a cycle takes: `fixed` in total, and `of_particle` for each particle."""

    fixed: int
    of_particle: int


@dataclass(frozen=True)
class Footprint:
    """The bytes that a run takes while it trains its particles, and when it averages and evaluates them."""

    training: Phase
    averaging: Phase

    def bytes(self, particles: int) -> int:
        """The most bytes that a run with this number of particles takes at once."""
        return max(phase.fixed + particles * phase.of_particle for phase in (self.training, self.averaging))

    def particles(self, free: int) -> int:
        """The number of particles that fit in `free` bytes."""
        return max(0, min((free - phase.fixed) // phase.of_particle for phase in (self.training, self.averaging)))


def fused_footprint(problem: Problem, plan: Plan) -> Footprint:
    """The footprint of the fused engine at density 1."""
    vector, layout, steps = _vector_bytes(problem), problem.layout, problem.bounds[0][1]
    storage = torch.bfloat16 if problem.config.precision == "bfloat16" else problem.dtype
    compact = 8 * 2 * layout.P + layout.Q  # the places of weights and the mask
    building = 0
    if problem.device.type == "cpu":
        building = building_bytes(plan, layout)
        step = sum(
            program_bytes(plan, layout, samples, problem.dtype, storage, trains)
            for samples, trains in _batch_sizes(problem)
        )
    else:
        maps = [math.prod(shape) * steps * storage.itemsize for shape in plan.shapes]
        step = sum(maps) + 4 * max(maps)
    fixed, bank = step + compact + STATES * vector, _bank_bytes(problem)
    # Averaging holds the particles expanded, stacked with their average, and in two compact copies.
    training = Phase(fixed + building, bank + _batch_bytes(problem))
    return Footprint(training, Phase(fixed + 3 * vector, bank + AVERAGED * vector))


def eager_footprint(problem: Problem, choice: Choice) -> Footprint:
    """The footprint of the eager engine, whose activations are measured on a few samples."""
    vector, bank, batch = _vector_bytes(problem), _bank_bytes(problem), _batch_bytes(problem)
    activations = _activation_bytes(problem, choice)
    folds = choice.mode != "lanes"
    training = Phase(
        STATES * vector + (0 if folds else activations), bank + batch + vector + (activations if folds else 0)
    )
    # Averaging holds the particles stacked with their average, a copy of this stack and, lane by lane, copied modules.
    return Footprint(training, Phase((STATES + 3) * vector, bank + (2 if folds else 3) * vector))


def refuse_too_many_particles(problem: Problem, engine: Engine, run: Run) -> None:
    """Raise MemoryError if this process's particles of a remaining cycle don't fit in the free memory.

    This counts only the memory that a cycle needs in any case: the bank, which the fused engine makes for the kept
    weights alone, and the particles' weights during averaging. All of it is needed at once, so training the particles
    in groups wouldn't help.
    """
    config, layout, kept = problem.config, problem.layout, int(problem.mask.sum())
    needs = []
    for cycle in range(config.cycles + 1):
        if cycle > 0:
            kept = (
                kept_at(config, cycle, kept, layout.weights)
                if config.layer_kept is None
                else sum(config.layer_kept[cycle - 1])
            )
        if cycle >= len(run.rows):
            numbers = layout.P if isinstance(engine, EagerEngine) else layout.P - layout.Q + kept
            of_particle = problem.dtype.itemsize * (_bank_vectors(problem) * numbers + GATHERED * layout.P)
            needs.append((len(run.ranks.share(config.particles_at(cycle))), of_particle))
    if needs:
        check_particles_fit(problem.device, *max(needs, key=math.prod))


def particles_that_fit(problem: Problem) -> int:
    """The number of particles, of one run or several, that fit in the free memory, averaging included."""
    return free_memory(problem.device) // (_bank_bytes(problem) + AVERAGED * _vector_bytes(problem))


def _vector_bytes(problem: Problem) -> int:
    return problem.layout.P * problem.dtype.itemsize


def _bank_vectors(problem: Problem) -> int:
    """The number of a particle's vectors in a bank: weights, gradients, SWA means and the optimizer's moments."""
    if problem.own_optimizer is not None:
        return 3 + problem.own_optimizer.state_bytes // _vector_bytes(problem)
    return 3 + len(MOMENTS[problem.config.optimizer])


def _bank_bytes(problem: Problem) -> int:
    return _bank_vectors(problem) * _vector_bytes(problem)


def _batch_bytes(problem: Problem) -> int:
    """The bytes of a particle's batch and of the order of its samples."""
    order = ORDER_BYTES * problem.train.length
    return order + problem.bounds[0][1] * sum(leaf.nbytes for leaf in tensors(_batch(problem, 1)))


def _batch_sizes(problem: Problem) -> list[tuple[int, bool]]:
    """The batch sizes for which there are programs, and whether each program trains."""
    trained = {end - begin for begin, end in problem.bounds}
    size = problem.config.batch_size
    splits = [data.length for data in (problem.train, problem.val, problem.test) if data is not None]
    evaluated = {rest for length in splits for rest in (min(size, length), length % size) if rest}
    return [*((samples, True) for samples in trained), *((samples, False) for samples in evaluated - trained)]


def _batch(problem: Problem, samples: int) -> tuple[object, object]:
    """The inputs and targets of the first samples."""
    keys = lane_keys([0], [stream_of(None, 0)], problem.device)
    order = torch.arange(samples, device=problem.device)[None]
    handle = next(iter(problem.train.batches(order, keys, [(0, samples)])))
    with generators_left_alone():
        return problem.train.fetch(handle, None).lane(0)


def _activation_bytes(problem: Problem, choice: Choice) -> int:
    """The most bytes that the tensors of one particle's step take at once, extrapolated to a whole batch."""
    batch = problem.bounds[0][1]
    many = min(MEASURED_SAMPLES, batch)
    few = max(2, many // 2)
    if few >= many:
        return _step_bytes(problem, choice, many) * batch // many
    of_few, of_many = (_step_bytes(problem, choice, samples) for samples in (few, many))
    return of_many + (of_many - of_few) * (batch - many) // (many - few)


def _step_bytes(problem: Problem, choice: Choice, samples: int) -> int:
    inputs, targets = _batch(problem, samples)
    module = copy_of(problem.template).train()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    key = lane_keys([0], [stream_of(None, 0)], problem.device)
    with generators_left_alone(), LiveMemory() as live, torch.enable_grad():
        inputs, targets = problem.particle_batch(inputs, targets, key)
        inputs = channels_last(inputs) if choice.channels_last else inputs
        with DropoutStream(key), problem.autocast():
            loss = problem.losses(problem.forward(module, inputs), targets).mean()
        loss.backward()
    return int(live.peak)
