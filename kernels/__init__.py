"""The Triton kernels, one file per op, installed as swamp_fast.kernels.

They import nothing of the package and check nothing: swamp_fast.ops does that. Each file holds the kernels of an op
and, below them, the launcher that has the name and the arguments of the op.

Conventions:
- A kernel's docstring gives its formula, its arguments with their shapes (letters as in swamp_fast/__init__.py), its
  grid, and where the formula comes from. `*_ptr` is a pointer; capitals are known at compile time; arguments that
  belong together come as one of the named tuples of argument_groups.py.
- Launchers choose from fixed sizes and never by autotuning, so importing them needs no driver.
- Launchers set enable_fp_fusion. It is on only where no a * b + c * d is left to the compiler: that may fuse either
  product, depending on how many elements a thread has, and then a lane's bits would depend on the lanes beside it.
- Sizes that vary among runs of one network are not compiled in: launches are not specialised on lanes and samples.
  Channels and the places of layers are, because loads become vectors by them.
- Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest, and multiplies it wrongly. The tests mend
  the first (tests/conftest.py); kernels upcast before products there.
- Products in float64, which only prove plans, are sums without tensor cores, which Triton supports only recently: a
  plan refused by mistake would cost every precision the fused engine.
"""
