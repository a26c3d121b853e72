// Builds one kernel of csrc/cuda for the CPU, with a function that runs it over a grid. It is compiled by
// tests/support/host_kernels.py.
#include "matrix.h"

#if defined(WEIGHT_GRAD)
#include "../../../csrc/cuda/weight_grad.cu"
extern "C" bool launch(int x, int y, int z, const WeightGradParams& params) {
  return run({x, y, z}, [=] { weight_grad(params); });
}
#else
#include "../../../csrc/cuda/convolve.cu"
extern "C" bool launch(int x, int y, int z, const ConvolveParams& params) {
  return run({x, y, z}, [=] { convolve(params); });
}
#endif
