"""The ops: each one a contract that checks, C++ for CPU, Triton for CUDA, and a reference that says what it means.

The letters of the shapes are in `swamp_fast/__init__.py`; `swamp_fast.ops.reference` holds the same names in
plain PyTorch.
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
