"""masked_adamw_: implementations are compared with the reference and with torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_good_as
from torch import Tensor
from updates import SIZES, as_float64, ends_of_segments, move

from swamp_fast import ops
from swamp_fast.ops import reference

STATE = ("weights", "exp_avg", "exp_avg_sq", "swa")  # the tensors that a step changes
POSITIONAL = ("weights", "grads", "exp_avg", "exp_avg_sq", "masks", "run_of_lane")
RATES = ("lr", "beta1", "beta2", "eps", "weight_decay", "step")


def arguments(
    lanes: int, parameters: int, prunable: int, dtype: torch.dtype, device: torch.device, segments: int = 3
) -> dict[str, Tensor]:
    """Arguments for at most two runs. Rows are not adjacent in memory; each lane and segment has different rates."""
    runs = min(2, lanes)

    def row_strided() -> Tensor:
        return torch.randn(lanes, parameters + 7, dtype=dtype)[:, :parameters]

    rates = torch.rand(2, lanes, dtype=torch.float64)
    found = {
        "weights": row_strided(),
        "grads": row_strided(),
        "exp_avg": row_strided(),
        "exp_avg_sq": row_strided().square_(),
        "masks": (torch.rand(runs, prunable + 3) < 0.4)[:, :prunable],
        "run_of_lane": torch.arange(lanes) * runs // lanes,
        "lr": 0.1 * torch.rand(lanes, segments, dtype=torch.float64),
        "beta1": rates[0],
        "beta2": 0.9 + 0.1 * rates[1],
        "eps": 10.0 ** -(2 + torch.arange(lanes).double()),
        "weight_decay": 0.1 * torch.rand(lanes, segments, dtype=torch.float64),
        "step": 1 + 50 * torch.arange(lanes).double(),
        "grad_scale": 1 / (1 + torch.arange(lanes).double()),
        "swa": row_strided(),
        "swa_weight": (torch.arange(lanes) % 3).double() / 2,
        "segment_ends": ends_of_segments(runs, parameters, segments),
    }
    return {name: move(value, device) for name, value in found.items()}


def run(function: object, given: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The state after one step on copies of the given tensors."""
    state = dict(given)
    for name in STATE:
        tensor = given[name]
        around = torch.full((len(tensor), tensor.shape[1] + 7), torch.nan, dtype=tensor.dtype, device=tensor.device)
        state[name] = around[:, : tensor.shape[1]].copy_(tensor)
    positional = [state[name] for name in POSITIONAL]
    function(*positional, **{name: value for name, value in state.items() if name not in POSITIONAL})
    return tuple(state[name] for name in STATE)


