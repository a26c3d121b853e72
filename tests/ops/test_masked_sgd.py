"""masked_sgd_: implementations are compared with the reference, and the op with torch.optim.SGD."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_good_as
from torch import Tensor
from updates import SIZES, as_float64, ends_of_segments, move

from swamp_fast import ops
from swamp_fast.ops import reference


def arguments(
    lanes: int, parameters: int, prunable: int, dtype: torch.dtype, device: torch.device, segments: int = 3
) -> dict[str, object]:
    """Arguments for at most two runs. Rows are not adjacent in memory; each lane and segment has different rates."""
    runs = min(2, lanes)

    def row_strided() -> Tensor:
        return torch.randn(lanes, parameters + 7, dtype=dtype)[:, :parameters]

    found = {
        "weights": row_strided(),
        "grads": row_strided(),
        "momentum_buffer": row_strided(),
        "masks": (torch.rand(runs, prunable + 3) < 0.4)[:, :prunable],
        "run_of_lane": torch.arange(lanes) * runs // lanes,
        "lr": 0.1 * torch.rand(lanes, segments, dtype=torch.float64),
        "momentum": torch.rand(lanes, dtype=torch.float64),
        "weight_decay": 0.01 * torch.rand(lanes, segments, dtype=torch.float64),
        "grad_scale": 1 / (1 + torch.arange(lanes).double()),
        "swa": row_strided(),
        "swa_weight": (torch.arange(lanes) % 3).double() / 2,
        "segment_ends": ends_of_segments(runs, parameters, segments),
    }
    return {name: move(value, device) for name, value in found.items()}


def cloned(given: dict[str, object]) -> dict[str, object]:
    """The arguments with copies of the tensors that a step changes; a copy's rows are not adjacent either."""
    out = dict(given)
    for name in ("weights", "momentum_buffer", "swa"):
        tensor = given[name]
        copy = torch.full((tensor.shape[0], tensor.shape[1] + 7), torch.nan, dtype=tensor.dtype, device=tensor.device)
        out[name] = copy[:, : tensor.shape[1]].copy_(tensor)
    return out


def run(function: object, given: dict[str, object], nesterov: bool) -> tuple[Tensor, ...]:
    state = cloned(given)
    positional = [state.pop(name) for name in ("weights", "grads", "momentum_buffer", "masks", "run_of_lane")]
    function(*positional, nesterov=nesterov, **state)
    return positional[0], positional[2], state["swa"]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_reference(implementation, size, dtype, nesterov):
    given = arguments(*size, dtype, implementation.device)
    found = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given, nesterov)
    same = run(reference.masked_sgd_, given, nesterov)
    exact = run(reference.masked_sgd_, as_float64(given), nesterov)
    for each in zip(found, same, exact, strict=True):
        assert_as_good_as(*each)


def test_repeats_bit_for_bit_and_lanes_stand_alone(implementation):
    given = arguments(4, 5001, 4100, torch.float32, implementation.device)
    together = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given, False)
    again = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given, False)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    per_lane = [name for name in given if name not in ("masks", "segment_ends")]
    for order in ([2], [3, 1, 0, 2]):
        picked = {name: value[order].contiguous() if name in per_lane else value for name, value in given.items()}
        alone = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), picked, False)
        assert all(torch.equal(a, b[order]) for a, b in zip(alone, together, strict=True))


def test_pruned_weights_and_their_momentum_stay_zero(implementation):
    given = arguments(2, 300, 300, torch.float32, implementation.device)
    given["grads"][:, ::7] = torch.nan  # a pruned weight's gradient must have no effect
    given["masks"][:, ::7] = False
    for _ in range(3):
        weights, momentum, _ = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given, True)
        pruned = ~given["masks"][given["run_of_lane"]]
        assert weights[pruned].eq(0).all()
        assert momentum[pruned].eq(0).all()
        assert weights[~pruned].isfinite().all()
        given["weights"], given["momentum_buffer"] = weights, momentum


