// The kernels of the ops. This file is compiled once per instruction set, which SWAMP_ISA names. It must not use
// templates of the standard library: two instruction sets would instantiate the same symbol, and the linker might keep
// the instance that the processor can't run.
#include "kernels.h"

#define SWAMP_JOIN2(a, b) a##b
#define SWAMP_JOIN(a, b) SWAMP_JOIN2(a, b)

namespace swamp {
namespace SWAMP_JOIN(isa_, SWAMP_ISA) {
namespace {

constexpr uint32_t kCropFlip = 1;  // the purpose word, as in swamp_fast/particles/random.py

#include "masked.h"
#include "philox.h"

#include "clip_scale.h"
#include "gather_augment.h"
#include "global_threshold.h"
#include "masked_adamw.h"
#include "masked_sgd.h"
#include "particle_mean.h"

template <typename T>
constexpr FloatKernels<T> float_kernels() {
  return {masked_sgd_<T>,   masked_adamw_<T>,    clip_scale<T>,
          particle_mean<T>, global_threshold<T>, gather_augment<T>};
}

constexpr Kernels table = {float_kernels<float>(), float_kernels<double>(), philox};

}  // namespace
}  // namespace SWAMP_JOIN(isa_, SWAMP_ISA)

const Kernels& SWAMP_JOIN(kernels_, SWAMP_ISA)() { return SWAMP_JOIN(isa_, SWAMP_ISA)::table; }

}  // namespace swamp
