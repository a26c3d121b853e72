"""How far an op's result may be from its float64 reference.

The error may be at most twice the error of the reference computed in the op's own type, plus a fixed floor for the
rounding of the result. No environment or platform loosens this.
"""

import torch
from torch import Tensor

FLOOR = {torch.float32: 2**-22, torch.float64: 2**-50}  # relative to the largest result: two units in the last place


def assert_as_good_as(found: Tensor, same_type: Tensor, exact: Tensor) -> None:
    """Assert that the error of `found` is at most twice the error of the reference `same_type`, plus FLOOR.

    exact  the reference in float64, from which both errors are measured
    """
    assert found.shape == exact.shape
    assert found.dtype == same_type.dtype
    if not exact.numel():
        return
    error = (found.double() - exact).abs().max()
    allowed = 2 * (same_type.double() - exact).abs().max() + FLOOR[found.dtype] * exact.abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
