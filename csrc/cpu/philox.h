// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The counter is
// (block, time, stream, purpose), and the key is the 64-bit seed. Word j of a stream is word j % 4 of block j / 4.

struct Words {
  uint32_t w[4];
};

inline Words philox_block(int64_t seed, int64_t stream, int64_t time, uint32_t purpose, uint32_t block) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(time), c2 = static_cast<uint32_t>(stream), c3 = purpose;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

void philox(const Philox& a, int threads) {
  // Computes 64 blocks at a time, so that the ten rounds run on full vectors.
  constexpr int64_t kBlocks = 64;
  const int64_t blocks = (a.count + 3) / 4;
  const int64_t groups = (blocks + kBlocks - 1) / kBlocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.lanes * groups; ++item) {
    const int64_t lane = item / groups, first = item % groups * kBlocks;
    const int64_t* key = a.keys + lane * 3;
    uint32_t* out = a.words + lane * a.count;
    uint32_t words[4][kBlocks];
    for (int64_t i = 0; i < kBlocks; ++i) {
      const Words w = philox_block(key[0], key[1], key[2], a.purpose, static_cast<uint32_t>(first + i));
      for (int k = 0; k < 4; ++k) words[k][i] = w.w[k];
    }
    const int64_t begin = first * 4, end = begin + kBlocks * 4 < a.count ? begin + kBlocks * 4 : a.count;
    for (int64_t j = begin; j < end; ++j) out[j] = words[(j - begin) % 4][(j - begin) / 4];
  }
}
