// The weight gradient of a 3x3 convolution with stride 1 and padding 1, for all lanes, on the tensor cores:
//
//   partial[part, t, i, o] = sum over the pixels p in this part of x[p + t, i] * out_grad[p, o]
//   x = relu(source * scale + offset), or the source itself without a prologue
//
// A block sums over many tiles in registers. Each part sums a fixed range of tiles in order, so the bits of the result
// don't depend on the device.
//
// Macros:
//   HEIGHT, WIDTH        size of a picture, powers of two
//   IN, OUT              numbers of input and output channels
//   BLOCK_IN, BLOCK_OUT  channels that a block covers; (BLOCK_IN / 16) * (BLOCK_OUT / 16) is 1, 2, 4 or 8
//   PROLOGUE             whether there is a prologue
//   MIN_BLOCKS           number of blocks that an SM should hold at once
// Grid: (parts, (IN / BLOCK_IN) * (OUT / BLOCK_OUT), lanes).
#include "params.h"
#include "tile.h"

namespace {

constexpr int kInPitch = BLOCK_IN + kPad, kOutPitch = BLOCK_OUT + kPad;
constexpr int kHalo = kHaloPixels * kInPitch;  // size of the halo in shared memory, in numbers
constexpr int kQuadrants = (BLOCK_IN / 16) * (BLOCK_OUT / 16);  // 16 by 16 weights each; a warp sums one
constexpr int kSharers = kWarps / kQuadrants;  // warps that share a quadrant; each sums over different pixels

// Loads the gradient [256, BLOCK_OUT] of a tile; it is zero for pixels beyond the batch.
__device__ void load_gradient(bfloat16* to, const bfloat16* lane, Tile tile, int samples, int first) {
  constexpr int vectors = BLOCK_OUT / 8;
  const long long begin = (static_cast<long long>(tile.picture) * HEIGHT + tile.row) * WIDTH;
  const int left = (samples - tile.picture) * (kRows * WIDTH);
  static_assert(kPixels == kThreads);
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int vector = i * kThreads + threadIdx.x, pixel = vector / vectors, channel = vector % vectors * 8;
    uint4 v{0, 0, 0, 0};
    if (pixel < left) v = read_only(lane + (begin + pixel) * OUT + first + channel);
    *reinterpret_cast<uint4*>(to + pixel * kOutPitch + channel) = v;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, MIN_BLOCKS)
    weight_grad(const __grid_constant__ WeightGradParams params) {
  extern __shared__ __align__(16) bfloat16 memory[];
  bfloat16* const halo = memory;
  bfloat16* const gradient = memory + kHalo;
  const int lane = blockIdx.z, parts = gridDim.x;
  const int first_in = blockIdx.y / (OUT / BLOCK_OUT) * BLOCK_IN, first_out = blockIdx.y % (OUT / BLOCK_OUT) * BLOCK_OUT;
  const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const int quadrant = warp % kQuadrants, sharer = warp / kQuadrants;
  const int warp_in = quadrant / (BLOCK_OUT / 16) * 16, warp_out = quadrant % (BLOCK_OUT / 16) * 16;
  const long long lane_pixels = static_cast<long long>(params.samples) * HEIGHT * WIDTH;
  const bfloat16* const source = params.source + lane * lane_pixels * IN;
  const bfloat16* const out_grad = params.out_grad + lane * lane_pixels * OUT;
  const float* const scale = params.scale + lane * params.prologue_stride;
  const float* const offset = params.offset + lane * params.prologue_stride;

  clear_halo<BLOCK_IN>(halo);
  const Prologue prologue = prologue_of<BLOCK_IN, PROLOGUE>(first_in, scale, offset);

  // Sum the products over the tiles of this part.
  float sums[kTaps][2][4] = {};
  const int end = static_cast<int>(static_cast<long long>(blockIdx.x + 1) * params.tiles / parts);
  for (int number = static_cast<int>(static_cast<long long>(blockIdx.x) * params.tiles / parts); number < end; ++number) {
    const Tile tile = tile_of(number);
    __syncthreads();
    load_halo<BLOCK_IN, PROLOGUE>(halo, source, tile, params.samples, IN, first_in, prologue);
    load_gradient(gradient, out_grad, tile, params.samples, first_out);
    __syncthreads();
    for (int f = sharer; f < kPixels / 16; f += kSharers) {
      unsigned b[4];
      load_matrices_transposed(b, gradient + (f * 16 + thread % 16) * kOutPitch + warp_out + thread / 16 * 8);
      const int pixel = f * 16 + thread % 8 + thread / 16 * 8;
      const bfloat16* const from = halo + halo_place(pixel) * kInPitch + warp_in + thread / 8 % 2 * 8;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        unsigned a[4];
        load_matrices_transposed(a, from + (tap / 3 * kHaloWidth + tap % 3) * kInPitch);
        multiply_add(sums[tap][0], a, b[0], b[1]);
        multiply_add(sums[tap][1], a, b[2], b[3]);
      }
    }
  }

  // Add the sums of the warps that share a quadrant in a tree: each thread adds the sums of the thread with the same
  // index in another warp.
  float* const shared = reinterpret_cast<float*>(memory);  // [sharers / 2, quadrants, 9 * 8, 32]
#pragma unroll
  for (int half = kSharers / 2; half > 0; half /= 2) {
    float* const place = shared + (sharer % half * kQuadrants + quadrant) * kTaps * 8 * 32 + thread;
    __syncthreads();
    if (sharer >= half && sharer < 2 * half)
#pragma unroll
      for (int i = 0; i < kTaps * 8; ++i) place[i * 32] = sums[i / 8][i / 4 % 2][i % 4];
    __syncthreads();
    if (sharer < half)
#pragma unroll
      for (int i = 0; i < kTaps * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] += place[i * 32];
  }
  if (sharer > 0) return;

  // Store the quadrant's gradients.
  float* const to = params.partial + lane * params.partial_stride + static_cast<long long>(blockIdx.x) * kTaps * IN * OUT +
                    (first_in + warp_in + thread / 4) * OUT + first_out + warp_out + thread % 4 * 2;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(tap * IN + i / 2 * 8) * OUT + n * 8 + i % 2] = sums[tap][n][i];
}
