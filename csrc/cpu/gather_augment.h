// Gathers pictures by index. Each picture is padded with black, cropped and flipped at random, and standardised by a
// table.

// Writes one picture: the crop whose pixel (y, x) is the picture's pixel (y + dy, x + dx), mirrored if `flip` is set.
template <typename T, typename Source>
void gather_picture(const GatherAugment<T>& a, const Source* picture, T* out, int64_t dy, int64_t dx, bool flip) {
  const int64_t row_step = a.channels_last ? a.width * a.channels : a.width;
  const int64_t pixel_step = a.channels_last ? a.channels : 1;
  const int64_t channel_step = a.channels_last ? 1 : a.height * a.width;
  for (int64_t y = 0; y < a.height; ++y) {
    const int64_t from_y = y + dy;
    for (int64_t c = 0; c < a.channels; ++c) {
      T* row = out + c * channel_step + y * row_step;
      const T* table = a.table ? a.table + c * 256 : nullptr;
      const T black = table ? table[0] : T(0);
      for (int64_t x = 0; x < a.width; ++x) {
        const int64_t from_x = (flip ? a.width - 1 - x : x) + dx;
        const bool inside = from_y >= 0 && from_y < a.height && from_x >= 0 && from_x < a.width;
        T value = black;
        if (inside) {
          const Source source = picture[(from_y * a.width + from_x) * a.channels + c];
          if constexpr (sizeof(Source) == 1) value = table[source];
          else value = source;
        }
        row[x * pixel_step] = value;
      }
    }
  }
}

template <typename T, typename Source>
void gather_pictures(const GatherAugment<T>& a, int threads) {
  const int64_t size = a.height * a.width * a.channels;
  const Source* images = static_cast<const Source*>(a.images);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.lanes * a.batch; ++item) {
    const int64_t* key = a.keys + item / a.batch * 3;
    int64_t dy = 0, dx = 0;
    bool flip = false;
    if (a.pad > 0 || a.flip) {
      const Words draw = philox_block(key[0], key[1], key[2], kCropFlip, static_cast<uint32_t>(a.samples[item]));
      const uint64_t places = static_cast<uint64_t>(2 * a.pad + 1);
      dy = static_cast<int64_t>(draw.w[0] * places >> 32) - a.pad;
      dx = static_cast<int64_t>(draw.w[1] * places >> 32) - a.pad;
      flip = a.flip && draw.w[2] >> 31;
    }
    gather_picture<T, Source>(a, images + a.index[item] * size, a.out + item * size, dy, dx, flip);
  }
}

template <typename T>
void gather_augment(const GatherAugment<T>& a, int threads) {
  if (a.table) gather_pictures<T, uint8_t>(a, threads);
  else gather_pictures<T, T>(a, threads);
}
