// The fused engine's kernels on CPU: one lane's forward and backward pass, without autograd.
//
// Vectors run over samples: a map holds [blocks][channels][height + 2 pad][width + 2 pad][16 samples], and its border
// stays zero. A flat map, of features without pixels, is one block of height 1 whose pixels are the batch's blocks.
// The last 16 samples may reach beyond the batch. Those samples hold arbitrary numbers, which no sum takes in, and their
// gradients are zero. Nothing is checked here, because swamp_fast/engines/fused/ has done that.
#pragma once

#include <cstdint>

namespace swamp {

struct Map {
  void* data;
  int64_t blocks, channels, height, width, pad;
  int64_t samples;  // B
  bool flat;
};

// The kept weights of a convolution. Outputs come in groups of `rows`; a tap is a place of the input that at least one
// output of the group reads.
struct Taps {
  const int32_t* starts;   // [phases * groups + 1] where each group's taps begin
  const int32_t* offsets;  // [taps] in elements, from the output's pixel
  const void* values;      // [taps, rows] weights, zero where an output doesn't read the tap
  int64_t groups, rows;    // rows is 1, 2 or 4
};

// out(y * out_step + phase) = sum over taps of value * in(y * in_step + offset): a convolution with in_step = stride,
// or its gradient by the input, with out_step = stride and one phase for each of the stride^2 positions of a pixel.
struct Convolve {
  Map in, out;
  Taps taps;
  const void* bias;  // [outputs], or null
  int64_t in_step, out_step;
  bool accumulate;  // add to out
};

// grads[index] = sum over samples and pixels of out_grad * in, for every tap.
struct WeightGrad {
  Map in, out_grad;
  Taps taps;
  const int64_t* chunks;  // [chunk_count + 1] where the groups of each task begin
  int64_t chunk_count;
  int64_t parts;          // blocks of samples are summed in this many parts, then the parts in order
  int64_t in_step;
  const int32_t* index;   // [taps, rows] the weight's place in grads, -1 for none
  void* partial;          // [parts, taps, rows]
  void* scratch;          // [threads, scratch_size, 16]
  int64_t scratch_size;   // the largest taps * rows of a chunk
  void* grads;
  void* bias_grad;        // [outputs], or null
};

// out = relu((in - mean) * rstd * weight + bias + residual) by channel; relu and residual are optional.
struct Norm {
  Map in, out, residual;  // residual.data is null without one
  const void* weight;     // [C]
  const void* bias;       // [C]
  void* mean;             // [C] written if `batch`, else read
  void* variance;         // [C] biased, likewise
  double eps;
  bool batch, relu;
};

struct NormGrad {
  Norm norm;
  Map in_grad, out_grad, residual_grad;
  void* weight_grad;  // [C], or null
  void* bias_grad;    // [C], or null
  bool accumulate, accumulate_residual;
};

// An activation; `kind` is a PointwiseKind.
struct Pointwise {
  Map in, out, in_grad, out_grad;  // gradients in the backward pass only
  int64_t kind;
  double parameter;
  bool accumulate;
};

enum PointwiseKind : int64_t { kRelu, kLeakyRelu, kElu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kSoftplus, kHardswish, kMish };

// Copies channels of one map to channels of another, or adds them: sums of branches, concatenations, and their gradients.
struct Channels {
  Map from, to;
  int64_t from_channel, to_channel, count;
  bool accumulate;
};

// out = in * factor: dropout, forward and backward.
struct Multiply {
  Map in, factor, out;
  bool accumulate;
};

struct Pool {
  Map in, out, in_grad, out_grad;
  const int64_t* rows;      // [out.height, 2] begin and end in the input
  const int64_t* columns;   // [out.width, 2]
  const double* divisors;   // [out.height, out.width] of an average; null for the maximum
  bool accumulate;
};

// A spatial map and the flat map of its features, in the order channel, row, column; `back` copies flat to spatial.
struct Flatten {
  Map spatial, flat;
  bool back, accumulate;
};

// A tensor [B, C, H, W], or [B, features], with its strides, and the map that it is copied to or from.
struct Pack {
  void* tensor;
  int64_t sample_stride, channel_stride, row_stride, column_stride;
  Map map;
};

struct FusedKernels {
  void (*gather)(const void* weights, const int32_t* index, void* values, int64_t count, int threads);
  void (*convolve)(const Convolve&, int threads);
  void (*weight_grad)(const WeightGrad&, int threads);
  void (*norm)(const Norm&, int threads);
  void (*norm_grad)(const NormGrad&, int threads);
  void (*pointwise)(const Pointwise&, int threads);
  void (*pointwise_grad)(const Pointwise&, int threads);
  void (*channels)(const Channels&, int threads);
  void (*multiply)(const Multiply&, int threads);
  void (*pool)(const Pool&, int threads);
  void (*pool_grad)(const Pool&, int threads);
  void (*flatten)(const Flatten&, int threads);
  void (*pack)(const Pack&, int threads);
  void (*unpack)(const Pack&, int threads);
};

struct FusedTables {
  FusedKernels float32, bfloat16, float64;
};

const FusedTables& fused_generic();
const FusedTables& fused_avx2();
const FusedTables& fused_avx512();

}  // namespace swamp
