// BatchNorm, optionally followed by the sum with a residual and by ReLU, forward and backward. A task takes one channel
// of all blocks. A channel fits the L2 cache, so only the first pass over it reads main memory.

// Calls visit(block, row, whole) for every row of a map. In the first `whole` columns, all 16 samples are in the batch;
// the remaining columns have samples beyond the batch.
template <typename F>
inline void each_row(const Map& m, F visit) {
  for (int64_t block = 0; block < m.blocks; ++block) {
    const bool last = m.samples % kSamples != 0 && (m.flat || block == m.blocks - 1);
    const int64_t whole = !last ? m.width : m.flat ? m.width - 1 : 0;
    for (int64_t row = 0; row < m.height; ++row) visit(block, row, whole);
  }
}

template <typename T>
struct ChannelNorm {
  Vector<T> mean, scale, shift;  // out = (in - mean) * scale + shift
};

template <typename S, typename T = Compute<S>>
void batch_statistics(const Norm& a, int64_t channel, double& mean, double& variance) {
  const View<S> in(a.in);
  const double count = double(a.in.samples) * a.in.height * (a.in.flat ? 1 : a.in.width);
  const int64_t left = a.in.samples % kSamples;
  double total = 0;
  Vector<T> part{};
  int64_t rows = 0;
  const auto flush = [&] {
    total += sum<T>(part);
    part = Vector<T>{};
    rows = 0;
  };
  each_row(a.in, [&](int64_t block, int64_t row, int64_t whole) {
    const S* from = in.at(block, channel, row, 0);
    Vector<T> row_sum{};
    for (int64_t x = 0; x < whole; ++x) row_sum += load(from + x * kSamples);
    for (int64_t x = whole; x < a.in.width; ++x) row_sum += only<T>(load(from + x * kSamples), left);
    part += row_sum;
    if (++rows == 32) flush();
  });
  flush();
  mean = total / count;
  const Vector<T> middle = splat<T>(T(mean));
  total = 0;
  double drift = 0;  // the difference of the exact mean from the rounded mean, about which the squares are summed
  each_row(a.in, [&](int64_t block, int64_t row, int64_t whole) {
    const S* from = in.at(block, channel, row, 0);
    Vector<T> row_sum{};
    for (int64_t x = 0; x < whole; ++x) {
      const Vector<T> d = load(from + x * kSamples) - middle;
      row_sum += d * d;
    }
    for (int64_t x = whole; x < a.in.width; ++x) {
      const Vector<T> d = only<T>(load(from + x * kSamples) - middle, left);
      row_sum += d * d;
    }
    part += row_sum;
    if (++rows == 32) flush();
  });
  flush();
  drift = mean - double(T(mean));
  variance = total / count - drift * drift;
}

template <typename S, typename T = Compute<S>>
ChannelNorm<T> channel_norm(const Norm& a, int64_t channel) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const double rstd = 1 / __builtin_sqrt(double(static_cast<T*>(a.variance)[channel]) + a.eps);
  return {splat<T>(static_cast<T*>(a.mean)[channel]), splat<T>(T(rstd * (weight ? weight[channel] : T(1)))),
          splat<T>(bias ? bias[channel] : T(0))};
}

template <typename S, bool relu, bool residual, typename T = Compute<S>>
void norm_apply(const Norm& a, int64_t channel) {
  const View<S> in(a.in), out(a.out), add(residual ? a.residual : a.in);
  const ChannelNorm<T> n = channel_norm<S>(a, channel);
  each_row(a.in, [&](int64_t block, int64_t row, int64_t) {
    const S* from = in.at(block, channel, row, 0);
    const S* more = add.at(block, channel, row, 0);
    S* to = out.at(block, channel, row, 0);
    for (int64_t x = 0; x < a.in.width * kSamples; x += kSamples) {
      Vector<T> value = (load(from + x) - n.mean) * n.scale + n.shift;
      if constexpr (residual) value += load(more + x);
      if constexpr (relu) value = value < Vector<T>{} ? Vector<T>{} : value;
      store(to + x, value);
    }
  });
}

template <typename S>
void norm(const Norm& a, int threads) {
  using T = Compute<S>;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t channel = 0; channel < a.in.channels; ++channel) {
    if (a.batch) {
      double mean, variance;
      batch_statistics<S>(a, channel, mean, variance);
      static_cast<T*>(a.mean)[channel] = T(mean);
      static_cast<T*>(a.variance)[channel] = T(variance);
    }
    const bool residual = a.residual.data != nullptr;
    if (a.relu) residual ? norm_apply<S, true, true>(a, channel) : norm_apply<S, true, false>(a, channel);
    else residual ? norm_apply<S, false, true>(a, channel) : norm_apply<S, false, false>(a, channel);
  }
}

