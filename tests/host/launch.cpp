// A kernel of csrc/cuda with its constants, and a function that runs it over a grid: built by tests/test_cuda_kernels.py.
#include "matrix.h"

#if defined(WEIGHT_GRAD)
#include "../../csrc/cuda/weight_grad.cu"
extern "C" bool launch(int x, int y, int z, const bfloat16* source, const float* scale, const float* offset,
                       long long norm_stride, const bfloat16* out_grad, float* partial, long long partial_stride,
                       int part_size, int samples, int tiles) {
  return run({x, y, z}, [=] {
    weight_grad(source, scale, offset, norm_stride, out_grad, partial, partial_stride, part_size, samples, tiles);
  });
}
#else
#include "../../csrc/cuda/convolve.cu"
extern "C" bool launch(int x, int y, int z, const bfloat16* source, const bfloat16* weights, long long weights_stride,
                       const float* scale, const float* offset, long long norm_stride, const float* bias,
                       long long bias_stride, bfloat16* out, float* means, float* squares, int samples, int tiles,
                       int block_tiles) {
  return run({x, y, z}, [=] {
    convolve(source, weights, weights_stride, scale, offset, norm_stride, bias, bias_stride, out, means, squares, samples,
             tiles, block_tiles);
  });
}
#endif
