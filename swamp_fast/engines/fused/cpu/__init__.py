"""The fused engine on CPU: runs one lane after another through the C++ kernels in csrc/cpu/fused.

BatchNorm's statistics are computed in passes of their own, not while the convolution stores its output. A task handles
one channel of all blocks. A channel fits the L2 cache, so only the first pass reads main memory, and a second pass can
compute the variance about the exact mean. Three designs with less memory traffic in theory were built and dropped:
- statistics computed while the convolution stores, and norms computed by the operation that reads them. Neither was
  faster in float32 (commits 134d84a and 2efdfe6, reverted by a551df1);
- a gradient between a norm and its convolution that is never written to memory. It was slower: a norm needs sums over
  the whole gradient first, so the gradient had to be read twice.

For each convolution and cycle, timing decides how many output channels share their loads. The choice changes no bit of
the results, because it only adds products with zero and keeps the order of the other products.
"""
