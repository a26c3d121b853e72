// Gradient clipping: the factor that scales each lane's gradient so that its norm is at most the lane's bound. Sums use
// a fixed number of parts and accumulators in a fixed order, so their bits are the same for every thread count, lane
// and instruction set.

constexpr int kAccumulators = 16;

// Adds the squares of `count` numbers to the accumulators; number i goes to accumulator i % kAccumulators. Squaring and
// summing are two loops, because compilers then vectorise both.
template <typename T, bool masked>
void add_squares(const T* g, const uint8_t* mask, int64_t count, double* sums) {
  constexpr int64_t kSquares = 16 * kAccumulators;
  double totals[kAccumulators] = {};
  for (int64_t begin = 0; begin < count; begin += kSquares) {
    const int64_t length = begin + kSquares < count ? kSquares : count - begin;
    double squares[kSquares];
    if (length < kSquares) __builtin_memset(squares, 0, sizeof squares);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      T value = g[begin + i];
      if constexpr (masked) value = keep_if(mask[begin + i], value);
      squares[i] = double(value) * double(value);
    }
    for (int i = 0; i < kSquares; i += kAccumulators) {
#pragma omp simd
      for (int j = 0; j < kAccumulators; ++j) totals[j] += squares[i + j];
    }
  }
  for (int j = 0; j < kAccumulators; ++j) sums[j] += totals[j];
}

// The sum of the squares of one lane's gradient, without the gradients of pruned weights.
template <typename T>
double squares_of_lane(const ClipScale<T>& a, int64_t lane, int threads) {
  constexpr int kParts = 64;
  const int64_t size = (a.parameters + kParts - 1) / kParts;
  const T* g = a.grads + lane * a.grads_stride;
  const uint8_t* mask = a.masks + a.run_of_lane[lane] * a.masks_stride;
  double parts[kParts];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < kParts; ++part) {
    const int64_t begin = part * size < a.parameters ? part * size : a.parameters;
    const int64_t end = begin + size < a.parameters ? begin + size : a.parameters;
    const int64_t middle = a.prunable < begin ? begin : a.prunable < end ? a.prunable : end;
    double sums[kAccumulators] = {};
    add_squares<T, true>(g + begin, mask + begin, middle - begin, sums);
    add_squares<T, false>(g + middle, nullptr, end - middle, sums);
    parts[part] = 0;
    for (const double sum : sums) parts[part] += sum;
  }
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

// scale = min(1, clip_norm / (norm + 1e-6)); NaN if the norm is not finite.
template <typename T>
void clip_scale(const ClipScale<T>& a, int threads) {
  for (int64_t lane = 0; lane < a.lanes; ++lane) {
    const double norm = __builtin_sqrt(squares_of_lane(a, lane, threads));
    const double scale = a.clip_norm[lane] / (norm + 1e-6);
    a.scale[lane] = !__builtin_isfinite(norm) ? __builtin_nan("") : scale < 1 ? scale : 1;
  }
}