template <typename S, bool relu, bool residual, typename T = Compute<S>>
void norm_grad_channel(const NormGrad& a, int64_t channel) {
  const Norm& f = a.norm;
  const View<S> in(f.in), out(f.out), g(a.out_grad), to(a.in_grad), side(residual ? a.residual_grad : a.out_grad);
  const ChannelNorm<T> n = channel_norm<S>(f, channel);
  const int64_t W = f.in.width, left = f.in.samples % kSamples;
  // The gradient with respect to the input of ReLU. Without a residual, the sign of that input is recomputed, so that
  // the output needn't be read.
  const auto before = [&](const S* g_row, const S* out_row, const Vector<T>& centred, int64_t x) {
    Vector<T> gradient = load(g_row + x);
    if constexpr (relu && residual) gradient = load(out_row + x) > Vector<T>{} ? gradient : Vector<T>{};
    else if constexpr (relu) gradient = centred * n.scale + n.shift > Vector<T>{} ? gradient : Vector<T>{};
    return gradient;
  };
  double total = 0, total_centred = 0;
  Vector<T> part{}, part_centred{};
  int64_t rows = 0;
  const auto flush = [&] {
    total += sum<T>(part);
    total_centred += sum<T>(part_centred);
    part = part_centred = Vector<T>{};
    rows = 0;
  };
  each_row(f.in, [&](int64_t block, int64_t row, int64_t) {
    const S* in_row = in.at(block, channel, row, 0);
    const S* out_row = out.at(block, channel, row, 0);
    const S* g_row = g.at(block, channel, row, 0);
    S* side_row = side.at(block, channel, row, 0);
    Vector<T> row_sum{}, row_centred{};
    for (int64_t x = 0; x < W * kSamples; x += kSamples) {
      const Vector<T> centred = load(in_row + x) - n.mean;
      const Vector<T> gradient = before(g_row, out_row, centred, x);
      row_sum += gradient;
      row_centred += gradient * centred;
      if constexpr (residual) store(side_row + x, a.accumulate_residual ? load(side_row + x) + gradient : gradient);
    }
    part += row_sum;
    part_centred += row_centred;
    if (++rows == 32) flush();
  });
  flush();
  const double rstd = 1 / __builtin_sqrt(double(static_cast<T*>(f.variance)[channel]) + f.eps);
  if (a.weight_grad) static_cast<T*>(a.weight_grad)[channel] = T(total_centred * rstd);
  if (a.bias_grad) static_cast<T*>(a.bias_grad)[channel] = T(total);
  if (!a.in_grad.data) return;
  const double count = double(f.in.samples) * f.in.height * (f.in.flat ? 1 : f.in.width);
  const Vector<T> mean_gradient = splat<T>(f.batch ? T(total / count) : T(0));
  const Vector<T> slope = splat<T>(f.batch ? T(total_centred / count * rstd * rstd) : T(0));
  each_row(f.in, [&](int64_t block, int64_t row, int64_t whole) {
    const S* in_row = in.at(block, channel, row, 0);
    const S* out_row = out.at(block, channel, row, 0);
    const S* g_row = g.at(block, channel, row, 0);
    S* to_row = to.at(block, channel, row, 0);
    const auto gradient = [&](int64_t x) {
      const Vector<T> centred = load(in_row + x) - n.mean;
      return (before(g_row, out_row, centred, x) - mean_gradient - centred * slope) * n.scale;
    };
    const auto put = [&](int64_t x, Vector<T> value) {
      store(to_row + x, a.accumulate ? load(to_row + x) + value : value);
    };
    for (int64_t x = 0; x < whole * kSamples; x += kSamples) put(x, gradient(x));
    for (int64_t x = whole * kSamples; x < W * kSamples; x += kSamples) put(x, only<T>(gradient(x), left));
  });
}

template <typename S>
void norm_grad(const NormGrad& a, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t channel = 0; channel < a.norm.in.channels; ++channel) {
    const bool residual = a.norm.residual.data != nullptr;
    if (a.norm.relu) residual ? norm_grad_channel<S, true, true>(a, channel) : norm_grad_channel<S, true, false>(a, channel);
    else residual ? norm_grad_channel<S, false, true>(a, channel) : norm_grad_channel<S, false, false>(a, channel);
  }
}
