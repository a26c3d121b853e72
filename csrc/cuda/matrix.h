// The GPU's instructions behind plain functions: 8x8 matrices of bfloat16 from shared memory, their products, and packing.
// tests/support/host/matrix.h has the same names for a CPU.
#ifndef SWAMP_MATRIX
#define SWAMP_MATRIX

struct bfloat16 {
  unsigned short bits;
};

// Loads four 8x8 matrices. Thread l of a warp gives the address of row l % 8 of matrix l / 8, and gets of each matrix the
// entries (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1), or those of the transposed matrix.
__device__ inline void load_matrices(unsigned (&to)[4], const bfloat16* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address));
}

__device__ inline void load_matrices_transposed(unsigned (&to)[4], const bfloat16* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address));
}

// sums += a b, where a is 16x16 by rows and b 16x8 by columns. Thread l has the entries (l / 4, 2 * (l % 4) + {0, 1}) of the
// sums and the two that are eight rows below.
__device__ inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers as bfloat16, the first in the lower half.
__device__ inline unsigned pack(float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// The same after ReLU; a NaN becomes the canonical one.
__device__ inline unsigned pack_relu(float low, float high) {
  unsigned out;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline uint4 read_only(const bfloat16* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

// Reads what another block stored before it arrived.
__device__ inline float of_another(const float* from) { return __ldcg(from); }

// Whether this block is the last of `blocks` to arrive. If so, it sees what the others stored, and the counter is zero again.
// All threads of the block must call it; `shared` is a word of shared memory.
__device__ inline bool arrived_last(unsigned* arrivals, unsigned blocks, unsigned* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // the stores of this block come before its arrival
    *shared = atomicAdd(arrivals, 1u);
    __threadfence();  // and those of the others before this block reads them
  }
  __syncthreads();
  if (*shared != blocks - 1) return false;
  if (threadIdx.x == 0) *arrivals = 0;
  return true;
}

#endif
