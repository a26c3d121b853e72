// Implements the functions of csrc/cuda/matrix.h, and the parts of CUDA that the kernels use, on a CPU. The threads of a
// block are fibers. They run one after another, each until it waits for the others. This is slow, but it reproduces
// exactly which thread waits for which.
#ifndef SWAMP_MATRIX
#define SWAMP_MATRIX

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

#define __global__
#define __grid_constant__
#define __device__
#define __launch_bounds__(...)
#define __shared__
#define __align__(...)

using std::max;
using std::min;

struct Extent { int x, y, z; };
struct uint4 { unsigned x, y, z, w; };
struct bfloat16 { uint16_t bits; };

static Extent threadIdx, blockIdx, gridDim;
alignas(16) bfloat16 memory[(232 << 10) / 2];

namespace host {

constexpr int kThreads = 256, kStack = 64 << 10;
static ucontext_t scheduler, fibers[kThreads];
static bool done[kThreads];
static int current;

// Waits until every thread of the block has called it. If some threads call it more often than others, `unequal` is set.
static int waits[kThreads];
static bool unequal;

inline void wait() {
  const int self = current;
  ++waits[self];
  swapcontext(&fibers[self], &scheduler);
  threadIdx.x = self;
}

static uint64_t exchanged[kThreads];

}  // namespace host

inline void __syncthreads() { host::wait(); }

inline float low(unsigned pair) {
  const unsigned bits = pair << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float high(unsigned pair) { return low(pair >> 16); }

inline unsigned rounded(float value) {  // to nearest, ties to even
  unsigned bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline unsigned pack_relu(float low, float high) { return pack(low < 0 ? 0 : low, high < 0 ? 0 : high); }

inline uint4 read_only(const bfloat16* from) { return *reinterpret_cast<const uint4*>(from); }

// On a GPU, only the threads of a warp wait for each other here. This version makes the whole block wait.
inline float __shfl_xor_sync(unsigned, float value, int step) {
  uint64_t bits = 0;
  memcpy(&bits, &value, 4);
  host::exchanged[threadIdx.x] = bits;
  host::wait();
  float other;
  memcpy(&other, &host::exchanged[threadIdx.x ^ step], 4);
  host::wait();
  return other;
}

inline void load(unsigned (&to)[4], const bfloat16* row, bool transposed) {
  host::exchanged[threadIdx.x] = reinterpret_cast<uint64_t>(row);
  if (reinterpret_cast<uint64_t>(row) % 16) __builtin_trap();  // a GPU traps at an unaligned address too
  host::wait();
  const int warp = threadIdx.x / 32 * 32, l = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    unsigned pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = transposed ? l % 4 * 2 + i : l / 4, c = transposed ? l / 4 : l % 4 * 2 + i;
      pair[i] = reinterpret_cast<const bfloat16*>(host::exchanged[warp + m * 8 + r])[c].bits;
    }
    to[m] = pair[0] | pair[1] << 16;
  }
  host::wait();
}
inline void load_matrices(unsigned (&to)[4], const bfloat16* row) { load(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], const bfloat16* row) { load(to, row, true); }

static unsigned operands[host::kThreads][6];

inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  unsigned* mine = operands[threadIdx.x];
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0, mine[5] = b1;
  host::wait();
  const int warp = threadIdx.x / 32 * 32, l = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned pa = operands[warp + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned pb = operands[warp + column * 4 + k % 8 / 2][4 + k / 8];
      sums[i] += (k % 2 ? high(pa) : low(pa)) * (k % 2 ? high(pb) : low(pb));
    }
  }
  host::wait();
}

inline float of_another(const float* from) { return *from; }

// No fence is needed, because the blocks run one after another.
inline bool arrived_last(unsigned* arrivals, unsigned blocks, unsigned* shared) {
  host::wait();
  if (threadIdx.x == 0) *shared = (*arrivals)++;
  host::wait();
  if (*shared != blocks - 1) return false;
  if (threadIdx.x == 0) *arrivals = 0;
  return true;
}

// Runs a kernel over a grid, one block after another. Returns whether, in each block, all threads waited equally often.
template <typename Kernel>
bool run(Extent grid, Kernel kernel) {
  using namespace host;
  static Kernel* body;
  static std::vector<char> stacks(size_t(kThreads) * kStack);
  body = &kernel;
  gridDim = grid;
  unequal = false;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        memset(memory, 0xff, sizeof memory);  // fills shared memory with NaN
        for (int t = 0; t < kThreads; ++t) {
          getcontext(&fibers[t]);
          fibers[t].uc_stack.ss_sp = &stacks[size_t(t) * kStack];
          fibers[t].uc_stack.ss_size = kStack;
          fibers[t].uc_link = &scheduler;
          done[t] = false;
          waits[t] = 0;
          makecontext(&fibers[t], reinterpret_cast<void (*)()>(+[] {
            (*body)();
            done[current] = true;
          }), 0);
        }
        for (int left = kThreads; left;) {
          left = 0;
          for (current = 0; current < kThreads; ++current) {
            if (done[current]) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current]);
            left += !done[current];
          }
        }
        for (int t = 1; t < kThreads; ++t) unequal |= waits[t] != waits[0];
      }
  return !unequal;
}

#endif
