// The masked AdamW step and the update of the SWA mean, in one pass over the bank. The operations are in the same order
// as in torch.optim.AdamW.

template <typename T>
struct AdamwRates {
  T decay;            // 1 - lr * weight_decay
  T one_minus_beta1;
  T beta2, one_minus_beta2;
  T size;             // -lr / (1 - beta1^step)
  T root_correction;  // sqrt(1 - beta2^step)
  T eps, grad_scale, swa_weight;
};

// The rates of one lane's segment at the lane's step. As in PyTorch, they are computed in float64 and rounded once.
template <typename T>
AdamwRates<T> adamw_rates(const MaskedAdamw<T>& a, int64_t lane, int64_t segment) {
  const int64_t rate = lane * a.segments + segment;
  const double lr = a.lr[rate], beta1 = a.beta1[lane], beta2 = a.beta2[lane], step = a.step[lane];
  return {T(1 - lr * a.weight_decay[rate]),
          T(1 - beta1),
          T(beta2),
          T(1 - beta2),
          T(-lr / (1 - __builtin_pow(beta1, step))),
          T(__builtin_sqrt(1 - __builtin_pow(beta2, step))),
          T(a.eps[lane]),
          a.grad_scale ? T(a.grad_scale[lane]) : T(1),
          a.swa ? T(a.swa_weight[lane]) : T(0)};
}

template <typename T, bool masked, bool average>
SWAMP_AT_CACHE_LINE void masked_adamw_span(T* __restrict w, const T* __restrict g, T* __restrict m, T* __restrict v, T* __restrict s,
                       const uint8_t* __restrict mask, int64_t count, AdamwRates<T> r) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const T grad = g[i] * r.grad_scale;
    T mean = multiply_add(grad - m[i], r.one_minus_beta1, m[i]);
    T square = r.beta2 * v[i] + r.one_minus_beta2 * grad * grad;
    T root;
    if constexpr (sizeof(T) == 4) root = __builtin_sqrtf(square);
    else root = __builtin_sqrt(square);
    T weight = w[i] * r.decay + r.size * mean / (root / r.root_correction + r.eps);
    if constexpr (masked) {
      mean = keep_if(mask[i], mean);
      square = keep_if(mask[i], square);
      weight = keep_if(mask[i], weight);
    }
    m[i] = mean;
    v[i] = square;
    w[i] = weight;
    if constexpr (average) s[i] = multiply_add(weight - s[i], r.swa_weight, s[i]);
  }
}

template <typename T, bool masked>
void masked_adamw_lane(const MaskedAdamw<T>& a, int64_t lane, int64_t segment, int64_t begin, int64_t end) {
  T* w = a.weights + lane * a.weights_stride + begin;
  const T* g = a.grads + lane * a.grads_stride + begin;
  T* m = a.exp_avg + lane * a.exp_avg_stride + begin;
  T* v = a.exp_avg_sq + lane * a.exp_avg_sq_stride + begin;
  const uint8_t* mask = masked ? a.masks + a.run_of_lane[lane] * a.masks_stride + begin : nullptr;
  const bool average = a.swa && a.swa_weight[lane] != 0;
  T* s = average ? a.swa + lane * a.swa_stride + begin : nullptr;
  const auto span = average ? masked_adamw_span<T, masked, true> : masked_adamw_span<T, masked, false>;
  span(w, g, m, v, s, mask, end - begin, adamw_rates(a, lane, segment));
}

template <typename T>
void masked_adamw_(const MaskedAdamw<T>& a, int threads) {
  for_each_span(a, threads, [&](auto masked, int64_t lane, int64_t segment, int64_t begin, int64_t end) {
    masked_adamw_lane<T, decltype(masked)::value>(a, lane, segment, begin, end);
  });
}
