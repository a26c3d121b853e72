// A 3x3 convolution with stride 1 and padding 1, for all lanes, on the tensor cores:
//
//   out[p, o] = bias[o] + sum over taps t and inputs i of x[p + t, i] * weights[t, i, o]
//   x = relu(source * scale + offset), or the source itself without a prologue
//
// It also computes the statistics of `out` after rounding. Each block stores the statistics of its own tiles, and the
// last block to arrive merges them. The input gradient is the same sum with the taps in reverse order.
//
// Macros:
//   HEIGHT, WIDTH       size of a picture, powers of two
//   IN, OUT             numbers of input and output channels
//   BLOCK_OUT           output channels that a block computes
//   CHUNK               input channels that are in shared memory at a time
//   BY_INPUT            whether to compute the input gradient
//   PROLOGUE, HAS_BIAS  whether there is a prologue or a bias
//   ACCUMULATE          whether the result is added to `out`
//   STATISTICS          whether the statistics of `out` are computed
//   MIN_BLOCKS          number of blocks that an SM should hold at once
// Grid: (blocks of block_tiles tiles, OUT / BLOCK_OUT, lanes).
#include "params.h"
#include "tile.h"

namespace {

constexpr int kInPitch = CHUNK + kPad, kOutPitch = BLOCK_OUT + kPad;
// The sizes of the halo and of the weights in shared memory, in numbers.
constexpr int kHalo = kHaloPixels * kInPitch, kWeights = kTaps * CHUNK * kOutPitch;
// A warp accumulates a tile of (kFragments * 16) pixels by (kColumns * 8) channels.
constexpr int kFragments = 2, kColumns = BLOCK_OUT / 8;
// If there is one chunk, its weights stay in shared memory. Otherwise the rounded output overwrites them after each
// tile.
constexpr bool kOneChunk = CHUNK == IN;
constexpr int kRounded = kPixels * kOutPitch;
constexpr int kNumbers = kOneChunk ? kWeights + kRounded : kWeights > kRounded ? kWeights : kRounded;

// Loads the weights [9, CHUNK, BLOCK_OUT] of one chunk.
__device__ void load_weights(bfloat16* to, const bfloat16* weights, int first_in, int first_out) {
  constexpr int vectors = BLOCK_OUT / 8;
#pragma unroll
  for (int begin = 0; begin < kTaps * CHUNK * vectors; begin += kThreads) {
    const int i = begin + threadIdx.x;
    if (kTaps * CHUNK * vectors % kThreads && i >= kTaps * CHUNK * vectors) break;
    const int row = i / vectors, tap = row / CHUNK, channel = first_in + row % CHUNK;
    const int from = BY_INPUT ? kTaps - 1 - tap : tap;
    *reinterpret_cast<uint4*>(to + row * kOutPitch + i % vectors * 8) =
        read_only(weights + (from * IN + channel) * OUT + first_out + i % vectors * 8);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, MIN_BLOCKS) convolve(const __grid_constant__ ConvolveParams params) {
  extern __shared__ __align__(16) bfloat16 memory[];
  bfloat16* const halo = memory;
  bfloat16* const tile_weights = halo + kHalo;  // [9 * CHUNK, kOutPitch]
  bfloat16* const rounded = kOneChunk ? tile_weights + kWeights : tile_weights;  // [256, kOutPitch]
  float* const shift = reinterpret_cast<float*>(tile_weights + kNumbers);       // [BLOCK_OUT]
  float* const moments = shift + BLOCK_OUT;                                    // [2, warps, BLOCK_OUT]
  const int lane = blockIdx.z, first_out = blockIdx.y * BLOCK_OUT;
  const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const long long lane_pixels = static_cast<long long>(params.samples) * HEIGHT * WIDTH;
  const bfloat16* const source = params.source + lane * lane_pixels * IN;
  bfloat16* const out = params.out + lane * lane_pixels * OUT + first_out;
  const bfloat16* const weights = params.weights + lane * params.weights_stride;
  const float* const scale = params.scale + lane * params.prologue_stride;
  const float* const offset = params.offset + lane * params.prologue_stride;
  float* const means = params.scratch + static_cast<long long>(lane) * gridDim.x * OUT + first_out;
  float* const squares = means + static_cast<long long>(gridDim.z) * gridDim.x * OUT;

  // For each fragment, the halo pixel whose address this thread passes to load_matrices.
  int place[kFragments];
  for (int f = 0; f < kFragments; ++f) place[f] = halo_place((warp * kFragments + f) * 16 + thread % 16);
  // For the statistics: the sums of (value - shift) and of its square over this thread's pixels. The shift is one of
  // the block's n values, so the variance is at least (mean - shift)^2 / n, which bounds the cancellation at the end.
  float total[kColumns][2] = {}, square[kColumns][2] = {};
  clear_halo<CHUNK>(halo);
  Prologue prologue = prologue_of<CHUNK, PROLOGUE>(0, scale, offset);
  if (kOneChunk) load_weights(tile_weights, weights, 0, first_out);

  const int block_tiles = params.block_tiles, samples = params.samples;
  const int begin = blockIdx.x * block_tiles, end = min(begin + block_tiles, params.tiles);
  for (int number = begin; number < end; ++number) {
    const Tile tile = tile_of(number);
    float sums[kFragments][kColumns][4] = {};

    // Sum the products, for each chunk of the input channels and each tap.
    for (int first_in = 0; first_in < IN; first_in += CHUNK) {
      __syncthreads();
      if (!kOneChunk) {
        prologue = prologue_of<CHUNK, PROLOGUE>(first_in, scale, offset);
        load_weights(tile_weights, weights, first_in, first_out);
      }
      load_halo<CHUNK, PROLOGUE>(halo, source, tile, samples, IN, first_in, prologue);
      __syncthreads();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int k = 0; k < CHUNK; k += 16) {
          unsigned a[kFragments][4];
#pragma unroll
          for (int f = 0; f < kFragments; ++f)
            load_matrices(a[f], halo + (place[f] + tap / 3 * kHaloWidth + tap % 3) * kInPitch + k + thread / 16 * 8);
#pragma unroll
          for (int n = 0; n < kColumns; n += 2) {
            unsigned b[4];
            load_matrices_transposed(
                b, tile_weights + (tap * CHUNK + k + thread % 16) * kOutPitch + n * 8 + thread / 16 * 8);
#pragma unroll
            for (int f = 0; f < kFragments; ++f) {
              multiply_add(sums[f][n], a[f], b[0], b[1]);
              multiply_add(sums[f][n + 1], a[f], b[2], b[3]);
            }
          }
        }
    }

    // Add the bias and round the sums into shared memory.
    const int left = (samples - tile.picture) * (kRows * WIDTH);  // below 256, it is how many pixels are in the batch
    if (!kOneChunk) __syncthreads();
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int column = n * 8 + thread % 4 * 2;
      float add[2] = {0, 0};
      if constexpr (HAS_BIAS)
        for (int i = 0; i < 2; ++i) add[i] = params.bias[lane * params.bias_stride + first_out + column + i];
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = (warp * kFragments + f) * 16 + half * 8 + thread / 4;
          *reinterpret_cast<unsigned*>(rounded + pixel * kOutPitch + column) =
              pack(sums[f][n][2 * half] + add[0], sums[f][n][2 * half + 1] + add[1]);
        }
    }
    __syncthreads();

