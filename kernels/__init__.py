"""The Triton kernels, one file per op, installed as swamp_fast.kernels.

The kernels import nothing from the package and do not check their arguments: swamp_fast.ops does. Each file holds the
kernels of one op. Below them is the launcher, which has the name and the arguments of the op.

Conventions:
- The docstring of a launched kernel gives its formula, the shapes of its arguments (letters as in
  swamp_fast/__init__.py), its grid, and the source of the formula. A name that ends in `_ptr` is a pointer. A name in
  capitals is a compile-time constant. Arguments that belong together are passed as one of the named tuples of
  argument_groups.py.
- Launchers choose block sizes from fixed tables. They never autotune, so importing them needs no driver.
- Every launcher sets enable_fp_fusion. It is True only where the kernel leaves no expression a * b + c * d to the
  compiler, which may fuse either product, depending on the number of elements per thread. A lane's bits would then
  depend on the other lanes.
- Kernels are not specialised on the numbers of lanes and samples, so runs of one network share the compiled kernels.
  They are specialised on channel counts and on the offsets of layers, because this lets Triton vectorise loads.
- Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest, and it multiplies bfloat16 wrongly.
  tests/conftest.py corrects the rounding. In the interpreter, the kernels convert bfloat16 to float32 before products.
- Float64 products serve only to check a plan against autograd. They are computed as plain sums, because Triton has
  supported float64 tensor cores only for a short time, and an inexact product would wrongly reject a plan in every
  precision.
"""
