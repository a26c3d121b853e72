// Functions that wrap the GPU's instructions for loading 8x8 bfloat16 matrices from shared memory, for their products
// and for packing. tests/support/host/matrix.h implements the same functions on a CPU.
#ifndef SWAMP_MATRIX
#define SWAMP_MATRIX

struct bfloat16 {
  unsigned short bits;
};

// Loads four 8x8 matrices. Thread l of a warp passes the address of row l % 8 of matrix l / 8. From each matrix it gets
// the entries (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1). load_matrices_transposed gives the same entries of the
// transposed matrices.
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

// sums += a b, where a is a row-major 16x16 matrix and b is a column-major 16x8 matrix. Thread l holds the entries
// (l / 4, 2 * (l % 4) + {0, 1}) of the sums, and the two entries eight rows below them.
__device__ inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two numbers to bfloat16 and packs them into one word, the first into the lower half.
__device__ inline unsigned pack(float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// Packs like `pack`, after ReLU; a NaN becomes the canonical NaN.
__device__ inline unsigned pack_relu(float low, float high) {
  unsigned out;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline uint4 read_only(const bfloat16* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

// Reads a number that another block stored before it called arrived_last.
__device__ inline float of_another(const float* from) { return __ldcg(from); }

// Counts this block as arrived, and returns whether it is the last of `blocks` blocks. The last block sees what the
// others stored, and sets the counter to zero again. All threads of the block must call it. `shared` is a word of
// shared memory.
__device__ inline bool arrived_last(unsigned* arrivals, unsigned blocks, unsigned* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // makes this block's stores visible before its arrival
    *shared = atomicAdd(arrivals, 1u);
    __threadfence();  // keeps this block from reading before the other blocks have arrived
  }
  __syncthreads();
  if (*shared != blocks - 1) return false;
  if (threadIdx.x == 0) *arrivals = 0;
  return true;
}

#endif
