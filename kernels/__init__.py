"""The Triton kernels, one file an op, installed as swamp_fast.kernels.

They import nothing of the package and check nothing: swamp_fast.ops does. Each file holds the kernel and its
launcher, which has the name and the arguments of the op. Launchers choose from fixed sizes, never by autotuning,
so importing them needs no driver, and name enable_fp_fusion: on only where no a * b + c * d is left to the compiler. It
may fuse either product, by how many elements a thread has, and a lane's bits would depend on how many stand beside it.
"""
