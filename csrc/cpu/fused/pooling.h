// Max and average pooling. A window is a range of rows and a range of columns. The maximum of a window with a NaN is
// NaN.

template <typename S>
void pool(const Pool& a, int threads) {
  using T = Compute<S>;
  const View<S> in(a.in), out(a.out);
  each_plane(a.out, threads, [&](int64_t block, int64_t channel, int64_t row) {
    for (int64_t column = 0; column < a.out.width; ++column) {
      const int64_t *ys = a.rows + 2 * row, *xs = a.columns + 2 * column;
      Vector<T> value{};
      if (a.divisors) {
        for (int64_t y = ys[0]; y < ys[1]; ++y)
          for (int64_t x = xs[0]; x < xs[1]; ++x) value += load(in.at(block, channel, y, x));
        value /= splat<T>(T(a.divisors[row * a.out.width + column]));
      } else {
        value = load(in.at(block, channel, ys[0], xs[0]));
        for (int64_t y = ys[0]; y < ys[1]; ++y)
          for (int64_t x = xs[0]; x < xs[1]; ++x) {
            const Vector<T> pixel = load(in.at(block, channel, y, x));
            value = (pixel > value) | (pixel != pixel) ? pixel : value;
          }
      }
      store(out.at(block, channel, row, column), value);
    }
  });
}

template <typename S>
void pool_grad(const Pool& a, int threads) {
  using T = Compute<S>;
  const View<S> in(a.in), out(a.out), in_grad(a.in_grad), out_grad(a.out_grad);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < a.in.blocks * a.in.channels; ++task) {
    const int64_t block = task / a.in.channels, channel = task % a.in.channels;
    if (!a.accumulate)
      for (int64_t y = 0; y < a.in.height; ++y)
        for (int64_t x = 0; x < a.in.width; ++x) store(in_grad.at(block, channel, y, x), Vector<T>{});
    for (int64_t row = 0; row < a.out.height; ++row)
      for (int64_t column = 0; column < a.out.width; ++column) {
        const int64_t *ys = a.rows + 2 * row, *xs = a.columns + 2 * column;
        Vector<T> gradient = load(out_grad.at(block, channel, row, column));
        const Vector<T> largest = load(out.at(block, channel, row, column));
        if (a.divisors) gradient /= splat<T>(T(a.divisors[row * a.out.width + column]));
        for (int64_t y = ys[0]; y < ys[1]; ++y)
          for (int64_t x = xs[0]; x < xs[1]; ++x) {
            S* to = in_grad.at(block, channel, y, x);
            if (a.divisors) {
              store(to, load(to) + gradient);
            } else {  // the first pixel that equals the maximum gets the whole gradient
              const auto is_first = load(in.at(block, channel, y, x)) == largest;
              store(to, load(to) + (is_first ? gradient : Vector<T>{}));
              gradient = is_first ? Vector<T>{} : gradient;
            }
          }
      }
  }
}
