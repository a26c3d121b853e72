"""All analyses of one run, as plain values for analysis.json, and a table of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from swamp_fast.analysis.connectivity import barrier_matrix, consecutive, highest, hull, loss_barrier
from swamp_fast.analysis.cost import inference_cost
from swamp_fast.analysis.ensemble import ensemble
from swamp_fast.analysis.evaluator import SCORES, Analysis, Scores, State, averages, particles
from swamp_fast.analysis.hessian import hessian_trace
from swamp_fast.analysis.masks import channels, densities, mask_overlap
from swamp_fast.analysis.plane import OnOneLine, Plane, loss_plane, random_plane
from swamp_fast.common.format import percent
from swamp_fast.particles.norms import norms_of
from swamp_fast.runs.result import SwampResult
from swamp_fast.version import __version__

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
    random: bool = False,
) -> dict[str, Any]:
    """Every analysis of a run that its result allows, as plain values: what `swamp-fast analyze` writes.

    probes = 0 leaves the Hessian out, mixtures = 0 the hull, size = 0 the plane, repeats = 0 the latency. What is about
    particles needs those of the last cycle (keep_particles=True), the plane three that aren't on one line, the ensemble
    test data; what can't be had is None. Barriers between cycles are also given without BatchNorm's re-estimation.
    `against` is another run of the same model: the masks of equal cycles are compared, and the barriers between their
    averages measured, on this run's data. `random` adds a random plane at the last average.
    """
    if points < 3:
        raise ValueError(f"`points` must be at least 3, both ends and one between; got {points}.")
    if probes == 1:
        raise ValueError("`probes` must be at least 2 for an interval, or 0 for no trace; got 1.")
    if size == 1:
        raise ValueError("`size` must be at least 2 points an axis, or 0 for no plane; got 1.")
    for name, value in (("probes", probes), ("mixtures", mixtures), ("size", size), ("repeats", repeats)):
        if value < 0:
            raise ValueError(f"`{name}` must be at least 0, for none; got {value}.")
    overlap = None if against is None else _overlap(result, against)  # other layers are told before the work
    cycles = averages(result)
    lanes = None if result.particles is None else particles(result)
    several = lanes is not None and len(lanes) > 1
    found: dict[str, Any] = {"about": _about(on, result, points, probes, mixtures, size)}
    found["particles"] = _particles(on, lanes, points, len(cycles) - 1) if several and lanes else None
    found["hull"] = _hull(on, lanes, mixtures) if several and lanes and mixtures else None
    found["plane"] = _plane(on, lanes, size) if lanes and len(lanes) > 2 and size else None
    found["random_plane"] = None
    if random:
        plane = random_plane(on, *cycles[-1], size or 11)
        found["random_plane"] = _whole_plane(plane) | {"cycle": result.history[-1]["cycle"]}
    found["against"] = None if against is None else _against(on, result, against, points) | {"overlap": overlap}
    found["ensemble"] = _ensemble(on, lanes) if lanes and on.test is not None and on.problem.classifies else None
    found["consecutive"] = [
        {"from": cycle, "to": cycle + 1, "t": path.t, **_plain(path), "barriers": path.barriers()}
        for cycle, path in enumerate(consecutive(on, result, points))
    ]
    if norms_of([on.problem.template]):
        for row, path in zip(found["consecutive"], consecutive(on, result, points, reestimate=False), strict=True):
            row["barriers_as_given"] = path.barriers()
    found |= {"hessian": [], "masks": [], "cost": []}
    for row, (state, masks) in zip(result.history, cycles, strict=True):
        cycle = {"cycle": row["cycle"]}
        if probes:
            trace = dataclasses.asdict(hessian_trace(on, state, masks, probes))
            found["hessian"].append(
                {
                    **cycle,
                    "density": row["density"],
                    **{"trace_half_width" if name == "half_width" else name: value for name, value in trace.items()},
                }
            )
        dead = channels(masks, on).values()
        known = all(each.dead_out is not None for each in dead)
        found["masks"].append(
            {
                **cycle,
                "layers": densities(masks),
                "dead_in": sum(each.dead_in for each in dead),
                "dead_out": sum(each.dead_out or 0 for each in dead) if known else None,
            }
        )
        found["cost"].append({**cycle, **dataclasses.asdict(inference_cost(on, state, masks, repeats=repeats))})
    return found


def differing(on: Analysis, result: SwampResult) -> list[str]:
    """Of what scores depend on, what the analysis has otherwise than the run: of train, val, test, loss, ..."""
    theirs = result.about["fingerprints"]
    return [name for name in SCORED_BY if on.problem.fingerprints[name] != theirs.get(name)]


def table(found: dict[str, Any]) -> str:
    """A line a cycle: the barrier to the next one, flatness, dead channels and cost."""
    head = (
        f"{'cycle':>5}  {'barrier, loss':>13}  {'error':>8}  {'Hessian trace':>22}  {'scaled':>18}  {'dead in/out':>11}"
    )
    lines = [f"{head}  {'FLOPs':>8}  {'ms':>8}  {'dense':>8}"]
    barriers = {each["from"]: each["barriers"] for each in found["consecutive"]}
    traces = {each["cycle"]: each for each in found["hessian"]}
    for masks, cost in zip(found["masks"], found["cost"], strict=True):
        cycle = masks["cycle"]
        own, trace = barriers.get(cycle, {}), traces.get(cycle)
        split = "test" if "test_loss" in own else "train"
        loss, error = (
            own[f"{split}_{what}"]["max"] if f"{split}_{what}" in own else None for what in ("loss", "error")
        )
        dead_out = "–" if masks["dead_out"] is None else masks["dead_out"]
        cells = [
            f"{cycle:>5}",
            f"{_number(loss, '.4f'):>13}",
            f"{percent(error):>8}",
            f"{_interval(trace, 'trace'):>22}",
            f"{_interval(trace, 'scaled'):>18}",
            f"{masks['dead_in']}/{dead_out}".rjust(11),
            f"{percent(None if cost['flops'] is None else cost['flops'] / max(cost['dense_flops'], 1)):>8}",
            f"{_number(cost['sparse_ms'], '.2f'):>8}",
            f"{_number(cost['dense_ms'], '.2f'):>8}",
        ]
        lines.append("  ".join(cells))
    if found["particles"] is not None:
        loss = highest([highest(row) for row in found["particles"]["matrix"]["train_loss"]])
        lines.append(
            f"highest barrier among the particles of cycle {found['particles']['cycle']}: {loss:.4f} train loss"
        )
    if found.get("against") is not None:
        last, both = found["against"]["overlap"][-1], found["against"]["barriers"][-1]
        where, ends = both["barriers"], both["ends"]
        split = "test" if "test_loss" in where else "train"
        error = where.get(f"{split}_error", {}).get("max")
        own, theirs = (percent(each) for each in ends[f"{split}_error"] or (None, None))
        lines.append(
            f"against {found['against']['run']}, cycle {last['cycle']}: IoU of the masks {last['iou']:.3f}, barrier "
            f"{where[f'{split}_loss']['max']:.4f} {split} loss, {percent(error)} error between {own} and {theirs}"
        )
    if found["ensemble"] is not None:
        together, single = found["ensemble"], found["ensemble"]["single"]
        lines.append(
            f"ensemble of them: {percent(together['accuracy'])}, alone {percent(single['accuracy'])} in the mean"
        )
    about = found["about"]
    lines.append(f"on {about['train_samples']:,} of {about['of_training_samples']:,} training samples")
    return "\n".join(lines)


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
    found = barrier_matrix(on, states, points)
    there = {what: getattr(found.paths[0, 1], what) is not None for what in SCORES}
    matrix = {what: found.matrix(what, "max") if has else None for what, has in there.items()}
    return {"cycle": cycle, "names": _names(states), "matrix": matrix, "over": "max"}


def _hull(on: Analysis, states: list[State], mixtures: int) -> dict[str, Any]:
    found = hull(on, states, mixtures)
    return {
        "mixtures": found.mixtures,
        **_plain(found),
        "corners": _plain(found.corners),
        "centre": _plain(found.centre),
    }


def _plane(on: Analysis, states: list[State], size: int) -> dict[str, Any] | None:
    first, second, third, *_ = states
    try:
        return _whole_plane(loss_plane(on, first, second, third, size, names=_names(states)[:3]))
    except OnOneLine:
        return None


def _whole_plane(found: Plane) -> dict[str, Any]:
    return {**found.to_dict(), "at_points": _plain(found.at_points)}


def _overlap(result: SwampResult, other: SwampResult) -> list[dict[str, Any]]:
    """How alike two runs' masks are, cycle by cycle."""
    found = []
    for row, (_, own), (_, theirs) in zip(result.history, averages(result), averages(other), strict=False):
        both = vars(mask_overlap(own, theirs))
        layers = {name: each.iou for name, each in both["layers"].items()}
        found.append({"cycle": row["cycle"], **both, "layers": layers})
    return found


