// The Python bindings of the CPU kernels. They take addresses, sizes and a number of threads; swamp_fast/_C.pyi names
// the arguments. At import, the widest instruction set of the processor is chosen, and use() chooses another one. use()
// checks its argument; the kernels' arguments are not checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "fused/bind.h"
#include "kernels.h"

namespace py = pybind11;
using namespace swamp;

namespace {

std::vector<std::string> available() {
  std::vector<std::string> names{"generic"};
#if defined(SWAMP_X86) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      names.emplace_back("avx512");
  }
#endif
  return names;
}

std::string active_name;
const Kernels* active = nullptr;

void use(const std::string& name) {
  bool known = false;
  for (const auto& instruction_set : available()) known = known || instruction_set == name;
  if (!known) throw std::invalid_argument("this processor has no kernels named " + name);
  active = &kernels_generic();
  use_fused(fused_generic());
#if defined(SWAMP_X86) && defined(__GNUC__)
  if (name == "avx2") active = &kernels_avx2(), use_fused(fused_avx2());
  if (name == "avx512") active = &kernels_avx512(), use_fused(fused_avx512());
#endif
  active_name = name;
}

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

template <typename T>
const FloatKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) return active->float32;
  else return active->float64;
}

template <typename T>
void bind(py::module_& m, const std::string& type) {
  using py::arg;
  m.def(("masked_sgd_" + type).c_str(),
        [](uintptr_t weights, int64_t weights_stride, uintptr_t grads, int64_t grads_stride, uintptr_t momentum_buffer,
           int64_t momentum_stride, uintptr_t swa, int64_t swa_stride, uintptr_t masks, int64_t masks_stride,
           uintptr_t run_of_lane, uintptr_t segment_ends, uintptr_t lr, uintptr_t momentum, uintptr_t weight_decay,
           uintptr_t grad_scale, uintptr_t swa_weight, int64_t lanes, int64_t parameters, int64_t prunable,
           int64_t segments, bool nesterov, int threads) {
          py::gil_scoped_release release;
          kernels<T>().masked_sgd_({at<T>(weights), at<T>(grads), at<T>(momentum_buffer), at<T>(swa), at<uint8_t>(masks),
                                    at<int64_t>(run_of_lane), at<int64_t>(segment_ends), at<double>(lr),
                                    at<double>(momentum), at<double>(weight_decay), at<double>(grad_scale),
                                    at<double>(swa_weight), weights_stride, grads_stride, momentum_stride, swa_stride,
                                    masks_stride, lanes, parameters, prunable, segments, nesterov},
                                   threads);
        });
  m.def(("masked_adamw_" + type).c_str(),
        [](uintptr_t weights, int64_t weights_stride, uintptr_t grads, int64_t grads_stride, uintptr_t exp_avg,
           int64_t exp_avg_stride, uintptr_t exp_avg_sq, int64_t exp_avg_sq_stride, uintptr_t swa, int64_t swa_stride,
           uintptr_t masks, int64_t masks_stride, uintptr_t run_of_lane, uintptr_t segment_ends, uintptr_t lr,
           uintptr_t beta1, uintptr_t beta2, uintptr_t eps, uintptr_t weight_decay, uintptr_t step,
           uintptr_t grad_scale, uintptr_t swa_weight, int64_t lanes, int64_t parameters, int64_t prunable,
           int64_t segments, int threads) {
          py::gil_scoped_release release;
          kernels<T>().masked_adamw_({at<T>(weights), at<T>(grads), at<T>(exp_avg), at<T>(exp_avg_sq), at<T>(swa),
                                      at<uint8_t>(masks), at<int64_t>(run_of_lane), at<int64_t>(segment_ends),
                                      at<double>(lr), at<double>(beta1), at<double>(beta2), at<double>(eps),
                                      at<double>(weight_decay), at<double>(step), at<double>(grad_scale),
                                      at<double>(swa_weight), weights_stride, grads_stride, exp_avg_stride,
                                      exp_avg_sq_stride, swa_stride, masks_stride, lanes, parameters, prunable,
                                      segments},
                                     threads);
        });
  m.def(("clip_scale_" + type).c_str(),
        [](uintptr_t grads, int64_t grads_stride, uintptr_t masks, int64_t masks_stride, uintptr_t run_of_lane,
           uintptr_t clip_norm, uintptr_t scale, int64_t lanes, int64_t parameters, int64_t prunable, int threads) {
          py::gil_scoped_release release;
          kernels<T>().clip_scale({at<T>(grads), at<uint8_t>(masks), at<int64_t>(run_of_lane), at<double>(clip_norm),
                                   at<double>(scale), grads_stride, masks_stride, lanes, parameters, prunable},
                                  threads);
        });
  m.def(("particle_mean_" + type).c_str(),
        [](uintptr_t weights, int64_t weights_stride, uintptr_t run_of_lane, uintptr_t mean, int64_t mean_stride,
           int64_t lanes, int64_t parameters, int64_t runs, int threads) {
          py::gil_scoped_release release;
          kernels<T>().particle_mean({at<T>(weights), at<int64_t>(run_of_lane), at<T>(mean), weights_stride, mean_stride,
                                      lanes, parameters, runs},
                                     threads);
        });
  m.def(("global_threshold_" + type).c_str(),
        [](uintptr_t weights, int64_t weights_stride, uintptr_t masks, int64_t masks_stride, uintptr_t keep,
           uintptr_t thresholds, uintptr_t new_masks, int64_t new_masks_stride, uintptr_t verdict, int64_t runs,
           int64_t prunable, int threads) {
          py::gil_scoped_release release;
          kernels<T>().global_threshold({at<T>(weights), at<uint8_t>(masks), at<int64_t>(keep), at<T>(thresholds),
                                         at<uint8_t>(new_masks), at<int64_t>(verdict), weights_stride, masks_stride,
                                         new_masks_stride, runs, prunable},
                                        threads);
        });
  m.def(("gather_augment_" + type).c_str(),
        [](uintptr_t images, uintptr_t table, uintptr_t index, uintptr_t samples, uintptr_t keys, uintptr_t out,
           int64_t lanes, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t pad, bool flip, bool channels_last,
           int threads) {
          py::gil_scoped_release release;
          kernels<T>().gather_augment({at<void>(images), at<T>(table), at<int64_t>(index), at<int64_t>(samples),
                                       at<int64_t>(keys), at<T>(out), lanes, batch, height, width, channels, pad, flip, channels_last},
                                      threads);
        });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of swamp_fast; called through swamp_fast.ops, which checks what comes in.";
  use(available().back());
  m.def("available", &available, "Instruction sets that this processor can run, slowest first.");
  m.def("active", [] { return active_name; }, "The instruction set in use.");
  m.def("use", &use, py::arg("name"), "Use another of the available instruction sets.");
  m.def("philox", [](uintptr_t keys, uintptr_t words, int64_t lanes, int64_t count, uint32_t purpose, int threads) {
    py::gil_scoped_release release;
    active->philox({at<int64_t>(keys), at<uint32_t>(words), lanes, count, purpose}, threads);
  });
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind_fused(m);
}
