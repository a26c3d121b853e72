"""How far an op may be from its float64 reference: twice the error of the same reference in the op's own type, plus
one floor per type for the rounding of the result itself. Nothing loosens this.
"""

import torch
from torch import Tensor

FLOOR = {torch.float32: 2**-22, torch.float64: 2**-50}  # relative to the largest result: two units in the last place


def assert_as_good_as(found: Tensor, same_type: Tensor, exact: Tensor) -> None:
    """`found` is at most twice as far from `exact` (float64) as the reference `same_type` is, plus the floor."""
    assert found.shape == exact.shape
    assert found.dtype == same_type.dtype
    if not exact.numel():
        return
    error = (found.double() - exact).abs().max()
    allowed = 2 * (same_type.double() - exact).abs().max() + FLOOR[found.dtype] * exact.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
