"""What do the analyses say about a run? All analyses of one run, as plain values for analysis.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from swamp_fast.analysis.connectivity import POINTS_ADVICE, barrier_matrix, consecutive, hull, loss_barrier
from swamp_fast.analysis.cost import inference_cost
from swamp_fast.analysis.ensemble import ensemble
from swamp_fast.analysis.evaluator import Analysis, Scores, State, averages, particles
from swamp_fast.analysis.hessian import hessian_trace
from swamp_fast.analysis.masks import channels, densities, mask_overlap
from swamp_fast.analysis.plane import MAX_SIZE, OnOneLine, loss_plane
from swamp_fast.common.checked import checked, checked_count
from swamp_fast.data.labels import Labels
from swamp_fast.particles.norms import norms_of
from swamp_fast.runs.result import ANALYSIS_SCORES, SwampResult
from swamp_fast.version import __version__

# The inputs that affect scores, by the names of their fingerprints.
SCORED_BY = ("train", "val", "test", "loss", "forward", "prunable")


def analyze(
    on: Analysis,
    result: SwampResult,
    *,
    points: int = 11,
    probes: int = 32,
    mixtures: int = 32,
    size: int = 11,
    repeats: int = 15,
    against: SwampResult | None = None,
) -> dict[str, Any]:
    """Do every analysis that is possible for a run. Returns the content of analysis.json, as plain values.

    Args:
        on: the model, and the data on which solutions are evaluated.
        result: the run. Analyses of particles need the particles of the last cycle (keep_particles=True), the plane
            needs three of them that are not on one line, and the ensemble needs test data. An analysis that is not
            possible is None.
        points: the number of points on each path, for barriers.
        probes, mixtures, size, repeats: the number of probes for the Hessian's trace, of mixtures for the hull, of
            points per axis of the plane, and of repeats for the latency; 0 leaves that analysis out.
        against: another run of the same model. In each cycle that both runs have, their masks are compared, and the
            barrier between their averages is measured on the data of `on`.

    Barriers between cycles are measured twice: with BatchNorm re-estimated, and with its statistics interpolated.

    Raises TypeError or ValueError, before any work, for sizes that are too small, and for a run of another model.
    """
    checked("on", on, Analysis)
    _check_sizes(points, probes, mixtures, size, repeats)
    for name, run in (("result", result), *([] if against is None else [("against", against)])):
        on.checked_state(name, checked(name, run, SwampResult).state_dict)
    overlap = None if against is None else _overlap(result, against)
    cycles = averages(result)
    states = [] if result.particles is None else particles(result)
    several, has_labels = len(states) > 1, on.test is not None and isinstance(on.test.labels, Labels)
    numbered = [{"cycle": row["cycle"]} for row in result.history]
    # The first evaluation decides, by its density, which engine is used. So the order of these entries matters.
    return {
        "about": _about(on, result, points, probes, mixtures, size),
        "particles": _particles(on, states, points, len(cycles) - 1) if several else None,
        "hull": _hull(on, states, mixtures) if several and mixtures else None,
        "plane": _plane(on, states, size) if len(states) > 2 and size else None,
        "against": None if against is None else {**_against(on, result, against, points), "overlap": overlap},
        "ensemble": _ensemble(on, states) if states and has_labels else None,
        "consecutive": _consecutive(on, result, points),
        "hessian": [
            {**number, "density": row["density"], **_trace(on, state, masks, probes)}
            for number, row, (state, masks) in zip(numbered, result.history, cycles, strict=True)
            if probes
        ],
        "masks": [{**number, **_masks(on, masks)} for number, (_, masks) in zip(numbered, cycles, strict=True)],
        "cost": [
            {**number, **dataclasses.asdict(inference_cost(on, state, masks, repeats=repeats))}
            for number, (state, masks) in zip(numbered, cycles, strict=True)
        ],
    }


def differing(on: Analysis, result: SwampResult) -> list[str]:
    """The names in SCORED_BY, the inputs that affect scores, in which the analysis differs from the run."""
    fingerprints = checked("result", result, SwampResult).about["fingerprints"]
    own = checked("on", on, Analysis).problem.fingerprints
    return [name for name in SCORED_BY if own[name] != fingerprints.get(name)]


def _check_sizes(points: int, probes: int, mixtures: int, size: int, repeats: int) -> None:
    checked_count("points", points, 3, advice=POINTS_ADVICE)
    for name, value in (("probes", probes), ("mixtures", mixtures), ("size", size), ("repeats", repeats)):
        checked_count(name, value, 0, advice="0 leaves that analysis out.")
    if probes == 1:
        raise ValueError("`probes` must be at least 2 for an interval, or 0 for no trace; got 1.")
    if size == 1:
        raise ValueError("`size` must be at least 2 points per axis, or 0 for no plane; got 1.")
    if size > MAX_SIZE:
        raise ValueError(f"`size` must be at most {MAX_SIZE} points per axis, got {size}.")


def _about(on: Analysis, result: SwampResult, points: int, probes: int, mixtures: int, size: int) -> dict[str, Any]:
    problem, differs = on.problem, differing(on, result)
    return {
        "version": __version__,
        "train_samples": on.train.length,
        "of_training_samples": problem.train.length,
        "test_samples": None if on.test is None else on.test.length,
        "same_training_data": "train" not in differs,
        "differs": differs,
        "batchnorm": "re-estimated at every point on the training samples; of the Hessian as it is in the solution",
        "points": points,
        "probes": probes,
        "mixtures": mixtures,
        "size": size,
        "device": str(problem.device),
        "precision": problem.config.precision,
    }


def _particles(on: Analysis, states: list[State], points: int, cycle: int) -> dict[str, Any]:
    """The barriers between all pairs of particles, measured from the higher end: one matrix [N, N] per score."""
    barriers = barrier_matrix(on, states, points)
    measured = {score: getattr(barriers.paths[0, 1], score) is not None for score in ANALYSIS_SCORES}
    matrix = {score: barriers.matrix(score, "max") if known else None for score, known in measured.items()}
    return {"cycle": cycle, "names": _names(states), "matrix": matrix, "over": "max"}


def _hull(on: Analysis, states: list[State], mixtures: int) -> dict[str, Any]:
    found = hull(on, states, mixtures)
    corners, centre = _plain(found.corners), _plain(found.centre)
    return {"mixtures": found.mixtures, **_plain(found), "corners": corners, "centre": centre}


def _plane(on: Analysis, states: list[State], size: int) -> dict[str, Any] | None:
    """The plane through the first three particles; None if they lie on one line."""
    first, second, third, *_ = states
    try:
        plane = loss_plane(on, first, second, third, size, names=_names(states)[:3])
    except OnOneLine:
        return None
    return {**plane.to_dict(), "at_points": _plain(plane.at_points)}


def _overlap(result: SwampResult, other: SwampResult) -> list[dict[str, Any]]:
    """How similar the masks of two runs are, one row per cycle that both runs have."""
    rows = []
    for row, (_, masks), (_, other_masks) in zip(result.history, averages(result), averages(other), strict=False):
        overlap = vars(mask_overlap(masks, other_masks))
        layers = {name: layer.iou for name, layer in overlap["layers"].items()}
        rows.append({"cycle": row["cycle"], **overlap, "layers": layers})
    return rows


def _against(on: Analysis, result: SwampResult, other: SwampResult, points: int) -> dict[str, Any]:
    """The barrier between the two runs' averages in each cycle that both have, and the scores of these averages."""
    barriers = []
    pairs = list(zip(result.history, averages(result), averages(other), strict=False))
    # The sparsest pair comes first, because the density of the first evaluation decides which engine is used.
    for row, (state, _), (other_state, _) in pairs[::-1]:
        path = loss_barrier(on, state, other_state, points)
        ends = _plain(Scores(**path.part([0, -1])))
        barriers.append({"cycle": row["cycle"], "barriers": path.barriers(), "ends": ends})
    name = Path(other.config.run_dir or "another run").name
    return {"run": name, "differs": differing(on, other), "barriers": barriers[::-1]}