    // Sum the statistics of the rounded numbers.
    if (STATISTICS && number == begin) {
      if (threadIdx.x < BLOCK_OUT) shift[threadIdx.x] = low(reinterpret_cast<unsigned short*>(rounded)[threadIdx.x]);
      __syncthreads();
    }
    if constexpr (STATISTICS)
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = n * 8 + thread % 4 * 2;
        const float from[2] = {shift[column], shift[column + 1]};
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int pixel = (warp * kFragments + f) * 16 + half * 8 + thread / 4;
            const unsigned pair = *reinterpret_cast<const unsigned*>(rounded + pixel * kOutPitch + column);
            if (kPictures == 1 || pixel < left) {
              const float away[2] = {low(pair) - from[0], high(pair) - from[1]};
              for (int i = 0; i < 2; ++i) total[n][i] += away[i], square[n][i] = fmaf(away[i], away[i], square[n][i]);
            }
          }
      }

    // Store the rounded numbers in vectors of eight.
    constexpr int vectors = BLOCK_OUT / 8;
    static_assert(kPixels == kThreads);
    const long long first_pixel = (static_cast<long long>(tile.picture) * HEIGHT + tile.row) * WIDTH;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int vector = i * kThreads + threadIdx.x, pixel = vector / vectors, channel = vector % vectors * 8;
      if (kPictures > 1 && pixel >= left) continue;
      uint4 v = *reinterpret_cast<const uint4*>(rounded + pixel * kOutPitch + channel);
      uint4* const to = reinterpret_cast<uint4*>(out + (first_pixel + pixel) * OUT + channel);
      if constexpr (ACCUMULATE) {
        const uint4 before = *to;
        v = {pack(low(v.x) + low(before.x), high(v.x) + high(before.x)),
             pack(low(v.y) + low(before.y), high(v.y) + high(before.y)),
             pack(low(v.z) + low(before.z), high(v.z) + high(before.z)),
             pack(low(v.w) + low(before.w), high(v.w) + high(before.w))};
      }
      *to = v;
    }
  }

  if constexpr (STATISTICS) {
    // Merge the block's statistics, first over the threads of each warp and then over the warps.
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int step = 4; step < 32; step *= 2) {
          total[n][i] += __shfl_xor_sync(0xffffffffu, total[n][i], step);
          square[n][i] += __shfl_xor_sync(0xffffffffu, square[n][i], step);
        }
        if (thread / 4 == 0) {
          moments[warp * BLOCK_OUT + n * 8 + thread % 4 * 2 + i] = total[n][i];
          moments[(kWarps + warp) * BLOCK_OUT + n * 8 + thread % 4 * 2 + i] = square[n][i];
        }
      }
    __syncthreads();
    if (threadIdx.x < BLOCK_OUT) {
      const long long left = lane_pixels - static_cast<long long>(begin) * kPixels;
      const float count = left < block_tiles * kPixels ? left : block_tiles * kPixels;
      float away = 0, squared = 0;
      for (int w = 0; w < kWarps; ++w) {
        away += moments[w * BLOCK_OUT + threadIdx.x];
        squared += moments[(kWarps + w) * BLOCK_OUT + threadIdx.x];
      }
      means[blockIdx.x * OUT + threadIdx.x] = shift[threadIdx.x] + away / count;
      squares[blockIdx.x * OUT + threadIdx.x] = max(squared - away * away / count, 0.0f);
    }
    unsigned* const arrivals = params.arrivals + lane * params.arrivals_stride + blockIdx.y;
    if (!arrived_last(arrivals, gridDim.x, reinterpret_cast<unsigned*>(shift))) return;

    // The last block merges the statistics of all blocks in double precision. A first pass computes the mean, a second
    // pass the variance about the mean. Several threads share a channel. Each of them sums over some of the blocks in
    // order, and then their sums are added in order.
    static_assert(!STATISTICS || kThreads % BLOCK_OUT == 0);
    constexpr int sharers = kThreads / BLOCK_OUT;  // threads that share a channel
    const int channel = threadIdx.x % BLOCK_OUT, sharer = threadIdx.x / BLOCK_OUT, blocks = gridDim.x;
    double* const sums = reinterpret_cast<double*>(memory);  // [sharers, BLOCK_OUT]
    double middle = 0, spread = 0;
    for (int pass = 0; pass < 2; ++pass) {
      double sum = 0;
      for (int block = sharer; block < blocks; block += sharers) {
        const long long begun = static_cast<long long>(block) * block_tiles * kPixels;
        const double count = min(lane_pixels - begun, static_cast<long long>(block_tiles) * kPixels);
        const double block_mean = of_another(means + block * OUT + channel), away = block_mean - middle;
        sum += pass == 0 ? block_mean * count : of_another(squares + block * OUT + channel) + away * away * count;
      }
      __syncthreads();
      sums[threadIdx.x] = sum;
      __syncthreads();
      double total = 0;
      for (int i = 0; i < sharers; ++i) total += sums[i * BLOCK_OUT + channel];
      (pass == 0 ? middle : spread) = total / lane_pixels;
    }
    if (sharer > 0) return;

    // Write the following norm as out * out_scale + out_offset.
    const float m = middle, v = spread;
    float by = 1 / sqrt(v + params.eps);
    const long long parameter = lane * params.norm_weights_stride + first_out + channel;
    if (params.norm_weight) by *= params.norm_weight[parameter];
    const long long at = lane * params.statistics_stride + first_out + channel;
    params.mean[at] = m;
    params.variance[at] = v;
    params.out_scale[at] = by;
    params.out_offset[at] = params.norm_bias ? params.norm_bias[parameter] - m * by : -m * by;
  }
}
