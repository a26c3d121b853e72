#include "bind.h"

namespace py = pybind11;
using namespace swamp;

namespace {

const FusedTables* active = nullptr;

enum class Storage { float32, bfloat16, float64 };

const FusedKernels& kernels(Storage storage) {
  return storage == Storage::float32 ? active->float32 : storage == Storage::bfloat16 ? active->bfloat16 : active->float64;
}

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Defines a Python function name(storage, argument, threads) that calls a kernel.
template <typename Argument>
void define(py::module_& m, const char* name, void (*FusedKernels::*kernel)(const Argument&, int)) {
  m.def(name, [kernel](Storage storage, const Argument& argument, int threads) {
    py::gil_scoped_release release;
    (kernels(storage).*kernel)(argument, threads);
  });
}

}  // namespace

void use_fused(const FusedTables& tables) { active = &tables; }

void bind_fused(py::module_& parent) {
  py::module_ m = parent.def_submodule("fused", "Kernels of the fused engine; called by swamp_fast.engines.fused.");
  py::enum_<Storage>(m, "Storage")
      .value("float32", Storage::float32)
      .value("bfloat16", Storage::bfloat16)
      .value("float64", Storage::float64);
  py::class_<Map>(m, "Map").def(py::init([](uintptr_t data, int64_t blocks, int64_t channels, int64_t height, int64_t width,
                                            int64_t pad, int64_t samples, bool flat) {
    return Map{at<void>(data), blocks, channels, height, width, pad, samples, flat};
  }));
  py::class_<Taps>(m, "Taps").def(
      py::init([](uintptr_t starts, uintptr_t offsets, uintptr_t values, int64_t groups, int64_t rows) {
        return Taps{at<int32_t>(starts), at<int32_t>(offsets), at<void>(values), groups, rows};
      }));
  py::class_<Convolve>(m, "Convolve")
      .def(py::init([](Map in, Map out, Taps taps, uintptr_t bias, int64_t in_step, int64_t out_step, bool accumulate) {
        return Convolve{in, out, taps, at<void>(bias), in_step, out_step, accumulate};
      }));
  py::class_<WeightGrad>(m, "WeightGrad")
      .def(py::init([](Map in, Map out_grad, Taps taps, uintptr_t chunks, int64_t chunk_count, int64_t parts, int64_t in_step,
                       uintptr_t index, uintptr_t partial, uintptr_t scratch, int64_t scratch_size, uintptr_t grads,
                       uintptr_t bias_grad) {
        return WeightGrad{in, out_grad, taps, at<int64_t>(chunks), chunk_count, parts, in_step, at<int32_t>(index),
                          at<void>(partial), at<void>(scratch), scratch_size, at<void>(grads), at<void>(bias_grad)};
      }));
  py::class_<Norm>(m, "Norm")
      .def(py::init([](Map in, Map out, Map residual, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t variance,
                       double eps, bool batch, bool relu) {
        return Norm{in, out, residual, at<void>(weight), at<void>(bias), at<void>(mean), at<void>(variance), eps, batch, relu};
      }))
      .def_readwrite("batch", &Norm::batch);
  py::class_<NormGrad>(m, "NormGrad")
      .def(py::init([](Norm norm, Map in_grad, Map out_grad, Map residual_grad, uintptr_t weight_grad, uintptr_t bias_grad,
                       bool accumulate, bool accumulate_residual) {
        return NormGrad{norm, in_grad, out_grad, residual_grad, at<void>(weight_grad), at<void>(bias_grad), accumulate,
                        accumulate_residual};
      }));
  py::class_<Pointwise>(m, "Pointwise")
      .def(py::init([](Map in, Map out, Map in_grad, Map out_grad, int64_t kind, double parameter, bool accumulate) {
        return Pointwise{in, out, in_grad, out_grad, kind, parameter, accumulate};
      }));
  py::class_<Channels>(m, "Channels")
      .def(py::init([](Map from, Map to, int64_t from_channel, int64_t to_channel, int64_t count, bool accumulate) {
        return Channels{from, to, from_channel, to_channel, count, accumulate};
      }));
  py::class_<Multiply>(m, "Multiply").def(py::init([](Map in, Map factor, Map out, bool accumulate) {
    return Multiply{in, factor, out, accumulate};
  }));
  py::class_<Pool>(m, "Pool").def(py::init([](Map in, Map out, Map in_grad, Map out_grad, uintptr_t rows, uintptr_t columns,
                                              uintptr_t divisors, bool accumulate) {
    return Pool{in, out, in_grad, out_grad, at<int64_t>(rows), at<int64_t>(columns), at<double>(divisors), accumulate};
  }));
  py::class_<Flatten>(m, "Flatten").def(py::init([](Map spatial, Map flat, bool back, bool accumulate) {
    return Flatten{spatial, flat, back, accumulate};
  }));
  py::class_<Pack>(m, "Pack").def(py::init([](uintptr_t tensor, int64_t sample_stride, int64_t channel_stride,
                                              int64_t row_stride, int64_t column_stride, Map map) {
    return Pack{at<void>(tensor), sample_stride, channel_stride, row_stride, column_stride, map};
  }));
  m.def("gather", [](Storage storage, uintptr_t weights, uintptr_t index, uintptr_t values, int64_t count, int threads) {
    py::gil_scoped_release release;
    kernels(storage).gather(at<void>(weights), at<int32_t>(index), at<void>(values), count, threads);
  });
  define(m, "convolve", &FusedKernels::convolve);
  define(m, "weight_grad", &FusedKernels::weight_grad);
  define(m, "norm", &FusedKernels::norm);
  define(m, "norm_grad", &FusedKernels::norm_grad);
  define(m, "pointwise", &FusedKernels::pointwise);
  define(m, "pointwise_grad", &FusedKernels::pointwise_grad);
  define(m, "channels", &FusedKernels::channels);
  define(m, "multiply", &FusedKernels::multiply);
  define(m, "pool", &FusedKernels::pool);
  define(m, "pool_grad", &FusedKernels::pool_grad);
  define(m, "flatten", &FusedKernels::flatten);
  define(m, "pack", &FusedKernels::pack);
  define(m, "unpack", &FusedKernels::unpack);
}
