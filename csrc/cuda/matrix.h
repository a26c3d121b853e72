// The instructions that the kernels are made of: 8x8 matrices of bfloat16 out of shared memory, and their products.
// tests/support/host/matrix.h has the same names for a CPU.
#ifndef SWAMP_MATRIX
#define SWAMP_MATRIX

struct bfloat16 {
  unsigned short bits;
};

// Four matrices of 8 rows of 8; lane l gives the address of row l % 8 of matrix l / 8. A thread gets of each matrix
// entries (l / 4, 2 * (l % 4)) and the next, or of its transpose.
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

// sums += a b, a 16x16 by rows, b 16x8 by columns; a thread has entries (l / 4, 2 * (l % 4) + {0, 1}) of the sums, and
// those eight rows below.
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

// What another block stored, once it has arrived.
__device__ inline float of_another(const float* from) { return __ldcg(from); }

// Whether this block is the last of so many to arrive; what the others stored before is there then. Leaves arrivals at 0.
// All threads come here; `shared` is a word of shared memory.
__device__ inline bool arrived_last(unsigned* arrivals, unsigned of, unsigned* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what the block stored comes before its arrival
    *shared = atomicAdd(arrivals, 1u);
    __threadfence();  // and what the others stored, before this block reads it
  }
  __syncthreads();
  if (*shared != of - 1) return false;
  if (threadIdx.x == 0) *arrivals = 0;
  return true;
}

#endif
