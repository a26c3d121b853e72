"""The ops. Each has a contract that checks its arguments, a C++ kernel, a Triton kernel, and a reference in PyTorch.

The letters of the shapes are explained in `swamp_fast/__init__.py`. `swamp_fast.ops.reference` has the same names in
plain PyTorch and defines what each op computes.
"""

from swamp_fast.ops.clip_scale import clip_scale
from swamp_fast.ops.gather_augment import gather_augment
from swamp_fast.ops.global_threshold import global_threshold
from swamp_fast.ops.masked_adamw import masked_adamw_
from swamp_fast.ops.masked_sgd import masked_sgd_
from swamp_fast.ops.particle_mean import particle_mean
from swamp_fast.ops.philox import philox

__all__ = [
    "clip_scale",
    "gather_augment",
    "global_threshold",
    "masked_adamw_",
    "masked_sgd_",
    "particle_mean",
    "philox",
]
