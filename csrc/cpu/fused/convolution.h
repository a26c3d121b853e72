// Convolution with the kept weights only: its forward pass, input gradient and weight gradient. For each group of
// output channels, a tile of pixels is computed as the sum of broadcast weights times shifted pixels of the input. A
// linear layer is a convolution whose pixels are the batch's blocks of samples.

// Adds the products of taps [begin, end) to accumulators [rows][height][width].
template <typename S, int rows, int height, int width, typename T = Compute<S>>
inline void accumulate_taps(const S* in, int64_t row_step, int64_t column_step, const int32_t* offsets, const T* values,
                            int64_t begin, int64_t end, Vector<T> (&sums)[rows][height][width]) {
  for (int64_t tap = begin; tap < end; ++tap) {
    const S* from = in + offsets[tap];
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x) {
        const Vector<T> pixel = load(from + y * row_step + x * column_step);
        for (int row = 0; row < rows; ++row) sums[row][y][x] += values[tap * rows + row] * pixel;
      }
  }
}

template <typename S>
struct ConvolveTile {
  const Convolve& a;
  View<S> in, out;
  int64_t block, phase, row, column;  // row and column count the pixels of this phase only
  int64_t begin_group, end_group;
};

template <typename S, int rows, int height, int width, bool unit_step>
void convolve_tile(const ConvolveTile<S>& t) {
  using T = Compute<S>;
  const Convolve& a = t.a;
  const int64_t column_step = unit_step ? kSamples : a.in_step * kSamples, row_step = a.in_step * t.in.pitch;
  const int64_t y = t.row * a.out_step + t.phase / a.out_step, x = t.column * a.out_step + t.phase % a.out_step;
  const S* from = t.in.at(t.block, 0, t.row * a.in_step, t.column * a.in_step);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t group = t.begin_group; group < t.end_group; ++group) {
    const int64_t first = group * rows;
    const int64_t list = t.phase * a.taps.groups + group;
    Vector<T> sums[rows][height][width];
    for (int row = 0; row < rows; ++row) {
      const Vector<T> start = bias && first + row < a.out.channels ? splat<T>(bias[first + row]) : Vector<T>{};
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) sums[row][i][j] = start;
    }
    accumulate_taps<S, rows, height, width>(from, row_step, column_step, a.taps.offsets,
                                            static_cast<const T*>(a.taps.values), a.taps.starts[list],
                                            a.taps.starts[list + 1], sums);
    for (int row = 0; row < rows; ++row) {
      if (first + row >= a.out.channels) break;
      S* to = t.out.at(t.block, first + row, y, x);
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < width; ++j) {
          S* place = to + i * a.out_step * t.out.pitch + j * a.out_step * kSamples;
          if (a.accumulate) store(place, load<S>(place) + sums[row][i][j]);
          else stream(place, sums[row][i][j]);
        }
    }
  }
}

// Computes a tile of height x width pixels, or at the right border a narrower tile of the `left` columns that remain.
template <typename S, int rows, int height, int width>
void convolve_width(const ConvolveTile<S>& t, int64_t left) {
  if (left >= width) {
    t.a.in_step == 1 ? convolve_tile<S, rows, height, width, true>(t) : convolve_tile<S, rows, height, width, false>(t);
  } else if constexpr (width > 1) {
    convolve_width<S, rows, height, width - 1>(t, left);
  }
}

// The number of pixels in a tile, which is chosen so that the accumulators fill the vector registers. With four rows, a
// tile has kTileOfFour pixels.
#if defined(__AVX512F__)
constexpr int kTile = 8, kTileOfFour = 4;
#else
constexpr int kTile = 4, kTileOfFour = 2;
#endif

template <int rows>
constexpr int kWidth = rows == 4 ? kTileOfFour : kTile;

// Prefetches the first row of every channel that the tile below will read. The channels are more streams than the
// hardware prefetcher can follow.
template <typename S>
inline void prefetch_below(const Convolve& a, const ConvolveTile<S>& t, int height, int width) {
  for (int64_t channel = 0; channel < a.in.channels; ++channel) {
    const S* row = t.in.at(t.block, channel, (t.row + height) * a.in_step + 1, t.column * a.in_step);
    for (int64_t x = 0; x < width * a.in_step; ++x) __builtin_prefetch(row + x * kSamples, 0, 2);
  }
}

