"""What do the analyses of a run say at a glance? A summary as a text table, for the console."""

from __future__ import annotations

from typing import Any

from swamp_fast.analysis.connectivity import highest
from swamp_fast.common.checked import checked
from swamp_fast.common.format import percent

# Heading of a column -> its width in characters.
COLUMNS = {
    "cycle": 5,
    "barrier, loss": 13,
    "error": 8,
    "Hessian trace": 22,
    "scaled": 18,
    "dead in/out": 11,
    "FLOPs": 8,
    "ms": 8,
    "dense": 8,
}


def table(content: dict[str, Any]) -> str:
    """A text table of an analysis: one line per cycle, then lines about the last cycle's particles.

    The columns are the barrier to the next cycle, flatness, dead channels and cost.

    content  what `analyze` returns

    Raises TypeError or ValueError for anything else.
    """
    checked("content", content, dict)
    try:
        return _lines_of(content)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`content` must be what `analyze` returns, but it can't be read ({type(error).__name__}: {error})."
        ) from error


def _lines_of(content: dict[str, Any]) -> str:
    lines = [_line(COLUMNS)]
    barriers = {row["from"]: row["barriers"] for row in content["consecutive"]}
    traces = {row["cycle"]: row for row in content["hessian"]}
    for masks, cost in zip(content["masks"], content["cost"], strict=True):
        cycle = masks["cycle"]
        lines.append(_line(_cells(masks, cost, barriers.get(cycle, {}), traces.get(cycle))))
    if content["particles"] is not None:
        loss = highest([highest(row) for row in content["particles"]["matrix"]["train_loss"]])
        cycle = content["particles"]["cycle"]
        lines.append(f"highest barrier among the particles of cycle {cycle}: {loss:.4f} train loss")
    if content.get("against") is not None:
        lines.append(_against(content["against"]))
    if content["ensemble"] is not None:
        together, single = content["ensemble"]["accuracy"], content["ensemble"]["single"]["accuracy"]
        lines.append(f"accuracy of the particles' ensemble: {percent(together)}, their mean: {percent(single)}")
    about = content["about"]
    lines.append(f"on {about['train_samples']:,} of {about['of_training_samples']:,} training samples")
    return "\n".join(lines)


def _cells(masks: dict[str, Any], cost: dict[str, Any], barriers: dict[str, Any], trace: Any) -> list[str]:
    """The cells of one cycle. Barriers are measured from the higher end, on test data if there are any."""
    split = "test" if "test_loss" in barriers else "train"
    loss, error = (barriers.get(f"{split}_{kind}", {}).get("max") for kind in ("loss", "error"))
    dead_out = "–" if masks["dead_out"] is None else masks["dead_out"]
    flops = None if cost["flops"] is None else cost["flops"] / max(cost["dense_flops"], 1)
    milliseconds = (_number(cost[name], ".2f") for name in ("sparse_ms", "dense_ms"))
    return [
        f"{masks['cycle']}",
        _number(loss, ".4f"),
        percent(error),
        _interval(trace, "trace"),
        _interval(trace, "scaled"),
        f"{masks['dead_in']}/{dead_out}",
        percent(flops),
        *milliseconds,
    ]


def _against(against: dict[str, Any]) -> str:
    """One line that compares this run with the other one in their last common cycle."""
    overlap, between = against["overlap"][-1], against["barriers"][-1]
    barriers, ends = between["barriers"], between["ends"]
    split = "test" if "test_loss" in barriers else "train"
    error = barriers.get(f"{split}_error", {}).get("max")
    one, other = (percent(end) for end in ends[f"{split}_error"] or (None, None))
    return (
        f"against {against['run']}, cycle {overlap['cycle']}: IoU of the masks {overlap['iou']:.3f}, barrier "
        f"{barriers[f'{split}_loss']['max']:.4f} {split} loss, {percent(error)} error between {one} and {other}"
    )


def _line(cells: Any) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def _number(value: float | None, number_format: str) -> str:
    return "–" if value is None else format(value, number_format)


def _interval(trace: dict[str, Any] | None, name: str) -> str:
    return "–" if trace is None else f"{trace[name]:.4g} ± {trace[f'{name}_half_width']:.2g}"
