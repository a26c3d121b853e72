// Finds the exact magnitude threshold by radix select over the bits of |w|. Read as integers, these bits have the same
// order as the magnitudes, unless one is NaN. Each pass finds one more digit of the threshold: it builds a histogram of
// that digit over the weights whose higher digits equal those found so far. Finally, the new mask is written. Each
// thread takes one contiguous span of a row, so that the ties that are kept are those with the lowest indices.

template <typename T>
struct Radix;

template <>
struct Radix<float> {
  using Bits = uint32_t;
  static constexpr Bits magnitude = 0x7FFFFFFF, infinity = 0x7F800000;
  static constexpr int shifts[] = {20, 10, 0};
};

template <>
struct Radix<double> {
  using Bits = uint64_t;
  static constexpr Bits magnitude = 0x7FFFFFFFFFFFFFFF, infinity = 0x7FF0000000000000;
  static constexpr int shifts[] = {52, 41, 30, 20, 10, 0};
};

constexpr int kBins = 2048;           // a digit has at most 11 bits
constexpr int kStride = kBins + 128;  // size of a table; the extra 128 put the tables at different page offsets
constexpr int kChunk = 1024;

struct Span {
  int64_t begin, end;
};

inline Span span_of(int64_t count, int thread, int threads) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  const int64_t begin = chunks * thread / threads * kChunk, end = chunks * (thread + 1) / threads * kChunk;
  return {begin, end < count ? end : count};
}

// Counts the values of one digit, the bits from `shift` up to `above`, over the kept weights whose higher digits equal
// `prefix`. The first pass also returns whether a kept weight is NaN; later passes return false.
template <typename T, bool first>
bool count_digit(const T* weights, const uint8_t* mask, Span span, int shift, int above,
                 typename Radix<T>::Bits prefix, uint32_t* histogram) {
  using Bits = typename Radix<T>::Bits;
  // Neighbouring weights often have the same digit. Eight separate tables keep their increments from waiting for each
  // other.
  constexpr int kTables = 8;
  uint32_t counts[kTables][kStride];  // bin kBins counts the pruned weights
  __builtin_memset(counts, 0, sizeof counts);
  const Bits digit_mask = first ? ~Bits(0) : (Bits(1) << (above - shift)) - 1;
  bool nan = false;
  for (int64_t begin = span.begin; begin < span.end; begin += kChunk) {
    const int64_t count = begin + kChunk < span.end ? kChunk : span.end - begin;
    const uint8_t* m = mask + begin;
    Bits bits[kChunk];
    __builtin_memcpy(bits, weights + begin, count * sizeof(T));
    if constexpr (first) {
      Bits bad = 0;
      for (int64_t i = 0; i < count; ++i) {
        bits[i] &= Radix<T>::magnitude;
        bad |= Bits(m[i] != 0) & Bits(bits[i] > Radix<T>::infinity);
      }
      nan |= bad != 0;
      uint16_t digits[kChunk];
      for (int64_t i = 0; i < count; ++i) digits[i] = m[i] ? uint16_t(bits[i] >> shift) : uint16_t(kBins);
      for (int64_t i = count; i % kTables; ++i) digits[i] = kBins;
      for (int64_t i = 0; i < count; i += kTables)
        for (int table = 0; table < kTables; ++table) ++counts[table][digits[i + table]];
    } else {
      // Few weights match the prefix. So first list the groups of eight weights in which any does, without a branch
      // that could be mispredicted.
      alignas(8) uint8_t match[kChunk] = {};
      for (int64_t i = 0; i < count; ++i) match[i] = m[i] & uint8_t(((bits[i] & Radix<T>::magnitude) >> above) == prefix);
      uint64_t groups[kChunk / 8];
      uint16_t listed[kChunk / 8];
      __builtin_memcpy(groups, match, sizeof groups);
      int listed_count = 0;
      for (int group = 0; group < kChunk / 8; ++group) {
        listed[listed_count] = uint16_t(group);
        listed_count += groups[group] != 0;
      }
      for (int k = 0; k < listed_count; ++k) {
        for (uint64_t any = groups[listed[k]]; any; any &= any - 1) {
          const int64_t i = listed[k] * 8 + __builtin_ctzll(any) / 8;
          ++counts[0][(bits[i] >> shift) & digit_mask];
        }
      }
    }
  }
  for (int bin = 0; bin < kBins; ++bin) {
    histogram[bin] = 0;
    for (const auto& table : counts) histogram[bin] += table[bin];
  }
  return nan;
}

