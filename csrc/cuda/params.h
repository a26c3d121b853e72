// The parameters of the kernels, one struct for each kernel. The launcher passes the struct by value, so a kernel reads
// its fields from constant memory. swamp_fast/engines/fused/cuda/params.py mirrors the structs field by field, and
// tests/engines/fused/test_cuda_params.py checks that both layouts agree.
//
// L is the number of lanes, B the number of samples per lane. "[L, ...]" has one row per lane, of which the kernel uses
// a part. The pointer points to that part of the first row, and the stride is the distance in elements to the next row.
#pragma once

struct bfloat16;

struct ConvolveParams {
  const bfloat16* source;   // [L, B, HEIGHT, WIDTH, IN]
  const bfloat16* weights;  // [L, ...] this layer's [9, IN, OUT]; dense.py has a second copy for the input gradient
  bfloat16* out;            // [L, B, HEIGHT, WIDTH, OUT]
  const float* scale;       // [L, ...] for the IN channels of the norm before this layer, if PROLOGUE
  const float* offset;      // [L, ...] for the same channels, if PROLOGUE
  const float* bias;        // [L, ...] the OUT biases of this layer, if HAS_BIAS
  long long weights_stride;
  long long prologue_stride;  // of scale and offset
  long long bias_stride;

  // The fields from here to arrivals_stride are for the norm after this layer. They are used if STATISTICS.
  float* scratch;            // [2, L, blocks, OUT] each block's means, and its sums of squared differences from them
  float* mean;               // [L, ...] for the OUT channels of the norm
  float* variance;           // [L, ...] biased
  float* out_scale;          // [L, ...] the norm is out * out_scale + out_offset
  float* out_offset;         // [L, ...]
  const float* norm_weight;  // [L, ...], or null
  const float* norm_bias;    // [L, ...], or null
  unsigned* arrivals;        // [L, ...] one counter per block of channels; zero before and after the launch
  long long statistics_stride;    // of mean, variance, out_scale and out_offset
  long long norm_weights_stride;  // of norm_weight and norm_bias
  long long arrivals_stride;
  double eps;

  int samples;      // B
  int tiles;        // tiles of one lane
  int block_tiles;  // tiles that a block computes, one after another
};

struct WeightGradParams {
  const bfloat16* source;    // [L, B, HEIGHT, WIDTH, IN]
  const bfloat16* out_grad;  // [L, B, HEIGHT, WIDTH, OUT]
  const float* scale;        // [L, ...] for the IN channels of the norm before this layer, if PROLOGUE
  const float* offset;       // [L, ...] for the same channels, if PROLOGUE
  float* partial;            // [L, ...] this layer's [parts, 9, IN, OUT]
  long long prologue_stride;  // of scale and offset
  long long partial_stride;
  int samples;  // B
  int tiles;    // tiles of one lane
};
