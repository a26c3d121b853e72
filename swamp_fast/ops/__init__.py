"""The ops. Each has a contract that checks its arguments, a C++ kernel, a Triton kernel, and a PyTorch reference.

`swamp_fast/__init__.py` explains the letters in shapes. `swamp_fast.ops.reference` has a function of the same name for
each op, in plain PyTorch, which defines what the op computes.

On CUDA, every op has only a Triton kernel. The weight updates and the global threshold are limited by memory bandwidth
and compile without register spills, so a CUDA C++ version would not be faster.

clip_scale sums in float64, in an order that depends on no other lane, so neither do a lane's bits. gather_augment takes
the number that determines a picture's random words separately from the picture's index in memory. So streamed batches
have the same crops as stored ones.
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
