"""The reference of each op: its definition in plain PyTorch, for any device and float type.

If a kernel and its reference disagree, the kernel is wrong.
"""

from swamp_fast.ops.reference.clip_scale import clip_scale
from swamp_fast.ops.reference.gather_augment import gather_augment
from swamp_fast.ops.reference.global_threshold import global_threshold
from swamp_fast.ops.reference.masked_adamw import masked_adamw_
from swamp_fast.ops.reference.masked_sgd import masked_sgd_
from swamp_fast.ops.reference.particle_mean import particle_mean
from swamp_fast.ops.reference.philox import philox

__all__ = [
    "clip_scale",
    "gather_augment",
    "global_threshold",
    "masked_adamw_",
    "masked_sgd_",
    "particle_mean",
    "philox",
]
