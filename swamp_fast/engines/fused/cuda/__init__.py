"""The fused engine on CUDA: runs each operation of a Plan in one launch over all lanes.

The last block to arrive merges the sums of all blocks, in the order of the blocks. So the order of arrival decides
which block merges, but doesn't change the result. Lanes run in groups that fit the L2 cache, as parallel branches of
the CUDA graph, only if timing finds that faster. The choice is recorded, and it changes no bit of the results.

Dead channels, from which no kept weight leads to the output, are left out of the plan if that saves at least 15 % of
the products. Smaller savings aren't worth it, because kernels are compiled for each number of channels. The running
statistics of dead channels are not updated. In this alone the results differ from those of the naive loop.

A convolution kernel of csrc/cuda requests the largest number of blocks per SM for which NVRTC spills no registers; if
another version of NVRTC spills, nvrtc.py reduces the number. The number of tiles per block is chosen so that the blocks
fill the device's SMs in whole waves. Convolutions that compute statistics are an exception: there the number of tiles
affects the bits of the result, so it doesn't depend on the device.

The engine refuses AMD GPUs. There, every wavefront would have to fence its stores before its block arrives, and that
has not been tried.
"""
