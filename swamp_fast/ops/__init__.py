"""The ops. Each has a contract that checks its arguments, a C++ kernel, a Triton kernel, and a reference in PyTorch.

The letters of the shapes are explained in `swamp_fast/__init__.py`. `swamp_fast.ops.reference` has the same names in
plain PyTorch and defines what each op computes.

On CUDA the updates and the global threshold are Triton's alone: they are bound by memory and compile without spills,
and a second version in CUDA C++ would have to be kept equal for nothing.

clip_scale sums in float64 in an order of its own, so a lane's bits depend on no other lane. gather_augment takes the
number that addresses a draw separately from the place in memory, so streamed batches have the same crops as stored
ones.
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
