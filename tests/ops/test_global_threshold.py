"""global_threshold: implementations are compared with the reference, and obey the laws of pruning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swamp_fast import ops
from swamp_fast.ops import reference

DTYPES = [torch.float32, torch.float64]


def random_case(runs: int, prunable: int, dtype: torch.dtype, device: torch.device, ties: bool):
    weights = torch.randn(runs, prunable + 3, dtype=dtype)[:, :prunable]
    if ties:
        weights = weights.mul(2).round().div(2)
    masks = (torch.rand(runs, prunable + 9) < 0.6)[:, :prunable]
    kept = masks.sum(1)
    keep = (kept * torch.rand(runs)).long()
    return weights.to(device), masks.to(device), keep.to(device)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 17), (3, 1024), (2, 5000), (1, 40_001)], ids=str)
def test_against_reference(implementation, size, dtype, ties):
    weights, masks, keep = random_case(*size, dtype, implementation.device, ties)
    for count in (keep, torch.zeros_like(keep), masks.sum(1)):
        found = implementation("global_threshold", weights, masks, count)
        expected = reference.global_threshold(weights, masks, count)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_ties_don_t_depend_on_threads(threads):
    weights = torch.randn(1, 50_000).round()
    masks = torch.rand(1, 50_000) < 0.7
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ops.global_threshold(weights, masks, [20_000])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], reference.global_threshold(weights, masks, torch.tensor([20_000]))[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(implementation, dtype):
    """Zeros of both signs, subnormal and largest numbers, and infinities: their |w| compare as their bits do."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    values = [0.0, -0.0, tiny / 4, -tiny / 2, tiny, 1.0, -1.0, huge, -torch.inf, torch.inf, -huge, 2.0]
    weights = torch.tensor([values], dtype=dtype, device=implementation.device)
    masks = torch.ones_like(weights, dtype=torch.bool)
    for keep in range(len(values) + 1):
        count = torch.tensor([keep], device=implementation.device)
        found, expected = (
            implementation("global_threshold", weights, masks, count),
            reference.global_threshold(weights, masks, count),
        )
        assert torch.equal(found[0], expected[0]), keep
        assert torch.equal(found[1], expected[1]), keep


def test_runs_stand_alone(implementation):
    weights, masks, keep = random_case(4, 3000, torch.float32, implementation.device, True)
    together = implementation("global_threshold", weights, masks, keep)
    order = [2, 0, 3, 1]
    permuted = implementation("global_threshold", weights[order], masks[order], keep[order])
    alone = implementation("global_threshold", weights[2:3], masks[2:3], keep[2:3])
    for i in range(2):
        assert torch.equal(permuted[i], together[i][order])
        assert torch.equal(alone[i], together[i][2:3])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_laws_over_cycles(data):
    """In 20 cycles with ties, the kept count is exact, masks only shrink, and every pruned |w| <= every kept |w|."""
    prunable = data.draw(st.integers(1, 400))
    levels = data.draw(st.integers(1, 12))
    fraction = data.draw(st.floats(0.05, 0.95))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = torch.ones(1, prunable, dtype=torch.bool)
    for _ in range(20):
        weights = torch.randint(-levels, levels + 1, (1, prunable), generator=generator).float() / 3
        keep = round((1 - fraction) * int(mask.sum()))
        threshold, new = ops.global_threshold(weights, mask, [keep])
        assert int(new.sum()) == keep
        assert not bool((new & ~mask).any())
        dropped = mask & ~new
        if keep and bool(dropped.any()):
            assert weights[dropped].abs().max() <= weights[new].abs().min()
            assert weights[new].abs().min() == threshold[0]
            tied = weights.abs() == threshold[0]
            if bool((dropped & tied).any()):  # among ties, the lowest indices are kept
                assert (new & tied).nonzero()[:, 1].max() < (dropped & tied).nonzero()[:, 1].min()
        mask = new


def test_a_pruned_nan_is_no_matter_and_a_kept_one_raises(implementation):
    weights = torch.randn(2, 300, device=implementation.device)
    masks = torch.ones(2, 300, dtype=torch.bool, device=implementation.device)
    masks[1, 7] = False
    weights[1, 7] = torch.nan
    keep = torch.tensor([100, 100], device=implementation.device)
    assert implementation("global_threshold", weights, masks, keep)[1].sum(1).tolist() == [100, 100]
    if implementation.name == "triton":
        from swamp_fast.kernels.global_threshold import global_threshold

        weights[0, 3] = torch.nan
        assert global_threshold(weights, masks, keep)[2][0, 0] > 0
        return
    weights[0, 3] = torch.nan
    with pytest.raises(ValueError, match="run 0 has NaN among the weights its mask keeps"):
        ops.global_threshold(weights, masks, keep)


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ([5], "run 0 is to keep 5 weights, but its mask keeps only 4"),
        ([-1], "`keep` must be at least 0, got"),
        ([1, 2], r"`keep` must have shape \[R\] = \[1\], got \[2\]. One count per run"),
    ],
)
def test_refuses(keep, text):
    with pytest.raises(ValueError, match=text):
        ops.global_threshold(torch.randn(1, 6), torch.tensor([[True] * 4 + [False] * 2]), keep)


def test_refuses_other_types():
    with pytest.raises(TypeError, match="`masks` must be bool, got uint8"):
        ops.global_threshold(torch.randn(1, 6), torch.ones(1, 6, dtype=torch.uint8), [1])
    with pytest.raises(ValueError, match=r"`masks` must have shape \[R, Q\] = \[1, 6\], got \[1, 5\]"):
        ops.global_threshold(torch.randn(1, 6), torch.ones(1, 5, dtype=torch.bool), [1])


def test_opcheck():
    arguments = torch.randn(2, 50), torch.rand(2, 50) < 0.7, torch.tensor([3, 9])
    torch.library.opcheck(torch.ops.swamp_fast.global_threshold, arguments)


def test_memory_besides_the_mask_is_under_a_megabyte():
    """The increase of the peak resident memory is measured in a new process."""
    import subprocess
    import sys

    code = """
import resource, torch
from swamp_fast import ops
weights, mask = torch.randn(1, 20_000_000), torch.ones(1, 20_000_000, dtype=torch.bool)
ops.global_threshold(weights[:, :5000], mask[:, :5000], [10])
torch.empty(20_000_000, dtype=torch.bool).fill_(True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.global_threshold(weights, mask, [4_000_000])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) <= 1024  # KB more than the earlier peak, which included one mask
