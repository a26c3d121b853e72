// A tile is 256 pixels of one lane: either whole rows of one picture, or several whole pictures. In shared memory, it
// has a border of one pixel; the tile with its border is called the halo. HEIGHT and WIDTH, the size of a picture, are
// macros and must be powers of two.
#pragma once

#include "matrix.h"

constexpr int kThreads = 256, kWarps = kThreads / 32, kPixels = 256, kTaps = 9;
constexpr int kRows = HEIGHT * WIDTH < kPixels ? HEIGHT : kPixels / WIDTH;  // rows of one picture in a tile
constexpr int kPictures = kPixels / (kRows * WIDTH);
constexpr int kHaloWidth = WIDTH + 2, kHaloRows = kRows + 2;
constexpr int kHaloPixels = kPictures * kHaloRows * kHaloWidth;
constexpr int kPad = 8;  // unused numbers after each row of shared memory, which put eight rows into different banks

struct Tile {
  int picture, row;  // the first picture and the first row of the tile
};

__device__ inline Tile tile_of(int number) {
  constexpr int per_picture = HEIGHT / kRows;
  return {number / per_picture * kPictures, number % per_picture * kRows};
}

// The index in the halo of a pixel's upper left neighbour, which the first tap reads.
__device__ inline int halo_place(int pixel) {
  const int x = pixel % WIDTH, y = pixel / WIDTH % kRows, picture = pixel / (WIDTH * kRows);
  return (picture * kHaloRows + y) * kHaloWidth + x;
}

// The scale and the offset of eight channels, by which BatchNorm and ReLU are applied while pixels are loaded.
struct Prologue {
  float scale[8], offset[8];
};

// Returns relu(v * scale + offset) for eight channels.
__device__ inline uint4 normalised(uint4 v, const Prologue& p) {
  const unsigned in[4] = {v.x, v.y, v.z, v.w};
  unsigned out[4];
  for (int i = 0; i < 4; ++i)
    out[i] = pack_relu(fmaf(low(in[i]), p.scale[2 * i], p.offset[2 * i]),
                       fmaf(high(in[i]), p.scale[2 * i + 1], p.offset[2 * i + 1]));
  return {out[0], out[1], out[2], out[3]};
}

// The number of rows of a halo that are loaded: the rows of the tile and, unless it holds whole pictures, one row above
// and one below.
constexpr int kBorder = kRows == HEIGHT ? 0 : 1, kLoadedRows = kRows + 2 * kBorder;

// Zeroes the halo. load_halo doesn't write the columns outside a picture, and for whole pictures it doesn't write the
// rows outside them either, so these stay zero.
template <int count>
__device__ inline void clear_halo(bfloat16* to) {
  for (int i = threadIdx.x; i < kHaloPixels * (count + kPad) / 8; i += kThreads)
    reinterpret_cast<uint4*>(to)[i] = {0, 0, 0, 0};
}

// Returns the prologue of the eight channels that this thread loads, out of the `count` channels that begin at `first`.
template <int count, bool prologue>
__device__ inline Prologue prologue_of(int first, const float* scale, const float* offset) {
  Prologue p{};
  if constexpr (prologue) {
    const int channel = first + threadIdx.x % (count / 8) * 8;
    for (int i = 0; i < 8; ++i) p.scale[i] = scale[channel + i], p.offset[i] = offset[channel + i];
  }
  return p;
}

// Loads a tile and the rows next to it into shared memory: the `count` channels that begin at `first`, after the
// prologue. Pixels outside the picture are zero, whether or not there is a prologue.
template <int count, bool prologue>
__device__ inline void load_halo(bfloat16* to, const bfloat16* lane, Tile tile, int samples, int channels, int first,
                                 const Prologue& p) {
  static_assert(kThreads % (count / 8) == 0);  // so a thread loads the same channels in each iteration
  constexpr int vectors = count / 8, loaded = kPictures * kLoadedRows * WIDTH * vectors;
  const int vector = threadIdx.x % vectors;
  const bfloat16* const from =
      lane + ((static_cast<long long>(tile.picture) * HEIGHT + tile.row - kBorder) * WIDTH) * channels + first + 8 * vector;
#pragma unroll
  for (int begin = 0; begin < loaded; begin += kThreads) {
    const int pixel = (begin + threadIdx.x) / vectors;
    if (loaded % kThreads && begin + kThreads > loaded && begin + threadIdx.x >= loaded) break;
    const int x = pixel % WIDTH, y = pixel / WIDTH % kLoadedRows, picture = pixel / (WIDTH * kLoadedRows);
    const int row = tile.row + y - kBorder;
    const int place = (picture * kHaloRows + y + 1 - kBorder) * kHaloWidth + x + 1;
    uint4 v{0, 0, 0, 0};
    if (kBorder ? row >= 0 && row < HEIGHT : tile.picture + picture < samples) {
      v = read_only(from + pixel * channels);
      if constexpr (prologue) v = normalised(v, p);
    }
    *reinterpret_cast<uint4*>(to + place * (count + kPad) + 8 * vector) = v;
  }
}
