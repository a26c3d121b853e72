"""What are the losses and errors of these solutions? Evaluates models of one architecture together, as lanes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swamp_fast.common.checked import checked, checked_choice, checked_count, checked_list, shown
from swamp_fast.common.copying import copy_of
from swamp_fast.common.exclusive import one_at_a_time
from swamp_fast.common.format import dtype_name
from swamp_fast.common.memory import free_memory
from swamp_fast.common.tree import tensors
from swamp_fast.config import SwampConfig
from swamp_fast.cycle.averaging import reestimate
from swamp_fast.data.labels import Labels, predicted
from swamp_fast.data.store import Data, pass_in_stored_order
from swamp_fast.engines.eager.choice import Choice
from swamp_fast.engines.eager.engine import EagerEngine
from swamp_fast.engines.fused.engine import FusedEngine
from swamp_fast.engines.start import Engine, start_engine
from swamp_fast.engines.switching import SwitchingEngine
from swamp_fast.particles.bank import Solution
from swamp_fast.particles.norms import norms_of
from swamp_fast.particles.random import (
    at_time,
    evaluation_time,
    generators_left_alone,
    lane_keys,
    split_order,
    stream_of,
)
from swamp_fast.problem.arguments import Arguments, Forward, Loss
from swamp_fast.problem.checks import check_masks, has_batch_of_one
from swamp_fast.problem.prepare import prepare
from swamp_fast.problem.probe import check_single_sample
from swamp_fast.problem.prunable import Prunable
from swamp_fast.problem.solutions import solution_of
from swamp_fast.runs.record import Run
from swamp_fast.runs.result import ANALYSIS_SCORES, SwampResult, snapshot_of

State = dict[str, Tensor]  # name -> parameter or buffer, as in SwampResult.state_dict
Outputs = Callable[[Any, int], list[Any]]  # (inputs [B, ...], time) -> a list with the outputs of each model
Measured = TypeVar("Measured")

# The most lanes that a folded mode evaluates at once. The engine checks for this many that lanes equal models alone.
CHECKED_LANES = 4
# An analysis neither makes masks nor combines particles, so these settings get neutral values, whatever the run had.
NEUTRAL_SETTINGS = {"layer_kept": None, "mask_score": "abs-mean", "combine": "mean", "select_by": "auto"}
MAX_EVALUATION_MEMORY_FRACTION = 0.4  # largest fraction of the free memory that lanes may use


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Mean losses and errors (1 - accuracy) of M models, [M] each; None if test data or accuracies are missing.

    train_samples  how many training samples were used
    """

    train_loss: list[float]
    train_error: list[float] | None
    test_loss: list[float] | None
    test_error: list[float] | None
    train_samples: int

    def of(self, what: str) -> list[float]:
        """The values [M] of one of ANALYSIS_SCORES. Raises ValueError if the score is unknown or not available."""
        checked_choice("what", what, ANALYSIS_SCORES)
        values: list[float] | None = getattr(self, what)
        if values is None:
            lacking = "accuracies" if self.test_loss is not None or what.startswith("train") else "test data"
            raise ValueError(f"`what`: there is no {what}: the analysis has no {lacking}.")
        return values

    def part(self, rows: Iterable[int]) -> dict[str, Any]:
        """The scores of some of the models, as keyword arguments for a new Scores.

        Raises TypeError for rows that are no list of ints, ValueError for a row that there isn't.
        """
        rows, count = checked_list("rows", rows, int, 0), len(self.train_loss)
        if any(not -count <= row < count for row in rows):
            raise ValueError(f"`rows` must lie in [0, {count - 1}], got {shown(rows)}.")
        scores = {name: getattr(self, name) for name in ANALYSIS_SCORES}
        chosen = {name: values and [values[row] for row in rows] for name, values in scores.items()}
        return {**chosen, "train_samples": self.train_samples}


