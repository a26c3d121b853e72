// A kernel of csrc/cuda with its constants, and a function that runs it over a grid: built by tests/test_cuda_kernels.py.
#include "matrix.h"

#if defined(WEIGHT_GRAD)
#include "../../../csrc/cuda/weight_grad.cu"
extern "C" bool launch(int x, int y, int z, const bfloat16* source, const float* scale, const float* offset,
                       long long norm_stride, const bfloat16* out_grad, float* partial, long long partial_stride,
                       int part_size, int samples, int tiles) {
  return run({x, y, z}, [=] {
    weight_grad(source, scale, offset, norm_stride, out_grad, partial, partial_stride, part_size, samples, tiles);
  });
}
#else
#include "../../../csrc/cuda/convolve.cu"
extern "C" bool launch(int x, int y, int z, const bfloat16* source, const bfloat16* weights, long long weights_stride,
                       const float* scale, const float* offset, long long norm_stride, const float* bias,
                       long long bias_stride, bfloat16* out, int samples, int tiles, int block_tiles, float* scratch,
                       float* mean, float* variance, float* scale_of_out, float* offset_of_out,
                       long long statistics_stride, const float* norm_weight, const float* norm_bias,
                       long long norm_weights_stride, double eps, unsigned* arrivals, long long arrivals_stride) {
  return run({x, y, z}, [=] {
    convolve(source, weights, weights_stride, scale, offset, norm_stride, bias, bias_stride, out, samples, tiles,
             block_tiles, scratch, mean, variance, scale_of_out, offset_of_out, statistics_stride, norm_weight, norm_bias,
             norm_weights_stride, eps, arrivals, arrivals_stride);
  });
}
#endif
