// The fused engine's kernels on CPU, which run one lane's forward and backward pass without autograd.
//
// A vector holds the same pixel of 16 samples. A feature map has the layout
// [blocks][channels][height + 2 pad][width + 2 pad][16 samples], and its border of width `pad` stays zero. A flat map holds features without pixels. It has one block of
// height 1, and the batch's blocks of samples are its columns. If the batch size is not a multiple of 16, the last
// block has samples beyond the batch. They hold arbitrary numbers that no sum includes, and their gradients are zero.
// The kernels check nothing, because swamp_fast/engines/fused/ has checked all arguments.
#pragma once

#include <cstdint>

namespace swamp {

struct Map {
  void* data;
  int64_t blocks, channels, height, width, pad;
  int64_t samples;  // B
  bool flat;
};

// The kept weights of a convolution. Output channels are divided into groups of `rows`. A tap is a position of the
// input, relative to the output's pixel, that at least one output of the group reads.
struct Taps {
  const int32_t* starts;   // [phases * groups + 1] where each group's taps begin
  const int32_t* offsets;  // [taps] from the output's pixel to the tap, in elements
  const void* values;      // [taps, rows] weights; zero if the output doesn't read the tap
  int64_t groups, rows;    // rows is 1, 2 or 4
};

// out(y * out_step + phase) = sum over taps of value * in(y * in_step + offset). With in_step = stride, this is the
// forward pass. With out_step = stride, it is the input gradient, which has one phase for each of the stride^2
// positions of a pixel modulo the stride.
struct Convolve {
  Map in, out;
  Taps taps;
  const void* bias;  // [outputs], or null
  int64_t in_step, out_step;
  bool accumulate;  // add to `out` instead of overwriting it
};

// grads[index] = sum over samples and pixels of out_grad * in, for every tap.
struct WeightGrad {
  Map in, out_grad;
  Taps taps;
  const int64_t* chunks;  // [chunk_count + 1] where the groups of each task begin
  int64_t chunk_count;
  int64_t parts;          // the blocks of samples are summed in this many parts, and then the parts are added in order
  int64_t in_step;
  const int32_t* index;   // [taps, rows] the weight's index in grads; -1 if it is pruned
  void* partial;          // [parts, taps, rows]
  void* scratch;          // [threads, scratch_size, 16]
  int64_t scratch_size;   // the largest taps * rows of a chunk
  void* grads;
  void* bias_grad;        // [outputs], or null
};

// out = relu((in - mean) * rstd * weight + bias + residual), per channel; relu and residual are optional.
struct Norm {
  Map in, out, residual;  // residual.data is null if there is no residual
  const void* weight;     // [C]
  const void* bias;       // [C]
  void* mean;             // [C] written if `batch` is set, otherwise read
  void* variance;         // [C] biased; written or read like mean
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
  Map in, out, in_grad, out_grad;  // the gradients are used in the backward pass only
  int64_t kind;
  double parameter;
  bool accumulate;
};

enum PointwiseKind : int64_t { kRelu, kLeakyRelu, kElu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kSoftplus, kHardswish, kMish };

// Copies channels of one map to channels of another, or adds them there. This implements additions, concatenations and
// their gradients.
struct Channels {
  Map from, to;
  int64_t from_channel, to_channel, count;
  bool accumulate;
};

// out = in * factor; this is dropout, forward and backward.
struct Multiply {
  Map in, factor, out;
  bool accumulate;
};

struct Pool {
  Map in, out, in_grad, out_grad;
  const int64_t* rows;      // [out.height, 2] begin and end of each window's rows in the input
  const int64_t* columns;   // [out.width, 2] begin and end of its columns
  const double* divisors;   // [out.height, out.width] what each window's sum is divided by; null for max pooling
  bool accumulate;
};

// Copies a spatial map to a flat map, whose features are ordered by channel, row and column. `back` copies from flat to
// spatial instead.
struct Flatten {
  Map spatial, flat;
  bool back, accumulate;
};

// Copies between a PyTorch tensor [B, C, H, W] or [B, features], with the given strides in elements, and a map.
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
