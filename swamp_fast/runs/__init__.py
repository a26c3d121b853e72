"""The record of a run: its folder, checkpoints, console output and result.

A checkpoint inside a training holds the tensors that a step changes, the modules' buffers, the summed loss and the
number of steps. It needs no generator state, because random numbers depend only on the lanes' keys. Pruned weights are
left out, so that the file is the same for every engine. `python -m benchmarks.durability kills` checks that a killed
run continues to the same bits; `python -m benchmarks.durability cost` measures what checkpoints cost.

The setting `on_divergence` is not part of a run's identity. Both of its values compute the same until a particle
diverges, so a run that stopped at a divergence can be continued without the particle.
"""
