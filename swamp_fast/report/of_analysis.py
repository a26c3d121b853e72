"""What a run's page has of its analysis: connectivity, flatness, layers, the cost of inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from swamp_fast.common.format import percent
from swamp_fast.report import drawings
from swamp_fast.report.facts import Row, RunFacts, in_digits, in_millions, in_thousands
from swamp_fast.report.page import Picture, Section, details, table

HUTCHINSON = "Hutchinson's estimator with Rademacher vectors on the unmasked weights"


def connected(run: RunFacts) -> Section | None:
    """Barriers between cycles and among particles, the plane of three of them, and their mixtures."""
    found, pictures = run.analysis, []
    consecutive = found.get("consecutive") or []
    if consecutive:
        rows = [
            {"from": row["from"], "to": row["to"], "density": run.densities.get(row["to"])}
            | {f"{kind} over {over}": value for kind, both in (row.get("barriers") or {}).items() if both
               for over, value in both.items()}
            for row in consecutive
        ]  # fmt: skip
        caption = (
            "The highest point of the straight line between a cycle's solution and the next one's, over the higher end "
            "and over the mean of the ends; BatchNorm is re-estimated at every point, and a barrier of the test set is "
            "only reported."
        )
        drawing = drawings.barriers(consecutive, run.densities)
        pictures.append(Picture("barriers", "Barriers between consecutive cycles", caption, drawing, rows))
    particles = found.get("particles")
    matrix = (particles or {}).get("matrix") or {}
    if particles and matrix:
        names = [str(each) for each in particles["names"]]
        pairs_of = [(one, other) for one in range(len(names)) for other in range(one + 1, len(names))]
        measured = {kind: values for kind, values in matrix.items() if values}
        rows = [
            {"from": names[one], "to": names[other]} | {kind: each[one][other] for kind, each in measured.items()}
            for one, other in pairs_of
        ]
        shown = {}
        for kind in ("error", "loss"):
            split = "test" if matrix.get(f"test_{kind}") else "train"
            if values := matrix.get(f"{split}_{kind}"):
                times = 100.0 if kind == "error" else 1.0
                title = f"{split} {kind}" + (", points" if kind == "error" else "")
                written = ".2f" if kind == "error" else ".3f"
                shown[title] = ([[value * times for value in row] for row in values], written)
        caption = (
            f"Barriers between the particles of cycle {particles['cycle']}, over the {particles.get('over', 'max')} of "
            "the ends; near 0 everywhere means one basin, in which averaging is safe."
        )
        drawing = drawings.matrices(shown, names)
        pictures.append(Picture("matrix", "Barriers among the particles", caption, drawing, rows))
    plane = found.get("plane")
    if plane:
        caption = (
            "Level lines of the training loss over the plane through three solutions; all other directions are unseen."
        )
        title = f"The plane of {', '.join(map(str, plane['names']))}"
        pictures.append(_plane("plane", title, caption, plane, "distance in weights"))
    plane = found.get("random_plane")
    if plane:
        caption = (
            "Level lines of the training loss along two random directions, each filter of which is as long as the "
            "solution's; two directions show little of the landscape."
        )
        title = f"A random plane at the average of cycle {plane['cycle']}"
        pictures.append(_plane("random-plane", title, caption, plane, "1: the filters' own length"))
    if not pictures:
        return None
    text = ["A barrier near 0 means that two solutions are linearly connected."]
    about = found.get("about") or {}
    differs = about.get("differs", ["train"] if about.get("same_training_data") is False else [])
    if differs:
        text.append(f"The analysis had other {', '.join(differs)} than the run: its numbers are of those.")
    after: list[Any] = []
    hull = found.get("hull")
    if hull:
        kinds = [kind for kind in ("train_error", "test_error", "train_loss", "test_loss") if hull.get(kind)]
        corners = hull.get("corners") or {}
        cells = [
            (
                kind.replace("_", " "),
                *map(percent if "error" in kind else in_digits, (*_ends(hull[kind]), *_ends(corners.get(kind)))),
            )
            for kind in kinds
        ]
        head = ("", "mixtures: lowest", "highest", "particles: lowest", "highest")
        after.append(f"Random mixtures of the particles (in their convex hull): {len(hull[kinds[0]]) if kinds else 0}.")
        after.append(table(cells, head, "mixtures of the particles"))
    return Section("Connectivity", text, pictures, after)


def compared(run: RunFacts) -> Section | None:
    """The masks of another run beside this one's, and the barriers between the averages of equal cycles."""
    found = run.analysis.get("against")
    if not found:
        return None
    overlap = found["overlap"]
    rows = [
        {name: value for name, value in row.items() if name != "layers"}
        | {f"iou of {name}": value for name, value in row["layers"].items()}
        for row in overlap
    ]
    caption = (
        "The share that both runs keep of what either keeps, over this run's density; random masks as dense as these "
        "would have what is dotted."
    )
    picture = Picture("overlap", f"Masks of {run.name} and {found['run']}", caption, drawings.overlaps(overlap), rows)
    kinds = [kind for kind in ("train_error", "test_error", "train_loss", "test_loss")
             if kind in found["barriers"][0]["barriers"]]  # fmt: skip
    cells = []
    for row, between in zip(overlap, found["barriers"], strict=True):
        numbers = [(percent if "error" in kind else in_digits)(between["barriers"][kind]["max"]) for kind in kinds]
        shares = (percent(row["density_a"]), percent(row["density_b"]), f"{row['iou']:.3f}", f"{row['hamming']:.3f}")
        cells.append((row["cycle"], *shares, *numbers))
    head = ("cycle", "kept", "kept there", "IoU", "Hamming", *(kind.replace("_", " ") for kind in kinds))
    text = (
        "Barriers are those between the averages of equal cycles, over the higher end, on this run's data; BatchNorm "
        "is re-estimated at every point."
    )
    return Section(f"Against {found['run']}", [], [picture], [text, table(cells, head, "against another run", words=0)])