template <typename S, int rows>
void convolve_rows(const Convolve& a, int threads) {
  constexpr int64_t kGroups = rows == 4 ? 8 : rows == 2 ? 16 : 32;  // groups per task: 32 channels leave enough tasks
  constexpr int width = kWidth<rows>;
  const int64_t parts = (a.taps.groups + kGroups - 1) / kGroups;
  const bool prefetches = a.taps.starts[a.taps.groups] > 4 * a.in.channels;  // otherwise it costs more than it saves
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < a.out.blocks * parts; ++task) {
    const int64_t part = task % parts, end = (part + 1) * kGroups;
    ConvolveTile<S> t{a, View<S>(a.in), View<S>(a.out), task / parts, 0, 0, 0, part * kGroups,
                      end < a.taps.groups ? end : a.taps.groups};
    for (t.phase = 0; t.phase < a.out_step * a.out_step; ++t.phase) {
      const int64_t H = (a.out.height - t.phase / a.out_step + a.out_step - 1) / a.out_step;
      const int64_t W = (a.out.width - t.phase % a.out_step + a.out_step - 1) / a.out_step;
      for (t.row = 0; t.row < H;) {
        // If two rows fit into a tile, it covers two rows, which fills the registers on narrow maps too.
        const int tall = 2 * W <= width && t.row + 1 < H ? 2 : 1;
        for (t.column = 0; t.column < W; t.column += tall == 2 ? width / 2 : width) {
          if (prefetches && t.phase == 0) prefetch_below(a, t, tall, width / tall);
          if (tall == 2) convolve_width<S, rows, 2, width / 2>(t, W - t.column);
          else convolve_width<S, rows, 1, width>(t, W - t.column);
        }
        t.row += tall;
      }
    }
  }
}

template <typename S>
void convolve(const Convolve& a, int threads) {
  if (a.taps.rows == 4) convolve_rows<S, 4>(a, threads);
  else if (a.taps.rows == 2) convolve_rows<S, 2>(a, threads);
  else convolve_rows<S, 1>(a, threads);
}

// Adds the weight gradients of one tile to the accumulators [taps, rows], which are vectors over the 16 samples of a
// block.
template <typename S, int rows, int height, int width, typename T = Compute<S>>
inline void weight_grad_tile(const S* in, int64_t row_step, int64_t column_step, const S* out_grad,
                             int64_t plane, int64_t pitch, int64_t outputs, const int32_t* offsets, int64_t begin,
                             int64_t end, Vector<T>* sums) {
  Vector<T> g[rows][height][width];
  for (int row = 0; row < rows; ++row)
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x)
        g[row][y][x] = row < outputs ? load(out_grad + row * plane + y * pitch + x * kSamples) : Vector<T>{};
  for (int64_t tap = begin; tap < end; ++tap, sums += rows) {
    const S* from = in + offsets[tap];
    Vector<T> total[rows];
    for (int row = 0; row < rows; ++row) total[row] = sums[row];
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x) {
        const Vector<T> pixel = load(from + y * row_step + x * column_step);
        for (int row = 0; row < rows; ++row) total[row] += g[row][y][x] * pixel;
      }
    for (int row = 0; row < rows; ++row) sums[row] = total[row];
  }
}

template <typename S>
struct WeightGradTile {
  const WeightGrad& a;
  View<S> in, out_grad;
  int64_t block, row, column, chunk;
  Vector<Compute<S>>* sums;
};