// Writes the mask of the weights above the threshold and of the first `ties` weights that equal it.
template <typename T>
void write_mask(const T* weights, const uint8_t* mask, Span span, typename Radix<T>::Bits threshold, int64_t ties,
                uint8_t* new_mask) {
  using Bits = typename Radix<T>::Bits;
  for (int64_t begin = span.begin; begin < span.end; begin += kChunk) {
    const int64_t count = begin + kChunk < span.end ? kChunk : span.end - begin;
    const uint8_t* m = mask + begin;
    uint8_t* out = new_mask + begin;
    Bits bits[kChunk];
    __builtin_memcpy(bits, weights + begin, count * sizeof(T));
    uint8_t equal = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = bits[i] & Radix<T>::magnitude;
      out[i] = m[i] & uint8_t(magnitude > threshold);
      equal |= m[i] & uint8_t(magnitude == threshold);
    }
    if (!equal) continue;
    for (int64_t i = 0; i < count && ties > 0; ++i) {
      if (m[i] && (bits[i] & Radix<T>::magnitude) == threshold) {
        out[i] = 1;
        --ties;
      }
    }
  }
}

template <typename T>
void global_threshold(const GlobalThreshold<T>& a, int threads) {
  using Bits = typename Radix<T>::Bits;
  uint32_t* histograms = static_cast<uint32_t*>(__builtin_malloc(sizeof(uint32_t) * kBins * threads));
  for (int64_t run = 0; run < a.runs; ++run) {
    const T* weights = a.weights + run * a.weights_stride;
    const uint8_t* mask = a.masks + run * a.masks_stride;
    uint8_t* new_mask = a.new_masks + run * a.new_masks_stride;
    Bits prefix = 0;
    int64_t wanted = a.keep[run];  // how many of the weights that match `prefix` are kept
    int above = 0;
    for (const int shift : Radix<T>::shifts) {
      int nans = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : nans)
      for (int thread = 0; thread < threads; ++thread) {
        const Span span = span_of(a.prunable, thread, threads);
        uint32_t* histogram = histograms + thread * kBins;
        nans += above == 0 ? count_digit<T, true>(weights, mask, span, shift, above, prefix, histogram)
                           : count_digit<T, false>(weights, mask, span, shift, above, prefix, histogram);
      }
      if (above == 0) {
        int64_t kept = 0;
        for (int64_t i = 0; i < int64_t{threads} * kBins; ++i) kept += histograms[i];
        a.verdict[run * 2] = nans;
        a.verdict[run * 2 + 1] = kept;
        if (nans || wanted > kept) wanted = 0;  // the contract reads the verdict and raises
        if (wanted == 0) {  // nothing is kept, so the threshold is infinity
          prefix = Radix<T>::infinity;
          break;
        }
      }
      int bin = kBins - 1;
      for (;; --bin) {
        int64_t in_bin = 0;
        for (int thread = 0; thread < threads; ++thread) in_bin += histograms[thread * kBins + bin];
        if (in_bin >= wanted) break;
        wanted -= in_bin;
      }
      const int width = above ? above - shift : 0;
      prefix = (prefix << width) | Bits(bin);
      above = shift;
    }
    // The last digit has 10 bits. Its histogram says how many weights of each thread's span equal the threshold.
    const int bin = int(prefix & ((Bits(1) << 10) - 1));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
      int64_t ties = wanted;
      for (int before = 0; before < thread; ++before) ties -= wanted ? histograms[before * kBins + bin] : 0;
      write_mask<T>(weights, mask, span_of(a.prunable, thread, threads), prefix, ties, new_mask);
    }
    __builtin_memcpy(a.thresholds + run, &prefix, sizeof(T));
  }
  __builtin_free(histograms);
}