def _ensemble(on: Analysis, states: list[State]) -> dict[str, Any]:
    found = ensemble(on, states)
    scores = {name: getattr(found, name) for name in ("accuracy", "nll", "ece")}
    return {**scores, "single": vars(found.mean_single), "models": [vars(model) for model in found.single]}


def _consecutive(on: Analysis, result: SwampResult, points: int) -> list[dict[str, Any]]:
    rows = [
        {"from": cycle, "to": cycle + 1, "t": path.t, **_plain(path), "barriers": path.barriers()}
        for cycle, path in enumerate(consecutive(on, result, points))
    ]
    if norms_of([on.problem.template]):
        interpolated = consecutive(on, result, points, reestimate=False)
        for row, path in zip(rows, interpolated, strict=True):
            row["barriers_as_given"] = path.barriers()
    return rows


def _trace(on: Analysis, state: State, masks: dict[str, Tensor], probes: int) -> dict[str, Any]:
    trace = dataclasses.asdict(hessian_trace(on, state, masks, probes))
    return {"trace_half_width" if name == "half_width" else name: value for name, value in trace.items()}


def _masks(on: Analysis, masks: dict[str, Tensor]) -> dict[str, Any]:
    """Densities by layer, and totals of dead channels; dead_out is None if it is unknown for any layer."""
    layers = channels(masks, on).values()
    dead_out = [layer.dead_out for layer in layers]
    return {
        "layers": densities(masks),
        "dead_in": sum(layer.dead_in for layer in layers),
        "dead_out": None if None in dead_out else sum(count or 0 for count in dead_out),
    }


def _names(states: list[State]) -> list[str]:
    return [f"particle {number}" for number in range(len(states))]


def _plain(scores: Scores) -> dict[str, Any]:
    return {score: getattr(scores, score) for score in ANALYSIS_SCORES}
