// Helpers of masked_sgd.h, masked_adamw.h and clip_scale.h.

template <typename T>
inline T multiply_add(T a, T b, T c) {
#ifdef __FMA__
  if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Returns the value if `kept` is 1, and 0 if it is 0. It masks the bits, because a branch would prevent vectorisation
// and a product with 0 would keep NaN.
template <typename T>
inline T keep_if(uint8_t kept, T value) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits bits;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits &= Bits(0) - Bits(kept);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// Calls update(masked, lane, begin, end) for every span of the bank. `masked` is std::true_type for prunable
// parameters, and std::false_type for the parameters after them, which have no mask (biases and norms).
template <typename Update>
void for_each_span(int64_t lanes, int64_t parameters, int64_t prunable, int threads, const Update& update) {
  // The loop over lanes is inside the loop over blocks, so that a mask is fetched from memory once and then read L
  // times.
  constexpr int64_t kBlock = 4096;
  const int64_t blocks = (parameters + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = begin + kBlock < parameters ? begin + kBlock : parameters;
    const int64_t middle = prunable < begin ? begin : prunable < end ? prunable : end;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (begin < middle) update(std::true_type{}, lane, begin, middle);
      if (middle < end) update(std::false_type{}, lane, middle, end);
    }
  }
}
