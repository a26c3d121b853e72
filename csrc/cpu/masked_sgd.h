// The masked SGD step and the update of the SWA mean, in one pass over the bank. It rounds where torch.optim.SGD does,
// so both give the same bits if both use fused multiply-adds.

template <typename T, bool masked, bool nesterov, bool average>
SWAMP_AT_CACHE_LINE void masked_sgd_span(T* __restrict w, const T* __restrict g, T* __restrict m, T* __restrict s,
                                         const uint8_t* __restrict mask, int64_t count, T lr, T momentum,
                                         T weight_decay, T grad_scale, T swa_weight) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T d = multiply_add(w[i], weight_decay, g[i] * grad_scale);
    T buffer = momentum * m[i] + d;
    const T step = nesterov ? multiply_add(buffer, momentum, d) : buffer;
    T weight = multiply_add(step, -lr, w[i]);
    if constexpr (masked) {
      buffer = keep_if(mask[i], buffer);
      weight = keep_if(mask[i], weight);
    }
    m[i] = buffer;
    w[i] = weight;
    if constexpr (average) s[i] = multiply_add(weight - s[i], swa_weight, s[i]);
  }
}

template <typename T, bool masked>
void masked_sgd_lane(const MaskedSgd<T>& a, int64_t lane, int64_t segment, int64_t begin, int64_t end) {
  T* w = a.weights + lane * a.weights_stride + begin;
  const T* g = a.grads + lane * a.grads_stride + begin;
  T* m = a.momentum_buffer + lane * a.momentum_stride + begin;
  const uint8_t* mask = masked ? a.masks + a.run_of_lane[lane] * a.masks_stride + begin : nullptr;
  const bool average = a.swa && a.swa_weight[lane] != 0;
  T* s = average ? a.swa + lane * a.swa_stride + begin : nullptr;
  const int64_t rate = lane * a.segments + segment;
  const T lr = T(a.lr[rate]), momentum = T(a.momentum[lane]), weight_decay = T(a.weight_decay[rate]);
  const T grad_scale = a.grad_scale ? T(a.grad_scale[lane]) : T(1);
  const T swa_weight = average ? T(a.swa_weight[lane]) : T(0);
  const auto span = average ? (a.nesterov ? masked_sgd_span<T, masked, true, true> : masked_sgd_span<T, masked, false, true>)
                            : (a.nesterov ? masked_sgd_span<T, masked, true, false> : masked_sgd_span<T, masked, false, false>);
  span(w, g, m, s, mask, end - begin, lr, momentum, weight_decay, grad_scale, swa_weight);
}

template <typename T>
void masked_sgd_(const MaskedSgd<T>& a, int threads) {
  for_each_span(a, threads, [&](auto masked, int64_t lane, int64_t segment, int64_t begin, int64_t end) {
    masked_sgd_lane<T, decltype(masked)::value>(a, lane, segment, begin, end);
  });
}
