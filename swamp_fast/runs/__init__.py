"""A run's record: its folder, checkpoints, console and result.

A checkpoint inside a training holds what a step changes, the modules' buffers, the loss so far and the number of
steps; everything random follows from the keys. Pruned weights are left out, so that the file is the same for every
engine. `python -m benchmarks.durability kills | cost` measures that a killed run continues to the same bits, and what
that costs.

`on_divergence` is no part of a run's identity: until a particle diverges both of its values compute the same, so a run
that stopped may continue without the particle.
"""