template <typename S, int rows, int height, int width>
void weight_grad_groups(const WeightGradTile<S>& t, int64_t left) {
  if constexpr (width > 1) {
    if (left < width) return weight_grad_groups<S, rows, height, width - 1>(t, left);
  }
  const WeightGrad& a = t.a;
  const S* in = t.in.at(t.block, 0, t.row * a.in_step, t.column * a.in_step);
  const int64_t first = a.chunks[t.chunk], offset = a.taps.starts[first];
  for (int64_t group = first; group < a.chunks[t.chunk + 1]; ++group) {
    const int64_t begin = a.taps.starts[group], end = a.taps.starts[group + 1];
    const int64_t channel = group * rows, outputs = a.out_grad.channels - channel;
    const S* g = t.out_grad.at(t.block, channel, t.row, t.column);
    const int64_t row_step = a.in_step * t.in.pitch;
    Vector<Compute<S>>* sums = t.sums + (begin - offset) * rows;
    if (a.in_step == 1)
      weight_grad_tile<S, rows, height, width>(in, row_step, kSamples, g, t.out_grad.plane, t.out_grad.pitch, outputs,
                                               a.taps.offsets, begin, end, sums);
    else
      weight_grad_tile<S, rows, height, width>(in, row_step, a.in_step * kSamples, g, t.out_grad.plane,
                                               t.out_grad.pitch, outputs, a.taps.offsets, begin, end, sums);
  }
}

template <typename S, int rows>
void weight_grad_rows(const WeightGrad& a, int threads) {
  using T = Compute<S>;
  constexpr int width = kWidth<rows>;
  const int64_t taps = a.taps.starts[a.taps.groups], H = a.out_grad.height, W = a.out_grad.width;
  T* const partial = static_cast<T*>(a.partial);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < a.parts * a.chunk_count; ++task) {
    const int64_t part = task / a.chunk_count, chunk = task % a.chunk_count;
    const int64_t begin = a.taps.starts[a.chunks[chunk]] * rows, end = a.taps.starts[a.chunks[chunk + 1]] * rows;
    Vector<T>* const sums = static_cast<Vector<T>*>(a.scratch) + this_thread() * a.scratch_size;
    for (int64_t i = 0; i < end - begin; ++i) sums[i] = Vector<T>{};
    WeightGradTile<S> t{a, View<S>(a.in), View<S>(a.out_grad), 0, 0, 0, chunk, sums};
    const int64_t last = (part + 1) * a.out_grad.blocks / a.parts;
    for (t.block = part * a.out_grad.blocks / a.parts; t.block < last; ++t.block)
      for (t.row = 0; t.row < H;) {
        const int tall = 2 * W <= width && t.row + 1 < H ? 2 : 1;
        for (t.column = 0; t.column < W; t.column += tall == 2 ? width / 2 : width) {
          if (tall == 2) weight_grad_groups<S, rows, 2, width / 2>(t, W - t.column);
          else weight_grad_groups<S, rows, 1, width>(t, W - t.column);
        }
        t.row += tall;
      }
    for (int64_t i = 0; i < end - begin; ++i) partial[part * taps * rows + begin + i] = sum<T>(sums[i]);
  }
  T* const grads = static_cast<T*>(a.grads);
#pragma omp parallel for num_threads(threads) schedule(static) if (taps * rows > 16384)
  for (int64_t i = 0; i < taps * rows; ++i) {
    T total = partial[i];
    for (int64_t part = 1; part < a.parts; ++part) total += partial[part * taps * rows + i];
    if (a.index[i] >= 0) grads[a.index[i]] = total;
  }
  if (a.bias_grad) {
    const View<S> g(a.out_grad);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t channel = 0; channel < a.out_grad.channels; ++channel) {
      T total = T(0);
      for (int64_t block = 0; block < a.out_grad.blocks; ++block) {
        Vector<T> plane{};
        for (int64_t y = 0; y < H; ++y)
          for (int64_t x = 0; x < W; ++x) plane += load(g.at(block, channel, y, x));
        total += sum<T>(plane);
      }
      static_cast<T*>(a.bias_grad)[channel] = total;
    }
  }
}

template <typename S>
void weight_grad(const WeightGrad& a, int threads) {
  if (a.taps.rows == 4) weight_grad_rows<S, 4>(a, threads);
  else if (a.taps.rows == 2) weight_grad_rows<S, 2>(a, threads);
  else weight_grad_rows<S, 1>(a, threads);
}

// Copies weights into the order in which taps read them.
template <typename S>
void gather(const void* weights, const int32_t* index, void* values, int64_t count, int threads) {
  using T = Compute<S>;
  const T* from = static_cast<const T*>(weights);
  T* to = static_cast<T*>(values);
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
  for (int64_t i = 0; i < count; ++i) to[i] = index[i] < 0 ? T(0) : from[index[i]];
}
