"""The Triton kernels, one file an op, installed as swamp_fast.kernels.

They import nothing of the package and check nothing: swamp_fast.ops does. Each file holds the kernel and its
launcher, which has the name and the arguments of the op. Launchers choose from fixed sizes, never by autotuning,
so importing them needs no driver, and name enable_fp_fusion, whose default differs between Triton versions.
"""