def _against(on: Analysis, result: SwampResult, other: SwampResult, points: int) -> dict[str, Any]:
    """The barriers between the averages of equal cycles of two runs, and the scores of both."""
    found = []
    pairs = list(zip(result.history, averages(result), averages(other), strict=False))
    for row, (own, _), (theirs, _) in pairs[::-1]:  # the sparsest first: at its density the engine is chosen
        path = loss_barrier(on, own, theirs, points)
        ends = _plain(Scores(**path.part([0, -1])))
        found.append({"cycle": row["cycle"], "barriers": path.barriers(), "ends": ends})
    name = Path(other.config.run_dir or "another run").name
    return {"run": name, "differs": differing(on, other), "barriers": found[::-1]}


def _ensemble(on: Analysis, states: list[State]) -> dict[str, Any]:
    found = ensemble(on, states)
    own = {name: getattr(found, name) for name in ("accuracy", "nll", "ece")}
    return {**own, "single": vars(found.mean_single), "models": [vars(each) for each in found.single]}


def _names(states: list[State]) -> list[str]:
    return [f"particle {number}" for number in range(len(states))]


def _plain(scores: Scores) -> dict[str, Any]:
    return {what: getattr(scores, what) for what in SCORES}


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(trace: dict[str, Any] | None, name: str) -> str:
    return "–" if trace is None else f"{trace[name]:.4g} ± {trace[f'{name}_half_width']:.2g}"
