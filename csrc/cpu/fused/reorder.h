// Copies between PyTorch tensors, spatial maps and flat maps.

template <typename S>
void flatten(const Flatten& a, int threads) {
  const View<S> spatial(a.spatial), flat(a.flat);
  const int64_t H = a.spatial.height, W = a.spatial.width;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t feature = 0; feature < a.flat.channels; ++feature)
    for (int64_t block = 0; block < a.spatial.blocks; ++block) {
      S* pixel = spatial.at(block, feature / (H * W), feature / W % H, feature % W);
      S* entry = flat.at(0, feature, 0, block);
      S *from = a.back ? entry : pixel, *to = a.back ? pixel : entry;
      store(to, a.accumulate ? load(to) + load(from) : load(from));
    }
}

template <typename S, bool into_map>
void repack(const Pack& a, int threads) {
  using T = Compute<S>;
  const Map& m = a.map;
  const View<S> view(m);
  T* const tensor = static_cast<T*>(a.tensor);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < m.blocks * m.channels; ++task) {
    const int64_t block = task / m.channels, channel = task % m.channels;
    for (int64_t y = 0; y < m.height; ++y)
      for (int64_t x = 0; x < m.width; ++x) {
        const int64_t count = valid(m, block, x), first = kSamples * (m.flat ? x : block);
        T* place = tensor + first * a.sample_stride + channel * a.channel_stride;
        if (!m.flat) place += y * a.row_stride + x * a.column_stride;
        S* entry = view.at(block, channel, y, x);
        if constexpr (into_map) {
          Vector<T> value{};
          for (int64_t i = 0; i < count; ++i) value[i] = place[i * a.sample_stride];
          store(entry, value);
        } else {
          const Vector<T> value = load(entry);
          for (int64_t i = 0; i < count; ++i) place[i * a.sample_stride] = value[i];
        }
      }
  }
}

template <typename S>
void pack(const Pack& a, int threads) { repack<S, true>(a, threads); }

template <typename S>
void unpack(const Pack& a, int threads) { repack<S, false>(a, threads); }