def _plane(name: str, title: str, caption: str, plane: Row, unit: str) -> Picture:
    values = plane["train_loss"]
    points = plane["points"], plane["names"]
    drawing = drawings.plane(plane["x"], plane["y"], values, *points, "training loss", unit)
    rows = [
        {"x": x, "y": y, "train_loss": value}
        for y, line in zip(plane["y"], values, strict=True)
        for x, value in zip(plane["x"], line, strict=True)
    ]
    return Picture(name, title, caption, drawing, rows)


def flat(run: RunFacts) -> Section | None:
    """Hessian traces, raw and scaled."""
    hessian = run.analysis.get("hessian") or []
    if not hessian:
        return None
    names = ("cycle", "density", "trace", "trace_half_width", "scaled", "scaled_half_width", "norm", "probes")
    rows = [{name: row.get(name) for name in names} for row in hessian]
    probes = hessian[-1].get("probes")
    estimated = f"{HUTCHINSON}, {probes} of them" if probes else HUTCHINSON
    caption = (
        f"Hessian trace of the training loss with its 95 % interval, by {estimated}: the raw trace depends on the "
        "scale of the weights, which BatchNorm leaves free and averaging shrinks, so compare the one scaled by the "
        "layers' norms."
    )
    picture = Picture("flatness", "Hessian trace over sparsity", caption, drawings.traces(hessian), rows)
    last = hessian[-1].get("layers") or {}
    cells = [
        (name, in_digits(each.get("trace")), in_digits(each.get("norm")), in_thousands(each.get("kept")))
        for name, each in last.items()
    ]
    head = ("layer", "trace", "norm", "weights kept")
    each = [
        (
            row["cycle"],
            percent(row["density"]),
            _interval(row, "trace"),
            _interval(row, "scaled"),
            in_digits(row.get("norm")),
        )
        for row in hessian
    ]
    columns = ("cycle", "density", "trace", "scaled", "norm of the weights")
    numbers = details("By cycle", table(each, columns, "trace by cycle", words=0))
    after = [details(f"By layer, cycle {hessian[-1]['cycle']}", table(cells, head, "trace by layer"))] if cells else []
    return Section("Flatness", [], [picture], [numbers, *after])


def layers(run: RunFacts) -> Section | None:
    """Densities by layer, and dead channels."""
    cycles = [(row["cycle"], kept) for row, kept in zip(run.rows, run.kept, strict=True)]
    if not cycles or not cycles[0][1]:
        return None
    rows = [{"cycle": cycle, **kept} for cycle, kept in cycles]
    gone = [name for name, density in cycles[-1][1].items() if density == 0]
    decides = (
        "the weights within a layer are drawn at random"
        if run.config.mask_score == "random"
        else "one global threshold decides, so layers thin out unequally"
    )
    caption = (
        "The darker, the more of a layer is kept, in equal steps of the density's logarithm, × where nothing is; "
        f"{decides}."
    )
    drawing = drawings.layers(cycles)
    pictures = [Picture("layers", "Density by layer and cycle", caption, drawing, rows)]
    masks = run.analysis.get("masks") or []
    if masks:
        dead = [
            {"cycle": row["cycle"], "density": run.densities.get(row["cycle"])}
            | {name: row.get(name) for name in ("dead_in", "dead_out")}
            for row in masks
        ]
        caption = (
            "Channels that no weight leads to, and those that lead nowhere; with a bias or BatchNorm a channel without "
            "incoming weights may still pass a constant on."
        )
        drawing = drawings.dead_channels(masks, run.densities)
        pictures.append(Picture("dead-channels", "Dead channels over sparsity", caption, drawing, dead))
    text = [f"Pruned away whole: {', '.join(gone)}."] if gone else []
    last, first = cycles[-1], [(name, percent(density)) for name, density in cycles[-1][1].items()]
    after = [details(f"Densities in cycle {last[0]}", table(first, ("layer", "kept"), "densities by layer"))]
    return Section("Layers", text, pictures, after)


def inference(run: RunFacts) -> Section | None:
    """What a forward costs, counted and measured."""
    cost = run.analysis.get("cost") or []
    if not cost:
        return None
    cells = []
    for row in cost:
        sparse, dense = row.get("sparse_ms"), row.get("dense_ms")
        faster = f"{dense / sparse:.2f}" if sparse and dense else "–"
        share = percent(row["flops"] / row["dense_flops"], 1) if row.get("flops") and row.get("dense_flops") else "–"
        density = percent(run.densities.get(row["cycle"]))
        numbers = (in_millions(row.get("flops")), share, in_thousands(row.get("kept")), in_thousands(row.get("bytes")))
        cells.append((row["cycle"], density, *numbers, in_digits(sparse), in_digits(dense), faster))
    head = ("cycle", "density", "MFLOP", "of dense", "kept", "bytes", "sparse, ms", "dense, ms", "dense / sparse")
    batch = cost[-1].get("batch_size")
    text = (
        f"FLOPs of one sample's forward, milliseconds of {f'{batch:,} samples at once' if batch else 'a batch'}: "
        "measured on this CPU with this project's kernels against the dense model, a dash where that was not."
    )
    return Section("Inference", [text, table(cells, head, "inference cost", words=0)])


def _ends(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    if not values or any(map(math.isnan, values)):
        return None, None
    return min(values), max(values)


def _interval(row: Row, name: str) -> str:
    half = row.get(f"{name}_half_width")
    return in_digits(row.get(name)) + ("" if half is None else f" ± {half:.2g}")
