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

// Begins a function at a cache line. Without it, the speed of an update in the cache depends on where the linker places
// its loop; a difference of 7 % was measured.
#define SWAMP_AT_CACHE_LINE __attribute__((aligned(64)))

// Calls update(segment, begin, end) for every part of [begin, end) that lies in one segment.
// ends [S], nondecreasing, the last one is at least `end`; null for one segment
template <typename Update>
void for_each_segment(const int64_t* ends, int64_t segments, int64_t begin, int64_t end, const Update& update) {
  if (!ends) return update(0, begin, end);
  int64_t segment = 0, last = segments - 1;  // finds the first segment that ends after `begin`
  while (segment < last) {
    const int64_t middle = (segment + last) / 2;
    if (ends[middle] > begin) last = middle;
    else segment = middle + 1;
  }
  for (; begin < end; ++segment) {
    const int64_t stop = ends[segment] < end ? ends[segment] : end;
    if (begin < stop) update(segment, begin, stop);
    begin = stop;
  }
}

// Calls update(masked, lane, segment, begin, end) for every span of the bank. `masked` is std::true_type for prunable
// parameters, and std::false_type for the parameters after them, which have no mask (biases and norms).
// a  the arguments of an update, for example MaskedSgd
template <typename Arguments, typename Update>
void for_each_span(const Arguments& a, int threads, const Update& update) {
  // The loop over lanes is inside the loop over blocks, so that a mask is fetched from memory once and then read L
  // times.
  constexpr int64_t kBlock = 4096;
  const int64_t blocks = (a.parameters + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = begin + kBlock < a.parameters ? begin + kBlock : a.parameters;
    const int64_t middle = a.prunable < begin ? begin : a.prunable < end ? a.prunable : end;
    for (int64_t lane = 0; lane < a.lanes; ++lane) {
      const int64_t* ends = a.segment_ends ? a.segment_ends + a.run_of_lane[lane] * a.segments : nullptr;
      const auto masked = [&](int64_t segment, int64_t first, int64_t stop) {
        update(std::true_type{}, lane, segment, first, stop);
      };
      const auto unmasked = [&](int64_t segment, int64_t first, int64_t stop) {
        update(std::false_type{}, lane, segment, first, stop);
      };
      if (begin < middle) for_each_segment(ends, a.segments, begin, middle, masked);
      if (middle < end) for_each_segment(ends, a.segments, middle, end, unmasked);
    }
  }
}
