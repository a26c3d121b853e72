"""The sections of a run's page that come from its analysis: connectivity, flatness, layers, inference cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from swamp_fast.report.analysis_charts import (
    draw_barrier_matrices,
    draw_barriers,
    draw_dead_channels,
    draw_overlap,
    draw_plane,
    draw_traces,
)
from swamp_fast.report.charts import draw_layers
from swamp_fast.report.facts import Row, RunFacts
from swamp_fast.report.formats import DASH, grouped, millions, percent, significant
from swamp_fast.report.page import Picture, Section, Table
from swamp_fast.runs.result import ANALYSIS_SCORES

SCORES = sorted(ANALYSIS_SCORES, key=lambda score: "loss" in score)  # errors first


def connectivity_section(run: RunFacts) -> Section | None:
    """The section on barriers between cycles and particles, the plane through three particles, and mixtures."""
    analysis = run.analysis
    consecutive, particles, plane = (analysis.get(name) for name in ("consecutive", "particles", "plane"))
    pictures = []
    if consecutive:
        pictures.append(_barriers_picture(consecutive, run.densities))
    if particles and particles.get("matrix"):
        pictures.append(_matrix_picture(particles))
    if plane:
        pictures.append(_plane_picture(plane))
    if not pictures:
        return None
    about, hull = analysis.get("about") or {}, analysis.get("hull")
    values = {
        "differs": about.get("differs", ["train"] if about.get("same_training_data") is False else []),
        "hull": hull and _hull_table(hull),
        "mixtures": hull and next((len(hull[score]) for score in SCORES if hull.get(score)), 0),
    }
    return Section("Connectivity", "run/connectivity.html", values, pictures)


def _barriers_picture(consecutive: Sequence[Row], densities: dict[int, float]) -> Picture:
    rows = [
        {"from": row["from"], "to": row["to"], "density": densities.get(row["to"])}
        | {
            f"{score} over {over}": value
            for score, barriers in (row.get("barriers") or {}).items()
            for over, value in (barriers or {}).items()
        }
        for row in consecutive
    ]
    caption = (
        "The highest point on the straight line between the solutions of consecutive cycles, measured from the higher "
        "end and from the mean of the ends. BatchNorm is re-estimated at every point. Barriers on test data are "
        "reported only; no choice depends on them."
    )
    drawing = draw_barriers(consecutive, densities)
    return Picture("barriers", "Barriers between consecutive cycles", caption, drawing, rows)


def _matrix_picture(particles: Row) -> Picture:
    names, matrix = [str(name) for name in particles["names"]], particles["matrix"]
    measured = {score: barriers for score, barriers in matrix.items() if barriers}
    rows = [
        {"from": names[i], "to": names[j]} | {score: barriers[i][j] for score, barriers in measured.items()}
        for i, j in combinations(range(len(names)), 2)
    ]
    shown: dict[str, tuple[list[list[float]], str]] = {}
    for kind, scale, unit, number_format in (("error", 100.0, ", points", ".2f"), ("loss", 1.0, "", ".3f")):
        split = "test" if matrix.get(f"test_{kind}") else "train"
        if barriers := matrix.get(f"{split}_{kind}"):
            scaled = [[value * scale for value in row] for row in barriers]
            shown[f"{split} {kind}{unit}"] = scaled, number_format
    caption = (
        f"Barriers between the particles of cycle {particles['cycle']}, measured from the "
        f"{particles.get('over', 'max')} of the ends. If all are near 0, the particles lie in one basin, where "
        "averaging is safe."
    )
    return Picture("matrix", "Barriers among the particles", caption, draw_barrier_matrices(shown, names), rows)


def _plane_picture(plane: Row) -> Picture:
    x, y, losses = plane["x"], plane["y"], plane["train_loss"]
    rows = [
        {"x": right, "y": up, "train_loss": loss}
        for up, line in zip(y, losses, strict=True)
        for right, loss in zip(x, line, strict=True)
    ]
    caption = (
        "Level lines of the training loss over the plane through three solutions. Directions out of the plane are not "
        "shown."
    )
    drawing = draw_plane(x, y, losses, plane["points"], plane["names"], "training loss")
    return Picture("plane", f"The plane of {', '.join(map(str, plane['names']))}", caption, drawing, rows)


def _hull_table(hull: Row) -> Table:
    corners, rows = hull.get("corners") or {}, []
    for score in SCORES:
        if hull.get(score):
            ends = *_lowest_and_highest(hull[score]), *_lowest_and_highest(corners.get(score))
            rows.append((score.replace("_", " "), *map(_format_of(score), ends)))
    head = ("", "mixtures: lowest", "highest", "particles: lowest", "highest")
    return Table("mixtures of the particles", head, rows)


def other_run_section(run: RunFacts) -> Section | None:
    """The section that compares this run's masks and averages with those of another run."""
    against = run.analysis.get("against")
    if not against:
        return None
    overlap, other = against["overlap"], against["run"]
    rows = [
        {name: value for name, value in row.items() if name != "layers"}
        | {f"iou of {name}": value for name, value in row["layers"].items()}
        for row in overlap
    ]
    caption = (
        "The number of weights that both runs keep, divided by the number that at least one keeps, over this run's "
        "density. The dotted line shows random masks of the same densities."
    )
    picture = Picture("overlap", f"Masks of {run.name} and {other}", caption, draw_overlap(overlap), rows)
    scores = [score for score in SCORES if score in against["barriers"][0]["barriers"]]
    cells = []
    for row, between in zip(overlap, against["barriers"], strict=True):
        barriers = (_format_of(score)(between["barriers"][score]["max"]) for score in scores)
        masks = percent(row["density_a"]), percent(row["density_b"]), f"{row['iou']:.3f}", f"{row['hamming']:.3f}"
        cells.append((row["cycle"], *masks, *barriers))
    head = ("cycle", "kept here", "kept there", "IoU", "Hamming", *(score.replace("_", " ") for score in scores))
    values = {"cycles": Table("against another run", head, cells, text_columns=0)}
    return Section(f"Against {other}", "run/other_run.html", values, [picture])