def call(implementation: object):
    return lambda *args, **kwargs: implementation("masked_adamw_", *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_reference(implementation, size, dtype):
    given = arguments(*size, dtype, implementation.device)
    found = run(call(implementation), given)
    same = run(reference.masked_adamw_, given)
    exact = run(reference.masked_adamw_, as_float64(given))
    for each in zip(found, same, exact, strict=True):
        assert_as_good_as(*each)


def test_repeats_bit_for_bit_and_lanes_stand_alone(implementation):
    given = arguments(4, 5001, 4100, torch.float32, implementation.device)
    together = run(call(implementation), given)
    again = run(call(implementation), given)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    per_lane = [name for name in given if name not in ("masks", "segment_ends")]
    for order in ([2], [3, 1, 0, 2]):
        picked = {name: value[order].contiguous() if name in per_lane else value for name, value in given.items()}
        alone = run(call(implementation), picked)
        assert all(torch.equal(a, b[order]) for a, b in zip(alone, together, strict=True))


def test_pruned_weights_and_both_moments_stay_zero(implementation):
    given = arguments(2, 300, 300, torch.float32, implementation.device)
    given["grads"][:, ::7] = torch.nan  # a pruned weight's gradient must have no effect
    given["masks"][:, ::7] = False
    for _ in range(3):
        after = dict(zip(STATE, run(call(implementation), given), strict=True))
        pruned = ~given["masks"][given["run_of_lane"]]
        for name in ("weights", "exp_avg", "exp_avg_sq"):
            assert after[name][pruned].eq(0).all()
        assert after["weights"][~pruned].isfinite().all()
        given |= {name: after[name] for name in ("weights", "exp_avg", "exp_avg_sq")}
        given["step"] = given["step"] + 1


def test_equal_segments_are_one(implementation):
    """Segments with equal rates give the bits of one segment, wherever they end."""
    given = arguments(4, 5001, 4100, torch.float32, implementation.device)
    rates = {name: given[name][:, :1].contiguous() for name in ("lr", "weight_decay")}
    several = run(call(implementation), given | {name: rate.repeat(1, 3) for name, rate in rates.items()})
    for ends in (None, torch.full_like(given["segment_ends"][:, :1], 5001)):
        one = run(call(implementation), given | rates | {"segment_ends": ends})
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_good_as_torch_optim_adamw(implementation, dtype):
    """Takes several steps from zero moments. Each lane has different rates and a clipped gradient."""
    lanes, parameters, steps = 3, 1003, 5
    start, grads = torch.randn(lanes, parameters, dtype=dtype), torch.randn(steps, lanes, parameters, dtype=dtype)
    settings = [
        {"lr": 0.1 / (lane + 1), "betas": (0.9 - 0.1 * lane, 0.999), "eps": 10.0 ** -(4 + lane), "weight_decay": 0.01}
        for lane in range(lanes)
    ]
    device = implementation.device
    rates = {"lr": [each["lr"] for each in settings], "beta1": [each["betas"][0] for each in settings]}
    rates |= {"beta2": [0.999] * lanes, "eps": [each["eps"] for each in settings], "weight_decay": [0.01] * lanes}
    rates = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in rates.items()}
    per_segment = {name: rates.pop(name)[:, None] for name in ("lr", "weight_decay")}
    masks = torch.ones(1, parameters, dtype=torch.bool, device=device)
    run_of_lane = torch.zeros(lanes, dtype=torch.int64, device=device)
    weights, moments = move(start.clone(), device), [torch.zeros_like(start, device=device) for _ in range(2)]
    for number, grad in enumerate(grads, 1):
        grad = move(grad, device)
        scale = implementation("clip_scale", grad, masks, run_of_lane, torch.full_like(rates["eps"], 20.0))
        call(implementation)(
            *(weights, grad, *moments, masks, run_of_lane),
            **(rates | per_segment),
            step=torch.full_like(rates["eps"], number),
            grad_scale=scale,
        )
    expected = []
    for kind in (dtype, torch.float64):
        plain = [torch.nn.Parameter(row.to(kind, copy=True)) for row in start]
        optimizers = [torch.optim.AdamW([each], **own) for each, own in zip(plain, settings, strict=True)]
        for grad in grads:
            for parameter, own, optimizer in zip(plain, grad, optimizers, strict=True):
                parameter.grad = own.to(kind, copy=True)
                torch.nn.utils.clip_grad_norm_([parameter], 20.0)
                optimizer.step()
        expected.append(torch.stack([parameter.detach() for parameter in plain]))
    assert_as_good_as(weights.cpu(), *expected)


def test_opcheck():
    given = arguments(3, 40, 17, torch.float32, torch.device("cpu"))
    for rest in ((given["grad_scale"], given["swa"], given["swa_weight"]), (None, None, None)):
        everything = (*(given[name] for name in (*POSITIONAL, *RATES)), *rest, given["segment_ends"])
        torch.library.opcheck(torch.ops.swamp_fast.masked_adamw_, everything)


BAD = {
    "grads": (lambda t: t[:, :-1], r"`grads` must have shape \[L, P\] = \[4, 24\], got \[4, 23\]"),
    "exp_avg": (lambda t: t.double(), "`exp_avg` must be float32, got float64"),
    "exp_avg_sq": (lambda t: t[:3], r"`exp_avg_sq` must have shape \[L, P\] = \[4, 24\], got \[3, 24\]"),
    "step": (lambda t: t.long(), "`step` must be float64, got int64"),
    "beta2": (lambda t: t[:2], r"`beta2` must have shape \[L\] = \[4\], got \[2\]. Rates are per lane"),
    "run_of_lane": (lambda t: t + 2, r"`run_of_lane` must lie in \[0, R\) = \[0, 2\), got 2 … 3"),
    "masks": (lambda t: torch.ones(1, 25, dtype=torch.bool), "Q = 25 weights, more than the P = 24"),
    "grad_scale": (lambda t: t[:, None], r"`grad_scale` must have shape \[L\] = \[4\], got \[4, 1\]"),
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
    positional = [given.pop(each) for each in POSITIONAL]
    with pytest.raises((ValueError, TypeError), match=text):
        ops.masked_adamw_(*positional, **given)
