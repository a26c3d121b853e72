// The arguments of the ops' kernels, and the table of kernels that each instruction set provides. As in
// swamp_fast/__init__.py, R is the number of runs, L of lanes, P of parameters, Q of prunable parameters, S of segments,
// B of samples in a batch. A stride is the distance in elements from one row to the next; each row is contiguous. The
// kernels check nothing, because the contracts in swamp_fast/ops/ have checked all arguments.
#pragma once

#include <cstdint>
#include <type_traits>

namespace swamp {

template <typename T>
struct MaskedSgd {
  T* weights;               // [L, P]
  const T* grads;           // [L, P]
  T* momentum_buffer;       // [L, P]
  T* swa;                   // [L, P] running mean, or null
  const uint8_t* masks;     // [R, Q]
  const int64_t* run_of_lane;  // [L]
  const int64_t* segment_ends;  // [R, S] the index after each segment, the last is P; null for one segment
  const double* lr;            // [L, S]
  const double* momentum;      // [L]
  const double* weight_decay;  // [L, S]
  const double* grad_scale;    // [L] factor of a lane's gradient, or null
  const double* swa_weight;    // [L] 1 / (samples with this one), 0 leaves the mean alone; null without swa
  int64_t weights_stride, grads_stride, momentum_stride, swa_stride, masks_stride;
  int64_t lanes, parameters, prunable, segments;
  bool nesterov;
};

template <typename T>
struct MaskedAdamw {
  T* weights;               // [L, P]
  const T* grads;           // [L, P]
  T* exp_avg;               // [L, P]
  T* exp_avg_sq;            // [L, P]
  T* swa;                   // [L, P] running mean, or null
  const uint8_t* masks;     // [R, Q]
  const int64_t* run_of_lane;  // [L]
  const int64_t* segment_ends;  // [R, S] the index after each segment, the last is P; null for one segment
  const double* lr;            // [L, S]
  const double* beta1;         // [L]
  const double* beta2;         // [L]
  const double* eps;           // [L]
  const double* weight_decay;  // [L, S]
  const double* step;          // [L] 1 for the first
  const double* grad_scale;    // [L] factor of a lane's gradient, or null
  const double* swa_weight;    // [L] 1 / (samples with this one), 0 leaves the mean alone; null without swa
  int64_t weights_stride, grads_stride, exp_avg_stride, exp_avg_sq_stride, swa_stride, masks_stride;
  int64_t lanes, parameters, prunable, segments;
};

template <typename T>
struct ClipScale {
  const T* grads;              // [L, P]
  const uint8_t* masks;        // [R, Q]
  const int64_t* run_of_lane;  // [L]
  const double* clip_norm;     // [L]
  double* scale;               // [L]
  int64_t grads_stride, masks_stride;
  int64_t lanes, parameters, prunable;
};

template <typename T>
struct ParticleMean {
  const T* weights;            // [L, P]
  const int64_t* run_of_lane;  // [L]
  T* mean;                     // [R, P]
  int64_t weights_stride, mean_stride;
  int64_t lanes, parameters, runs;
};

template <typename T>
struct GlobalThreshold {
  const T* weights;      // [R, Q]
  const uint8_t* masks;  // [R, Q]
  const int64_t* keep;   // [R]
  T* thresholds;         // [R]
  uint8_t* new_masks;    // [R, Q]
  int64_t* verdict;      // [R, 2] the number of spans that hold a NaN, and the number of weights that the mask keeps
  int64_t weights_stride, masks_stride, new_masks_stride;
  int64_t runs, prunable;
};

struct Philox {
  const int64_t* keys;  // [L, 3] seed, stream, time
  uint32_t* words;      // [L, count]
  int64_t lanes, count;
  uint32_t purpose;
};

// The pictures are uint8 if there is a table, otherwise T.
template <typename T>
struct GatherAugment {
  const void* images;     // [n, H, W, C]
  const T* table;         // [C, 256] the value of each byte; null if the images are of type T and are copied unchanged
  const int64_t* index;   // [L, B]
  const int64_t* samples; // [L, B] the sample's number, which selects its random draw
  const int64_t* keys;    // [L, 3] seed, stream, epoch
  T* out;                 // [L, B, C, H, W]; if channels_last, its memory is ordered [L, B, H, W, C]
  int64_t lanes, batch, height, width, channels;
  int64_t pad;
  bool flip, channels_last;
};

template <typename T>
struct FloatKernels {
  void (*masked_sgd_)(const MaskedSgd<T>&, int threads);
  void (*masked_adamw_)(const MaskedAdamw<T>&, int threads);
  void (*clip_scale)(const ClipScale<T>&, int threads);
  void (*particle_mean)(const ParticleMean<T>&, int threads);
  void (*global_threshold)(const GlobalThreshold<T>&, int threads);
  void (*gather_augment)(const GatherAugment<T>&, int threads);
};

struct Kernels {
  FloatKernels<float> float32;
  FloatKernels<double> float64;
  void (*philox)(const Philox&, int threads);
};

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace swamp
