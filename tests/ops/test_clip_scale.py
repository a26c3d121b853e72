"""clip_scale: implementations are compared with the reference, and the op with torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_good_as
from torch import Tensor
from updates import SIZES, move

from swamp_fast import ops
from swamp_fast.ops import reference

MORE = [(2, 150_000, 140_001)]  # lanes, P and Q; a lane has more blocks than with any of SIZES


def arguments(lanes: int, parameters: int, prunable: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Arguments for at most two runs. Gradient rows are not adjacent in memory, and only some lanes need clipping."""
    runs = min(2, lanes)
    given = [
        torch.randn(lanes, parameters + 7, dtype=dtype)[:, :parameters],
        (torch.rand(runs, prunable + 3) < 0.4)[:, :prunable],
        torch.arange(lanes) * runs // lanes,
        (max(parameters, 1) ** 0.5 * 2.0 ** (1 - 2 * torch.arange(lanes))).double(),
    ]
    return [move(each, device) for each in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [*SIZES, *MORE], ids=str)
def test_against_reference(implementation, size, dtype):
    given = arguments(*size, dtype, implementation.device)
    before = given[0].clone()
    found, expected = implementation("clip_scale", *given), reference.clip_scale(*given)
    assert torch.equal(given[0], before)
    assert_as_good_as(found, expected, expected)
    if size[1] > 100:
        assert found[0] == 1
        assert found[-1] < 1


def test_repeats_bit_for_bit_and_lanes_stand_alone(implementation):
    given = arguments(5, 9000, 8100, torch.float32, implementation.device)
    together = implementation("clip_scale", *given)
    assert torch.equal(together, implementation("clip_scale", *given))
    for order in ([2], [3, 1, 0, 2, 4]):
        grads, masks, *rest = given
        alone = implementation("clip_scale", grads[order].contiguous(), masks, *(each[order] for each in rest))
        assert torch.equal(alone, together[order])


def test_bits_depend_on_no_number_of_threads():
    given = arguments(2, 9000, 8100, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        found = [(torch.set_num_threads(number), ops.clip_scale(*given))[1] for number in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_pruned_does_not_count(implementation):
    grads, masks, run_of_lane, clip_norm = arguments(3, 1003, 1000, torch.float64, implementation.device)
    expected = implementation("clip_scale", grads, masks, run_of_lane, clip_norm)
    grads[:, :1000][~masks[run_of_lane]] = torch.nan
    assert torch.equal(implementation("clip_scale", grads, masks, run_of_lane, clip_norm), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_a_norm_that_is_not_finite_is_that_lanes_alone(implementation, value):
    given = arguments(3, 1003, 900, torch.float64, implementation.device)
    expected = implementation("clip_scale", *given)
    given[0][1, 1000] = value
    found = implementation("clip_scale", *given)
    assert found[1].isnan()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("bound", [0.5, 1e4])
def test_as_clip_grad_norm(bound):
    grads, masks, run_of_lane, _ = arguments(3, 1003, 900, torch.float64, torch.device("cpu"))
    grads[:, :900] *= masks[run_of_lane]
    scale = ops.clip_scale(grads, masks, run_of_lane, torch.full((3,), bound, dtype=torch.float64))
    for lane, row in enumerate(grads):
        parameters = [torch.nn.Parameter(part.clone()) for part in row.split(300)]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        torch.nn.utils.clip_grad_norm_(parameters, bound)
        clipped = torch.cat([parameter.grad for parameter in parameters])
        assert torch.allclose(row * scale[lane], clipped, rtol=1e-13, atol=0)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.swamp_fast.clip_scale, tuple(arguments(3, 40, 17, torch.float32, torch.device("cpu")))
    )


BAD = {
    0: (lambda t: torch.randn(24, 4).T, r"rows of `grads` must be contiguous, .* Pass grads.contiguous\(\)"),
    1: (lambda t: torch.ones(1, 25, dtype=torch.bool), "Q = 25 weights, more than the P = 24"),
    2: (lambda t: t + 2, r"`run_of_lane` must lie in \[0, R\) = \[0, 2\), got 2 … 3"),
    3: (lambda t: t[:2], r"`clip_norm` must have shape \[L\] = \[4\], got \[2\]. Rates are per lane"),
}


@pytest.mark.parametrize("place", list(BAD))
def test_refuses(place):
    given = arguments(4, 24, 8, torch.float32, torch.device("cpu"))
    change, text = BAD[place]
    given[place] = change(given[place])
    with pytest.raises((ValueError, TypeError), match=text):
        ops.clip_scale(*given)
