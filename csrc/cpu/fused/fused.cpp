// The fused engine's kernels. Like kernels.cpp, this file is compiled once per instruction set. The compiler may
// contract products and sums to fused multiply-adds here, because these kernels need not match another library bit for
// bit.
#include "fused.h"

#include <math.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define SWAMP_JOIN2(a, b) a##b
#define SWAMP_JOIN(a, b) SWAMP_JOIN2(a, b)

namespace swamp {
namespace SWAMP_JOIN(isa_, SWAMP_ISA) {
namespace {

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

#include "vector.h"

#include "convolution.h"
#include "norm.h"
#include "pointwise.h"
#include "pooling.h"
#include "reorder.h"

template <typename S>
constexpr FusedKernels fused_kernels() {
  return {gather<S>,     convolve<S>, weight_grad<S>, norm<S>,      norm_grad<S>, pointwise<S>, pointwise_grad<S>,
          channels<S>,   multiply<S>, pool<S>,        pool_grad<S>, flatten<S>,   pack<S>,      unpack<S>};
}

constexpr FusedTables table = {fused_kernels<float>(), fused_kernels<bfloat16>(), fused_kernels<double>()};

}  // namespace
}  // namespace SWAMP_JOIN(isa_, SWAMP_ISA)

const FusedTables& SWAMP_JOIN(fused_, SWAMP_ISA)() { return SWAMP_JOIN(isa_, SWAMP_ISA)::table; }

}  // namespace swamp