def flatness_section(run: RunFacts) -> Section | None:
    """The section on flatness: traces of the Hessian, raw and scaled."""
    hessian = run.analysis.get("hessian")
    if not hessian:
        return None
    columns = ("cycle", "density", "trace", "trace_half_width", "scaled", "scaled_half_width", "norm", "probes")
    rows = [{name: row.get(name) for name in columns} for row in hessian]
    last = hessian[-1]
    probes = f"{last['probes']} " if last.get("probes") else ""
    caption = (
        f"Hessian trace of the training loss with its 95 % interval, by Hutchinson's estimator with {probes}Rademacher "
        "vectors on the kept weights. The raw trace depends on the scale of the weights, which BatchNorm leaves free "
        "and averaging shrinks. So compare the scaled trace, which takes the layers' norms into account."
    )
    by_cycle = [
        (row["cycle"], percent(row["density"]), _interval(row, "trace"), _interval(row, "scaled"),
         significant(row.get("norm")))
        for row in hessian
    ]  # fmt: skip
    by_layer = [
        (name, significant(layer.get("trace")), significant(layer.get("norm")), grouped(layer.get("kept")))
        for name, layer in (last.get("layers") or {}).items()
    ]
    head = ("cycle", "density", "trace", "scaled", "norm of the weights")
    values = {
        "by_cycle": Table("trace by cycle", head, by_cycle, text_columns=0),
        "by_layer": Table("trace by layer", ("layer", "trace", "norm", "weights kept"), by_layer),
        "last_cycle": last["cycle"],
    }
    picture = Picture("flatness", "Hessian trace over sparsity", caption, draw_traces(hessian), rows)
    return Section("Flatness", "run/flatness.html", values, [picture])


def layers_section(run: RunFacts) -> Section | None:
    """The section on layers: their densities and dead channels."""
    cycles = [(row["cycle"], kept) for row, kept in zip(run.rows, run.kept, strict=True)]
    if not cycles or not cycles[0][1]:
        return None
    if run.config.mask_score == "random":
        reason = "The weights within a layer are drawn at random."
    else:
        reason = "One global threshold prunes all layers, so their densities differ."
    caption = (
        "Darker cells are layers that keep more of their weights, on a logarithmic scale; × marks layers without kept "
        "weights. "
        f"{reason}"
    )
    rows = [{"cycle": cycle, **kept} for cycle, kept in cycles]
    pictures = [Picture("layers", "Density by layer and cycle", caption, draw_layers(cycles), rows)]
    masks = run.analysis.get("masks")
    if masks:
        pictures.append(_dead_channels_picture(masks, run.densities))
    last_cycle, kept = cycles[-1]
    densities = [(name, percent(density)) for name, density in kept.items()]
    values = {
        "gone": [name for name, density in kept.items() if density == 0],
        "last_cycle": last_cycle,
        "densities": Table("densities by layer", ("layer", "kept"), densities),
    }
    return Section("Layers", "run/layers.html", values, pictures)


def _dead_channels_picture(masks: Sequence[Row], densities: dict[int, float]) -> Picture:
    rows = [
        {"cycle": row["cycle"], "density": densities.get(row["cycle"])}
        | {name: row.get(name) for name in ("dead_in", "dead_out")}
        for row in masks
    ]
    caption = (
        "The number of channels without incoming weights, and of channels without outgoing weights. With a bias or "
        "BatchNorm, a channel without incoming weights may still output a constant."
    )
    drawing = draw_dead_channels(masks, densities)
    return Picture("dead-channels", "Dead channels over sparsity", caption, drawing, rows)


def inference_section(run: RunFacts) -> Section | None:
    """The section on the cost of a forward pass: counted FLOPs and measured latency."""
    costs = run.analysis.get("cost")
    if not costs:
        return None
    head = ("cycle", "density", "MFLOP", "of dense", "kept", "bytes", "sparse, ms", "dense, ms", "dense / sparse")
    rows = [_inference_cells(row, run.densities) for row in costs]
    values = {
        "batch_size": costs[-1].get("batch_size"),
        "costs": Table("inference cost", head, rows, text_columns=0),
    }
    return Section("Inference", "run/inference.html", values)


def _inference_cells(row: Row, densities: dict[int, float]) -> tuple[Any, ...]:
    flops, dense_flops, sparse, dense = (row.get(n) for n in ("flops", "dense_flops", "sparse_ms", "dense_ms"))
    share = percent(flops / dense_flops, 1) if flops and dense_flops else DASH
    speedup = f"{dense / sparse:.2f}" if sparse and dense else DASH
    counted = millions(flops), share, grouped(row.get("kept")), grouped(row.get("bytes"))
    measured = significant(sparse), significant(dense), speedup
    return row["cycle"], percent(densities.get(row["cycle"])), *counted, *measured


def _format_of(score: str) -> Any:
    """The function that formats a score: errors in per cent, losses with four significant digits."""
    return percent if "error" in score else significant


def _lowest_and_highest(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    if not values or any(map(math.isnan, values)):
        return None, None
    return min(values), max(values)


def _interval(row: Row, name: str) -> str:
    half_width = row.get(f"{name}_half_width")
    return significant(row.get(name)) + ("" if half_width is None else f" ± {half_width:.2g}")
