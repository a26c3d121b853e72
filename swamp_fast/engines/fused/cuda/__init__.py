"""The fused engine on CUDA: each operation of a Plan is one launch over all lanes.

Sums over many blocks are merged by the last block to arrive, in the order of the blocks: the order of arrival decides
who merges, not the result. Groups of lanes that fit the second-level cache run as branches of the graph only where a
stopwatch prefers it; that is recorded, and changes no bit.

Channels that lead nowhere are left out of the plan if that saves 15 % of the products, since every number of channels
is compiled for. Their running statistics are not updated, which is the one difference from the naive loop's results.

A convolution of csrc/cuda asks for as many blocks per SM as NVRTC spills no register for; nvrtc.py takes fewer where
another version would spill. Convolutions without statistics, on which bits would depend, take as many tiles as fill
the device's SMs in whole waves.

On AMD GPUs every wave would have to fence its stores before a block arrives. Nobody has tried, so the engine refuses.
"""
