// The parameters of the kernels, one struct for each kernel. The launcher passes it by value, so a kernel reads its
// fields from constant memory. swamp_fast/engines/fused/cuda/params.py mirrors the structs field by field, and
// tests/engines/fused/test_cuda_params.py checks both layouts.
//
// Letters: L lanes, B samples of one lane. "[L, ...]" is a row for each lane, of which the kernel reads a part: the
// pointer stands at that part of the first row, and the stride, in elements, leads to the next lane's.
#pragma once

struct bfloat16;

struct ConvolveParams {
  const bfloat16* source;   // [L, B, HEIGHT, WIDTH, IN]
  const bfloat16* weights;  // [L, ...] this layer's [9, IN, OUT]; for the gradient by the input too (see dense.py)
  bfloat16* out;            // [L, B, HEIGHT, WIDTH, OUT]
  const float* scale;       // [L, ...] the IN channels of the norm before, if PROLOGUE
  const float* offset;      // [L, ...] likewise
  const float* bias;        // [L, ...] the OUT biases of this layer, if HAS_BIAS
  long long weights_stride;
  long long prologue_stride;  // of scale and offset
  long long bias_stride;

  // The norm behind, if STATISTICS: the fields from here to arrivals_stride.
  float* scratch;            // [2, L, blocks, OUT] each block's means, and its sums of squared differences from them
  float* mean;               // [L, ...] the OUT channels of that norm, as the next three
  float* variance;           // biased
  float* out_scale;          // the norm is out * out_scale + out_offset
  float* out_offset;
  const float* norm_weight;  // [L, ...], or null
  const float* norm_bias;    // [L, ...], or null
  unsigned* arrivals;        // [L, ...] one counter for each block of channels, zero before and after
  long long statistics_stride;    // of mean, variance, out_scale and out_offset
  long long norm_weights_stride;  // of norm_weight and norm_bias
  long long arrivals_stride;
  double eps;

  int samples;      // B
  int tiles;        // of one lane
  int block_tiles;  // tiles that a block computes one after another
};

struct WeightGradParams {
  const bfloat16* source;    // [L, B, HEIGHT, WIDTH, IN]
  const bfloat16* out_grad;  // [L, B, HEIGHT, WIDTH, OUT]
  const float* scale;        // [L, ...] the IN channels of the norm before, if PROLOGUE
  const float* offset;       // [L, ...] likewise
  float* partial;            // [L, ...] this layer's [parts, 9, IN, OUT]
  long long prologue_stride;  // of scale and offset
  long long partial_stride;
  int samples;  // B
  int tiles;    // of one lane
};
