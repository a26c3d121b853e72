// The mean of the weights over the lanes of each run, summed in float64 in the order of the lanes.

template <typename T>
void particle_mean(const ParticleMean<T>& a, int threads) {
  constexpr int64_t kBlock = 1024;
  const int64_t blocks = (a.parameters + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.runs * blocks; ++item) {
    const int64_t run = item / blocks, begin = item % blocks * kBlock;
    const int64_t count = begin + kBlock < a.parameters ? kBlock : a.parameters - begin;
    double sum[kBlock] = {};
    int64_t particles = 0;
    for (int64_t lane = 0; lane < a.lanes; ++lane) {
      if (a.run_of_lane[lane] != run) continue;
      const T* w = a.weights + lane * a.weights_stride + begin;
      for (int64_t i = 0; i < count; ++i) sum[i] += double(w[i]);
      ++particles;
    }
    T* out = a.mean + run * a.mean_stride + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = T(sum[i] / double(particles));
  }
}