class Analysis:
    """Evaluates solutions of one architecture on data that are prepared as for a run.

    Args:
        model, train, test, val, forward, loss, prunable, config, settings: as for fast_swamp. Pass what the run had;
            then the validation data that it held out are held out here too.
        standardise: the mean and std by which the run scaled uint8 pictures, its result.standardise; None computes them
            from `train`, which gives the same values if the data are the same.
        samples: the number of training samples to use for losses and BatchNorm, taken from the start of a fixed
            shuffle; None uses all.

    Losses are means over samples without augmentation. M models are evaluated as M lanes of an engine, in chunks that
    fit into memory. BatchNorm statistics are re-estimated for every model on the training data in stored order.

    Raises what fast_swamp raises for its arguments, and TypeError or ValueError for `standardise` and `samples` that
    don't fit the data.
    """

    def __init__(
        self,
        model: nn.Module,
        train: object,
        test: object = None,
        *,
        val: object = None,
        forward: Forward | None = None,
        loss: Loss | None = None,
        prunable: Prunable = None,
        config: SwampConfig | None = None,
        standardise: Mapping[str, Sequence[float]] | None = None,
        samples: int | None = None,
        **settings: Any,
    ) -> None:
        prepared = SwampConfig.of(config, settings).replace(
            cycles=0, particles=CHECKED_LANES, run_dir=None, tensorboard=False, progress=False, **NEUTRAL_SETTINGS
        )
        self.problem = prepare(
            *(model, train, test),
            Arguments(val=val, forward=forward, loss=loss, prunable=prunable),
            config=prepared,
            settings={name: settings[name] for name in ("batch_size",) if name in settings},
            standardise=standardise,
        )
        if standardise is not None and self.problem.standardise is None:
            raise ValueError(
                "`standardise` is for uint8 pictures, but the data are of another type, which are used unchanged; pass "
                "the pictures that the run had, or leave it out."
            )
        self.train, self.test = some_of(self.problem.train, samples), self.problem.test
        self.engines: Engine | None = None

    def evaluate(self, states: Sequence[Mapping[str, Tensor]], *, reestimate: bool = True) -> Scores:
        """The scores of states. `reestimate=False` uses the BatchNorm statistics that the states contain.

        Raises ValueError without states, TypeError or ValueError for a state that doesn't fit the model.
        """
        states = checked_states(self, states)
        shares = torch.eye(len(states), dtype=torch.float64)
        return self.mixed([self.solution(state) for state in states], shares, reestimate=reestimate)

    def mixed(self, solutions: Sequence[Solution], shares: Tensor, *, reestimate: bool = True) -> Scores:
        """The scores of M linear combinations of K solutions.

        shares  [M, K]  float64 coefficients; integer buffers are copied from the solution with the largest one

        Raises TypeError or ValueError for other solutions or shares.
        """

        def scores(run: Outputs, channels_last: bool) -> tuple[list[float], ...]:
            train = self._score(run, self.train, 0, channels_last)
            test = ([], []) if self.test is None else self._score(run, self.test, 1, channels_last)
            return (*train, *test)

        chunks = self.measured(solutions, shares, scores, reestimate=reestimate)
        columns = [[value for chunk in chunks for value in chunk[i]] for i in range(len(ANALYSIS_SCORES))]
        available = {name: values or None for name, values in zip(ANALYSIS_SCORES, columns, strict=True)}
        return Scores(**available, train_samples=self.train.length)  # type: ignore[arg-type]

    @one_at_a_time
    def measured(
        self,
        solutions: Sequence[Solution],
        shares: Tensor,
        measure: Callable[[Outputs, bool], Measured],
        *,
        reestimate: bool = True,
    ) -> list[Measured]:
        """Apply `measure(run, channels_last)` to M linear combinations of K solutions, in chunks of lanes.

        Returns the result of each chunk. The models' mask is the union of the solutions' supports, because a weight
        that is 0 in all solutions is 0 in every combination.

        shares  [M, K]  float64 coefficients

        Raises TypeError or ValueError for other solutions or shares.
        """
        solutions = checked_list("solutions", solutions, Solution)
        _check_shares(checked("shares", shares, Tensor), len(solutions))
        if not callable(measure):
            raise TypeError(f"`measure` must be a function of (run, channels_last), got {shown(measure)}.")
        if checked("reestimate", reestimate, bool):
            self._check_last_batch()
        Q, stack = self.problem.layout.Q, torch.stack([solution.weights for solution in solutions]).double()
        support = (stack[:, :Q] != 0).any(0)
        names = solutions[0].buffers
        buffers = {name: torch.stack([solution.buffers[name] for solution in solutions]) for name in names}
        with ExitStack() as stacked:
            stacked.enter_context(generators_left_alone())
            if self.problem.device.type == "cuda":
                stacked.enter_context(torch.cuda.device(self.problem.device))
            engine = self._engine_under(support if bool(support.any()) else self.problem.mask, solutions[0])
            stacked.callback(engine.release)
            lanes = self._lanes_at_once(engine, len(shares))
            if isinstance(engine, FusedEngine):
                assert engine.programs is not None
                engine.programs.measure(lanes)
            measured = []
            for rows in shares.to(self.problem.device).split(lanes):
                weights = torch.stack([mixture(stack, row) for row in rows]).to(self.problem.dtype)
                mixed_buffers = {name: mixed_buffer(buffer, rows) for name, buffer in buffers.items()}
                measured.append(self._chunk(engine, weights, mixed_buffers, measure, reestimate))
            return measured

    def solution(self, state: Mapping[str, Tensor]) -> Solution:
        """Convert a state to a Solution. Buffers that the state lacks are taken from the model.

        Raises TypeError or ValueError if the state doesn't fit the model.
        """
        buffers = dict(self.problem.template.named_buffers())
        return solution_of(self.problem, {**buffers, **self.checked_state("state", state)})

    def checked_state(self, argument: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an argument that must be a state of the model.

        Raises TypeError for anything but a dict of tensors of the model's kind, floating-point for weights, and
        ValueError for other names, shapes or frozen parameters.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"`{argument}` must be a dict from names to tensors, such as result.state_dict; got {shown(state)}."
            )
        template = self.problem.template
        parameters, buffers = dict(template.named_parameters()), dict(template.named_buffers())
        missing = [name for name in parameters if name not in state]
        foreign = [str(name) for name in state if name not in {**parameters, **buffers, **template.state_dict()}]
        if missing or foreign:
            raise ValueError(
                f"`{argument}` doesn't fit the model: missing are {', '.join(missing) or 'none'}, unknown are "
                f"{', '.join(foreign) or 'none'}. Create the Analysis with the architecture that was trained."
            )
        for name, tensor in {**parameters, **buffers}.items():
            if name in state:
                _check_entry(argument, name, state[name], tensor)
        return state

    def mask(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Join masks by name into one mask [Q]. A prunable parameter without a mask is kept whole.

        Raises ValueError or TypeError for a mask of the wrong name, type or shape.
        """
        mask = self.problem.layout.full_mask(self.problem.device)
        views = self.problem.layout.mask_views(mask)
        check_masks("masks", masks, views)
        for name, given in masks.items():
            views[name].copy_(given)
        return mask

    def keys(self, lanes: int) -> Tensor:
        """The keys [L, 3] for random draws in evaluation: the same for every lane, so that all models draw alike."""
        lanes = checked_count("lanes", lanes, 1)
        return lane_keys([self.problem.config.seed] * lanes, [stream_of(0, 0)] * lanes, self.problem.device)

    @cached_property
    def fused(self) -> FusedEngine | str:
        """The fused engine for the model, or the reason why it can't run the model."""
        problem = dataclasses.replace(self.problem, config=self.problem.config.replace(engine="fused"))
        try:
            engine = start_engine(problem, Run(problem, "analysis"))
        except ValueError as error:
            return str(error)
        assert isinstance(engine, FusedEngine)
        return engine

    def _engine_under(self, mask: Tensor, start: Solution) -> EagerEngine | FusedEngine:
        """The engine that the settings select for a mask [Q], ready to run models under that mask."""
        if self.engines is None:
            problem = dataclasses.replace(self.problem, mask=mask)
            self.engines = start_engine(problem, Run(problem, "analysis"))
        engine = self.engines.under(mask) if isinstance(self.engines, SwitchingEngine) else self.engines
        if isinstance(engine, FusedEngine):
            engine.spawn(start, mask, range(1), None)
        return engine

    def _check_last_batch(self) -> None:
        """Raise ValueError if BatchNorm can't be re-estimated, because the last batch would hold only one sample."""
        problem, samples = self.problem, self.train.length
        if norms_of([problem.template]) and has_batch_of_one(samples, problem.config.batch_size):
            try:
                check_single_sample(problem.template, self.train, problem.config, problem.forward, problem.loss, None)
            except ValueError as error:
                raise ValueError(f"`samples` = {samples}: BatchNorm can't be re-estimated, because {error}") from error

    @torch.no_grad()
    def _chunk(
        self,
        engine: EagerEngine | FusedEngine,
        weights: Tensor,
        buffers: dict[str, Tensor],
        measure: Callable[[Outputs, bool], Measured],
        estimated: bool,
    ) -> Measured:
        if isinstance(engine, EagerEngine) and self._differ_outside_norms(buffers):
            # Folded lanes share all buffers but those of norms, so lanes with different buffers must run one by one.
            engine = EagerEngine(self.problem, Choice("lanes", engine.choice.channels_last, "buffers differ", {}))
        models, keys = engine.side_by_side(weights, buffers), self.keys(len(weights))

        def run(inputs: Any, time: int) -> list[Any]:
            return models.outputs(inputs, at_time(keys, time))

        if estimated:
            reestimate(models.modules, run, self.train, self.problem.config.batch_size, models.channels_last)
        return measure(run, models.channels_last)

    def _score(self, run: Outputs, data: Data, which: int, channels_last: bool) -> tuple[list[float], list[float]]:
        """The mean losses [M] and errors [M] of M models on a split; no errors, [], if there are no accuracies."""
        loss: Tensor | float = 0.0
        wrong: Tensor | int = 0
        entries = 0
        batches = pass_in_stored_order(data, self.problem.config.batch_size, channels_last)
        for number, (inputs, targets, count) in enumerate(batches):
            outputs = run(inputs, evaluation_time(which, number))
            loss = loss + count * torch.stack([self.problem.losses(out, targets).double().mean() for out in outputs])
            if isinstance(data.labels, Labels):
                counted = data.labels.counted(targets)
                entries += int(counted.sum())
                wrong = wrong + torch.stack([((predicted(out) != targets) & counted).sum() for out in outputs])
        assert isinstance(loss, Tensor)  # there was a batch, since no split is empty
        errors = (wrong.double() / entries).tolist() if isinstance(wrong, Tensor) and entries else []
        return (loss / data.length).tolist(), errors

    def _lanes_at_once(self, engine: EagerEngine | FusedEngine, models: int) -> int:
        if isinstance(engine, EagerEngine) and engine.choice.mode != "lanes":
            models = min(models, CHECKED_LANES)
        return max(
            1,
            min(models, int(MAX_EVALUATION_MEMORY_FRACTION * free_memory(self.problem.device)) // self._bytes_of_lane),
        )

    @cached_property
    def _bytes_of_lane(self) -> int:
        """Estimate of the bytes per lane: weights in float64, both full and compact, and a few activations."""
        inputs, _, _ = next(pass_in_stored_order(self.train, self.problem.config.batch_size))
        largest = _Largest()
        with largest, torch.no_grad():
            self.problem.forward(copy_of(self.problem.template).eval(), inputs)
        return 32 * self.problem.layout.P + 4 * largest.bytes

    def _differ_outside_norms(self, buffers: dict[str, Tensor]) -> bool:
        """Whether lanes differ in any buffer [L, ...] outside the norms."""
        norms = {id(buffer) for norm in norms_of([self.problem.template]) for buffer in norm.buffers()}
        named = self.problem.template.named_buffers()
        others = [buffers[name] for name, buffer in named if id(buffer) not in norms]
        return any(not torch.equal(buffer, buffer[:1].expand_as(buffer)) for buffer in others)


def particles(result: SwampResult) -> list[State]:
    """The states of the last cycle's particles. Raises ValueError if the run didn't keep them."""
    states = checked("result", result, SwampResult).particles
    if states is None:
        raise ValueError("`result` holds no particles; run it with keep_particles=True.")
    count = len(next(iter(states.values())))
    return [{name: tensor[i] for name, tensor in states.items()} for i in range(count)]


def averages(result: SwampResult) -> list[tuple[State, dict[str, Tensor]]]:
    """The state of the average of each cycle, and its masks."""
    snapshots = [snapshot_of(stored) for stored in checked("result", result, SwampResult).snapshots]
    return [(snapshot.state, snapshot.masks) for snapshot in snapshots]


def some_of(data: Data, samples: int | None) -> Data:
    """A part of a split: the first `samples` samples of a fixed shuffle, or the whole split if `samples` is None.

    They are shuffled because stored samples are often sorted by class. Raises ValueError for no samples or too many.
    """
    if samples is None:
        return data
    samples = checked("samples", samples, int, 1, data.length, advice="These are the training samples.")
    if samples == data.length:
        return data
    some = copy.copy(data)
    some.length, some.order = samples, data.order[split_order(data.length)[:samples].to(data.device)]
    return some


def mixture(stack: Tensor, row: Tensor) -> Tensor:
    """The linear combination [P] of vectors [K, P] with shares [K].

    Vectors with a share of 0 are left out, because 0 times NaN is NaN.
    """
    used = row.nonzero().flatten()
    mixed: Tensor = torch.tensordot(row[used], stack[used], 1)
    return mixed


def mixed_buffer(buffer: Tensor, shares: Tensor) -> Tensor:
    """Combine one buffer of K solutions, [K, ...], with shares [M, K]. Returns the buffer of M models, [M, ...]."""
    if not buffer.is_floating_point():
        return buffer[shares.argmax(1)]
    return torch.stack([mixture(buffer.double(), row) for row in shares]).to(buffer.dtype)


def _check_shares(shares: Tensor, solutions: int) -> None:
    """Raise TypeError or ValueError unless shares are finite real numbers [M, K] of K solutions."""
    if not shares.is_floating_point():
        raise TypeError(f"`shares` must be floating-point numbers, got {dtype_name(shares.dtype)}.")
    if shares.dim() != 2 or not len(shares) or shares.shape[1] != solutions:
        raise ValueError(f"`shares` must have shape [M, {solutions}], got {list(shares.shape)}.")
    if not bool(shares.isfinite().all()):
        raise ValueError("`shares` must be finite; they hold NaN or infinite values.")


def checked_states(on: Analysis, states: Sequence[Mapping[str, Tensor]], low: int = 1) -> list[Mapping[str, Tensor]]:
    """Return the arguments `on` and `states` of an analysis: at least `low` states, each of which fits the model."""
    checked("on", on, Analysis)
    listed: list[Any] = checked_list("states", states, Mapping, low)
    return [on.checked_state(f"states[{number}]", state) for number, state in enumerate(listed)]


def _check_entry(argument: str, name: str, given: object, own: Tensor) -> None:
    """Raise TypeError or ValueError unless an entry of a state can replace the model's parameter or buffer."""
    if not isinstance(given, Tensor):
        raise TypeError(f"`{argument}`: {name} must be a tensor, got {shown(given)}.")
    if given.is_meta or given.layout != torch.strided:
        raise ValueError(f"`{argument}`: {name} must be a dense tensor with values, not a meta or sparse one.")
    if (own.is_floating_point() and not given.is_floating_point()) or (given.is_complex() and not own.is_complex()):
        raise TypeError(
            f"`{argument}`: {name} has the type {dtype_name(given.dtype)}, but the model's is "
            f"{dtype_name(own.dtype)}; pass such values."
        )
    if given.shape != own.shape:
        raise ValueError(
            f"`{argument}` doesn't fit the model: {name} has shape {list(given.shape)}, the model's has "
            f"{list(own.shape)}."
        )
    frozen = isinstance(own, nn.Parameter) and not own.requires_grad
    if frozen and not torch.equal(own, given.to(own.device, own.dtype)):
        raise ValueError(
            f"`{argument}`: {name} is frozen and differs from the model's; create the Analysis with the weights of the "
            "model that was trained."
        )


class _Largest(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(tensor.numel() * tensor.element_size() for tensor in tensors(out))])
        return out
