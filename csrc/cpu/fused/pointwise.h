// Elementwise operations (activations, additions, dropout) and concatenation.

// Calls visit(block, channel, row) for every row of a map; a parallel task takes one channel of one block.
template <typename F>
void each_plane(const Map& m, int threads, F visit) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < m.blocks * m.channels; ++task)
    for (int64_t row = 0; row < m.height; ++row) visit(task / m.channels, task % m.channels, row);
}

// The C library's functions, overloaded by the type of their argument. The templates of <cmath> are not used, because
// the linker would merge their instances for different instruction sets into one.
struct Maths {
  static float exp(float x) { return expf(x); }
  static double exp(double x) { return ::exp(x); }
  static float expm1(float x) { return expm1f(x); }
  static double expm1(double x) { return ::expm1(x); }
  static float log1p(float x) { return log1pf(x); }
  static double log1p(double x) { return ::log1p(x); }
  static float tanh(float x) { return tanhf(x); }
  static double tanh(double x) { return ::tanh(x); }
  static float erf(float x) { return erff(x); }
  static double erf(double x) { return ::erf(x); }
};

template <typename T>
T activation(int64_t kind, T x, T parameter) {
  switch (kind) {
    case kRelu: return x < 0 ? T(0) : x;
    case kLeakyRelu: return x > 0 ? x : x * parameter;
    case kElu: return x > 0 ? x : parameter * Maths::expm1(x);
    case kGelu: return x * T(0.5) * (1 + Maths::erf(x * T(M_SQRT1_2)));
    case kGeluTanh: return T(0.5) * x * (1 + Maths::tanh(T(M_SQRT2 * M_2_SQRTPI / 2) * (x + T(0.044715) * x * x * x)));
    case kSilu: return x / (1 + Maths::exp(-x));
    case kTanh: return Maths::tanh(x);
    case kSigmoid: return 1 / (1 + Maths::exp(-x));
    case kSoftplus: return x > 20 ? x : Maths::log1p(Maths::exp(x));
    case kHardswish: return x <= -3 ? T(0) : x >= 3 ? x : x * (x + 3) / 6;
    case kMish: return x * Maths::tanh(x > 20 ? x : Maths::log1p(Maths::exp(x)));
    default: return x;
  }
}

template <typename T>
T activation_slope(int64_t kind, T x, T parameter) {
  switch (kind) {
    case kRelu: return x > 0 ? T(1) : T(0);
    case kLeakyRelu: return x > 0 ? T(1) : parameter;
    case kElu: return x > 0 ? T(1) : parameter * Maths::exp(x);
    case kGelu: return T(0.5) * (1 + Maths::erf(x * T(M_SQRT1_2))) + x * T(M_2_SQRTPI * M_SQRT1_2 / 2) * Maths::exp(-x * x / 2);
    case kGeluTanh: {
      const T c = T(M_SQRT2 * M_2_SQRTPI / 2), t = Maths::tanh(c * (x + T(0.044715) * x * x * x));
      return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * c * (1 + 3 * T(0.044715) * x * x);
    }
    case kSilu: {
      const T s = 1 / (1 + Maths::exp(-x));
      return s * (1 + x * (1 - s));
    }
    case kTanh: {
      const T t = Maths::tanh(x);
      return 1 - t * t;
    }
    case kSigmoid: {
      const T s = 1 / (1 + Maths::exp(-x));
      return s * (1 - s);
    }
    case kSoftplus: return x > 20 ? T(1) : 1 / (1 + Maths::exp(-x));
    case kHardswish: return x <= -3 ? T(0) : x >= 3 ? T(1) : (2 * x + 3) / 6;
    case kMish: {
      const T s = 1 / (1 + Maths::exp(-x)), t = Maths::tanh(x > 20 ? x : Maths::log1p(Maths::exp(x)));
      return t + x * (1 - t * t) * s;
    }
    default: return T(1);
  }
}

template <typename S>
void pointwise(const Pointwise& a, int threads) {
  using T = Compute<S>;
  const View<S> in(a.in), out(a.out);
  each_plane(a.in, threads, [&](int64_t block, int64_t channel, int64_t row) {
    const S* from = in.at(block, channel, row, 0);
    S* to = out.at(block, channel, row, 0);
    for (int64_t x = 0; x < a.in.width * kSamples; x += kSamples) {
      Vector<T> value = load(from + x);
      if (a.kind == kRelu) value = value < Vector<T>{} ? Vector<T>{} : value;
      else for (int64_t i = 0; i < kSamples; ++i) value[i] = activation<T>(a.kind, value[i], T(a.parameter));
      store(to + x, value);
    }
  });
}

template <typename S>
void pointwise_grad(const Pointwise& a, int threads) {
  using T = Compute<S>;
  const View<S> in(a.in), in_grad(a.in_grad), out_grad(a.out_grad);
  each_plane(a.in, threads, [&](int64_t block, int64_t channel, int64_t row) {
    const S* from = in.at(block, channel, row, 0);
    const S* g = out_grad.at(block, channel, row, 0);
    S* to = in_grad.at(block, channel, row, 0);
    for (int64_t x = 0; x < a.in.width * kSamples; x += kSamples) {
      Vector<T> value = load(from + x), gradient = load(g + x);
      if (a.kind == kRelu) gradient = value > Vector<T>{} ? gradient : Vector<T>{};
      else
        for (int64_t i = 0; i < kSamples; ++i)  // samples beyond the batch keep a zero gradient even if the slope is NaN
          gradient[i] = gradient[i] == 0 ? T(0) : gradient[i] * activation_slope<T>(a.kind, value[i], T(a.parameter));
      store(to + x, a.accumulate ? load(to + x) + gradient : gradient);
    }
  });
}

template <typename S>
void channels(const Channels& a, int threads) {
  const View<S> from(a.from), to(a.to);
  Map part = a.from;
  part.channels = a.count;
  each_plane(part, threads, [&](int64_t block, int64_t channel, int64_t row) {
    const S* source = from.at(block, a.from_channel + channel, row, 0);
    S* target = to.at(block, a.to_channel + channel, row, 0);
    for (int64_t x = 0; x < a.from.width * kSamples; x += kSamples)
      store(target + x, a.accumulate ? load(target + x) + load(source + x) : load(source + x));
  });
}

template <typename S>
void multiply(const Multiply& a, int threads) {
  const View<S> in(a.in), factor(a.factor), out(a.out);
  each_plane(a.in, threads, [&](int64_t block, int64_t channel, int64_t row) {
    const S* from = in.at(block, channel, row, 0);
    const S* by = factor.at(block, channel, row, 0);
    S* to = out.at(block, channel, row, 0);
    for (int64_t x = 0; x < a.in.width * kSamples; x += kSamples) {
      const Vector<Compute<S>> value = load(from + x) * load(by + x);
      store(to + x, a.accumulate ? load(to + x) + value : value);
    }
  });
}
