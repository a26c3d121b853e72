"""The CPU kernels (csrc/cpu/module.cpp). They trust their callers: the contracts in swamp_fast.ops check before.

A tensor is passed as the address of its first element, 0 for None, and, if its rows may be strided, the elements from
row to row. Letters as in swamp_fast/__init__.py: lanes L, runs R, parameters P, prunable Q, segments S.
"""

Address = int

def available() -> list[str]: ...
def active() -> str: ...
def use(name: str) -> None: ...
def philox(keys: Address, words: Address, lanes: int, count: int, purpose: int, threads: int, /) -> None: ...
def clip_scale_float32(
    grads: Address,
    grads_stride: int,
    masks: Address,
    masks_stride: int,
    run_of_lane: Address,
    clip_norm: Address,
    scale: Address,
    lanes: int,
    parameters: int,
    prunable: int,
    threads: int,
    /,
) -> None: ...
def masked_adamw_float32(
    weights: Address,
    weights_stride: int,
    grads: Address,
    grads_stride: int,
    exp_avg: Address,
    exp_avg_stride: int,
    exp_avg_sq: Address,
    exp_avg_sq_stride: int,
    swa: Address,
    swa_stride: int,
    masks: Address,
    masks_stride: int,
    run_of_lane: Address,
    segment_ends: Address,
    lr: Address,
    beta1: Address,
    beta2: Address,
    eps: Address,
    weight_decay: Address,
    step: Address,
    grad_scale: Address,
    swa_weight: Address,
    lanes: int,
    parameters: int,
    prunable: int,
    segments: int,
    threads: int,
    /,
) -> None: ...
def masked_sgd_float32(
    weights: Address,
    weights_stride: int,
    grads: Address,
    grads_stride: int,
    momentum_buffer: Address,
    momentum_stride: int,
    swa: Address,
    swa_stride: int,
    masks: Address,
    masks_stride: int,
    run_of_lane: Address,
    segment_ends: Address,
    lr: Address,
    momentum: Address,
    weight_decay: Address,
    grad_scale: Address,
    swa_weight: Address,
    lanes: int,
    parameters: int,
    prunable: int,
    segments: int,
    nesterov: bool,
    threads: int,
    /,
) -> None: ...
def particle_mean_float32(
    weights: Address,
    weights_stride: int,
    run_of_lane: Address,
    mean: Address,
    mean_stride: int,
    lanes: int,
    parameters: int,
    runs: int,
    threads: int,
    /,
) -> None: ...
def global_threshold_float32(
    weights: Address,
    weights_stride: int,
    masks: Address,
    masks_stride: int,
    keep: Address,
    thresholds: Address,
    new_masks: Address,
    new_masks_stride: int,
    verdict: Address,
    runs: int,
    prunable: int,
    threads: int,
    /,
) -> None: ...
def gather_augment_float32(
    images: Address,
    table: Address,
    index: Address,
    samples: Address,
    keys: Address,
    out: Address,
    lanes: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    pad: int,
    flip: bool,
    channels_last: bool,
    threads: int,
    /,
) -> None: ...

# The same for float64.
clip_scale_float64 = clip_scale_float32
masked_adamw_float64 = masked_adamw_float32
masked_sgd_float64 = masked_sgd_float32
particle_mean_float64 = particle_mean_float32
global_threshold_float64 = global_threshold_float32
gather_augment_float64 = gather_augment_float32
