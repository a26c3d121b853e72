"""The fused engine on CPU: one lane after another through the C++ kernels of csrc/cpu/fused.

BatchNorm's statistics are not taken while the convolution stores its output. A task handles one channel of all blocks,
which fits the second-level cache, so its second and third passes read no memory, and the two-pass variance is the
exact one. Two designs with less traffic on paper were built and dropped: statistics with the store, and a norm that
its reader computes (134d84a and 2efdfe6, reverted by a551df1: no faster in float32); and a gradient between a norm and
its convolution that never reaches memory (slower, since a norm's sums come before its gradients, which are then read
twice).

How many output channels share their loads is measured for each convolution and cycle. It changes no bit: products with
a zero are added in the same order.
"""
