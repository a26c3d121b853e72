// Vectors of 16 samples, the unit of every feature map. S is the storage type of a map, and T is the type of
// arithmetic.

struct bfloat16 {
  uint16_t bits;
};

template <typename S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<bfloat16> {
  using type = float;
};
template <typename S>
using Compute = typename ComputeOf<S>::type;

constexpr int64_t kSamples = 16;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kSamples * sizeof(T)), aligned(64)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

typedef uint16_t Halves __attribute__((vector_size(kSamples * 2), aligned(32)));
typedef uint32_t Words __attribute__((vector_size(kSamples * 4), aligned(64)));

template <typename S>
inline Vector<Compute<S>> load(const S* from) {
  if constexpr (sizeof(S) == 2) {
    Halves halves;
    __builtin_memcpy(&halves, __builtin_assume_aligned(from, 32), sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words) << 16;
    return (Vector<float>)words;
  } else {
    return *reinterpret_cast<const Vector<S>*>(from);
  }
}

// Stores a vector; numbers are rounded to bfloat16 to nearest, ties to even.
template <typename S>
inline void store(S* to, Vector<Compute<S>> value) {
  if constexpr (sizeof(S) == 2) {
    Words words = (Words)value;
    words += 0x7fff + ((words >> 16) & 1);
    const Halves halves = __builtin_convertvector(words >> 16, Halves);
    __builtin_memcpy(__builtin_assume_aligned(to, 32), &halves, sizeof(halves));
  } else {
    *reinterpret_cast<Vector<S>*>(to) = value;
  }
}

// Stores like `store`, but bypasses the caches if AVX-512 is available. It is for outputs that are larger than the
// caches.
template <typename S>
inline void stream(S* to, Vector<Compute<S>> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)value);
    return;
  }
#endif
  store(to, value);
}

template <typename T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <typename T>
inline T sum(Vector<T> v) {
  T total[8];
  for (int i = 0; i < 8; ++i) total[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) total[i] += total[i + 4];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// Keeps the first `count` of the 16 samples and sets the others to zero.
template <typename T>
inline Vector<T> only(Vector<T> v, int64_t count) {
  for (int64_t i = count; i < kSamples; ++i) v[i] = T(0);
  return v;
}

// Computes the addresses of a map's pixels; pitch, plane, block and origin are in elements.
template <typename S>
struct View {
  S* data;
  int64_t pitch, plane, block, origin;
  explicit View(const Map& m)
      : data(static_cast<S*>(m.data)),
        pitch((m.width + 2 * m.pad) * kSamples),
        plane((m.height + 2 * m.pad) * pitch),
        block(m.channels * plane),
        origin(m.pad * pitch + m.pad * kSamples) {}
  S* at(int64_t block_, int64_t channel, int64_t row, int64_t column) const {
    return data + block_ * block + channel * plane + origin + row * pitch + column * kSamples;
  }
};

// How many of the 16 samples of a vector are in the batch.
inline int64_t valid(const Map& m, int64_t block, int64_t column) {
  const int64_t left = m.samples - kSamples * (m.flat ? column : block);
  return left < kSamples ? left : kSamples;
}
