"""particle_mean: implementations are compared with the reference."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_good_as

from swamp_fast import ops
from swamp_fast.ops import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 2500), (4, 1, 1025), (7, 3, 2048), (3, 3, 0)], ids=str)
def test_against_reference(implementation, size, dtype):
    lanes, runs, parameters = size
    weights = torch.randn(lanes, parameters + 5, dtype=dtype, device=implementation.device)[:, :parameters]
    run_of_lane = (torch.arange(lanes, device=implementation.device) * 5) % runs
    found = implementation("particle_mean", weights, run_of_lane, runs)
    same = reference.particle_mean(weights, run_of_lane, runs)
    exact = torch.stack([weights[run_of_lane == run].double().mean(0) for run in range(runs)])
    assert_as_good_as(found, same, exact)
    assert torch.equal(found, same)  # the op's contract fixes the order of the sum, so the bits are equal
    assert torch.equal(found, implementation("particle_mean", weights, run_of_lane, runs))


def test_one_particle_is_its_own_mean(implementation):
    weights = torch.randn(1, 999, device=implementation.device)
    run_of_lane = torch.zeros(1, dtype=torch.int64, device=implementation.device)
    assert torch.equal(implementation("particle_mean", weights, run_of_lane, 1), weights)


def test_a_lane_touches_no_other_run(implementation):
    weights = torch.randn(4, 100, device=implementation.device)
    run_of_lane = torch.tensor([0, 1, 0, 1], device=implementation.device)
    sound = implementation("particle_mean", weights, run_of_lane, 2)[0].clone()
    weights[1] = torch.nan
    assert torch.equal(implementation("particle_mean", weights, run_of_lane, 2)[0], sound)


def test_opcheck():
    torch.library.opcheck(torch.ops.swamp_fast.particle_mean, (torch.randn(3, 40), torch.tensor([0, 1, 0]), 2))


@pytest.mark.parametrize(
    ("weights", "run_of_lane", "runs", "text"),
    [
        (torch.randn(2, 5), torch.tensor([0, 2]), 2, r"`run_of_lane` must lie in \[0, R\) = \[0, 2\), got 0 … 2"),
        (torch.randn(2, 5), torch.tensor([0, 0]), 2, r"every run in \[0, 2\) must have a lane"),
        (torch.randn(2, 5), torch.tensor([0, 0]), 0, "`runs` must be at least 1, got 0"),
        (torch.randn(2, 5).half(), torch.tensor([0, 0]), 1, "`weights` must be float32 or float64, got float16"),
        (torch.randn(2, 5), torch.tensor([0]), 1, r"`run_of_lane` must have shape \[L\] = \[2\], got \[1\]"),
        ([[1.0]], torch.tensor([0]), 1, r"`weights` must be a tensor \[L, P\], got list"),
    ],
)
def test_refuses(weights, run_of_lane, runs, text):
    with pytest.raises((ValueError, TypeError), match=text):
        ops.particle_mean(weights, run_of_lane, runs)