@pytest.mark.parametrize("nesterov", [False, True])
def test_rounds_as_torch_optim_sgd(nesterov):
    """With the widest instruction set, several steps give the same bits as torch.optim.SGD."""
    lanes, parameters = 3, 1003
    one = torch.full((lanes,), 1.0, dtype=torch.float64)
    weights = torch.randn(lanes, parameters)
    plain = [torch.nn.Parameter(row.clone()) for row in weights]
    optimizer = torch.optim.SGD(plain, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    momentum, masks = torch.zeros_like(weights), torch.ones(1, parameters, dtype=torch.bool)
    for _ in range(5):
        grads = torch.randn(lanes, parameters)
        for parameter, grad in zip(plain, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        ops.masked_sgd_(
            *(weights, grads, momentum, masks, torch.zeros(lanes, dtype=torch.int64)),
            lr=0.1 * one[:, None],
            momentum=0.9 * one,
            weight_decay=5e-4 * one[:, None],
            nesterov=nesterov,
        )
    assert torch.equal(weights, torch.stack([parameter.detach() for parameter in plain]))


def test_opcheck():
    given = arguments(3, 40, 17, torch.float32, torch.device("cpu"))
    rates = [given[name] for name in ("lr", "momentum", "weight_decay")]
    positional = [given[name] for name in ("weights", "grads", "momentum_buffer", "masks", "run_of_lane")]
    for rest in ((given["grad_scale"], given["swa"], given["swa_weight"]), (None, None, None)):
        everything = (*positional, *rates, True, *rest, given["segment_ends"])
        torch.library.opcheck(torch.ops.swamp_fast.masked_sgd_, everything)


def test_equal_segments_are_one(implementation):
    """Segments with equal rates give the bits of one segment, wherever they end."""
    given = arguments(4, 5001, 4100, torch.float32, implementation.device)
    given |= {name: given[name][:, :1].expand(-1, 3).contiguous() for name in ("lr", "weight_decay")}
    several = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given, True)
    given |= {name: given[name][:, :1].contiguous() for name in ("lr", "weight_decay")}
    for ends in (None, torch.full_like(given["segment_ends"][:, :1], 5001)):
        one = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given | {"segment_ends": ends}, True)
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_a_scale_of_one_is_none(implementation):
    given = arguments(3, 1003, 500, torch.float32, implementation.device)
    given["grad_scale"] = torch.ones_like(given["momentum"])
    scaled = run(lambda *a, **k: implementation("masked_sgd_", *a, **k), given, True)
    plain = run(lambda *a, **k: implementation("masked_sgd_", *a, **k | {"grad_scale": None}), given, True)
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))


BAD = {
    "grads": (lambda t: t[:, :-1], r"`grads` must have shape \[L, P\] = \[4, 24\], got \[4, 23\]"),
    "momentum_buffer": (lambda t: t.double(), "`momentum_buffer` must be float32, got float64"),
    "lr": (
        lambda t: t[:2],
        r"`lr` must have shape \[L, S\] = \[4, 3\], got \[2, 3\]. Pass one rate per lane and segment",
    ),
    "grad_scale": (lambda t: t.float(), "`grad_scale` must be float64, got float32"),
    "run_of_lane": (lambda t: t + 2, r"`run_of_lane` must lie in \[0, R\) = \[0, 2\), got 2 … 3"),
    "weights": (
        lambda t: torch.randn(24, 4).T,
        r"rows of `weights` must be contiguous, .* Pass weights.contiguous\(\)",
    ),
    "segment_ends": (
        lambda t: t - 1,
        r"`segment_ends` must rise from at least 0 to P = 24 in each row, got \[.*, 23\]",
    ),
    "weight_decay": (lambda t: t[:, :2], r"`weight_decay` must have shape \[L, S\] = \[4, 3\], got \[4, 2\]"),
    "swa": (lambda t: None, "`swa` and `swa_weight` go together"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_refuses(name):
    given = arguments(4, 24, 8, torch.float32, torch.device("cpu"))
    change, text = BAD[name]
    given[name] = change(given[name])
    positional = [given.pop(each) for each in ("weights", "grads", "momentum_buffer", "masks", "run_of_lane")]
    with pytest.raises((ValueError, TypeError), match=text):
        ops.masked_sgd_(*positional, **given)


def test_refuses_more_mask_than_parameters():
    given = arguments(2, 24, 8, torch.float32, torch.device("cpu"))
    given["masks"] = torch.ones(1, 25, dtype=torch.bool)
    positional = [given.pop(each) for each in ("weights", "grads", "momentum_buffer", "masks")]
    with pytest.raises(ValueError, match="Q = 25 weights, more than the P = 24"):
        ops.masked_sgd_(
            *positional, torch.zeros(2, dtype=torch.int64), **{k: v for k, v in given.items() if k != "run_of_lane"}
        )
