// conv_lstm_1x1 on AMX, see loops.inl for what is computed: bfloat16 data, and float32 data as bfloat16 or as two
// bfloat16 parts (precision "medium" and "high").
//
// A tile of kTile pixels runs through all steps as elsewhere. [x, h] and the weights are kept as tiles of AMX, each on
// 1024 bytes in a row; a product takes 32 pixels by two gates of 16 channels in four tiles, stores them and does the
// other two gates. The gate stage of one block of channels runs between the tile products of the next, since vectors
// and tiles have units of their own.
//
// Blocks of 32 pixels are the outer loop: theirs of [x, h] stays in the first-level cache while the weights stream past
// from the second.

#include "conv_lstm_1x1/loops.inl"

// Channels of x and h side by side, each in whole depths of a tile, and how many tiles deep that is.
struct TileRows {
  int64_t x, xh, steps;
  int64_t blocks;  // of 16 channels of h
};
EVKERNELS_INLINE TileRows tile_rows(const ConvLstmShape& s) {
  const int64_t x = round_up(s.inputs, kTileDepth), xh = x + round_up(s.channels, kTileDepth);
  return {x, xh, xh / kTileDepth, round_up(s.channels, kTileRows) / kTileRows};
}

// Where the value of a pixel and a channel is in rows kept as tiles.
EVKERNELS_INLINE int64_t in_tiles(int64_t pixel, int64_t channel, int64_t channels) {
  return (pixel / kTileRows * (channels / kTileDepth) + channel / kTileDepth) * kTileSize +
         pixel % kTileRows * kTileDepth + channel % kTileDepth;
}

// 16 rows of 16 from [row, column], columns side by side in memory; zero behind `rows` and `columns`.
template <class T>
EVKERNELS_INLINE void load_square(VecF (&square)[16], const T* __restrict__ from, int64_t stride, int64_t rows,
                                  int64_t columns) {
  if (rows >= 16 && columns >= 16) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) square[k] = load(from + k * stride);
  } else {
    for (int k = 0; k < 16; ++k) square[k] = k < rows ? load_columns(from + k * stride, columns) : VecF{};
  }
}

// 16 pixels of 16 channels of a frame, rows are pixels or channels.
template <bool rows_are_pixels, class T>
EVKERNELS_INLINE void load_pixels(VecF (&square)[16], const T* __restrict__ frame, int64_t channels, const Tile& tile,
                                  int64_t p, int64_t c) {
  if (tile.channels_last) {
    load_square(square, frame + (tile.first + p) * channels + c, channels, tile.count - p, channels - c);
  } else {
    load_square(square, frame + c * tile.pixels + tile.first + p, tile.pixels, channels - c, tile.count - p);
  }
  if (tile.channels_last != rows_are_pixels) transpose(square);
}

// Channels of a frame into rows kept as tiles, from column `first` of `width` on.
template <int parts, class T>
static void load_rows(const T* __restrict__ frame, int64_t channels, const Tile& tile, BFloat16* __restrict__ to,
                      int64_t first, int64_t width) {
  for (int64_t p = 0; p < tile.count; p += 16) {
    for (int64_t c = 0; c < channels; c += 16) {
      VecF square[16];
      load_pixels<true>(square, frame, channels, tile, p, c);
      BFloat16* const at = to + in_tiles(p, first + c, width);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) store_parts<parts>(at + k * kTileDepth, kTile * width, square[k]);
    }
  }
}

static void zero_tile_rows(BFloat16* rows, int64_t first, int64_t last, int64_t width) {
  for (int64_t p = 0; p < kTile; ++p) {
    for (int64_t c = first; c < last; c += 16) __builtin_memset(rows + in_tiles(p, c, width), 0, 32);
  }
}

// The 16 pairs [k, k + 1] of one row of a matrix, columns [begin, end) of it, as one vector of one part.
template <class T>
EVKERNELS_INLINE VecF load_pairs(const T* __restrict__ from, int64_t count, int part) {
  VecF values[2];
  for (int half = 0; half < 2; ++half) {
    values[half] = count > 16 * half ? load_columns(from + 16 * half, count - 16 * half) : VecF{};
    if (part) values[half] -= to_float(to_bfloat16(values[half]));
  }
  return (VecF)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
}

// Values of BFloat16 in the packed weights, and with the bias as float [blocks, 4, 16] behind them.
template <int parts>
static int64_t amx_weights_size(const ConvLstmShape& s) {
  const TileRows rows = tile_rows(s);
  return rows.blocks * parts * rows.steps * 4 * kTileSize;
}
template <int parts>
static int64_t amx_packed_size(const ConvLstmShape& s) {
  return amx_weights_size<parts>(s) + tile_rows(s).blocks * 4 * 16 * 2;
}

// The weights as tiles [block of channels, gates i f | g o, part, depth, gate of the two].
template <int parts, class T>
static void amx_pack(const T* __restrict__ weight, const T* __restrict__ bias, BFloat16* __restrict__ packed,
                     const ConvLstmShape& s) {
  const TileRows rows = tile_rows(s);
  float* const packed_bias = (float*)(packed + amx_weights_size<parts>(s));
  BFloat16* to = packed;
  for (int64_t block = 0; block < rows.blocks; ++block) {
    const int64_t c = block * kTileRows, columns = s.channels - c;
    for (int gate = 0; gate < 4; ++gate) {
      const VecF values = bias ? load_columns(bias + first_row(s, gate) + c, columns) : VecF{};
      store(packed_bias + (block * 4 + gate) * 16, values);
    }
    for (int pair = 0; pair < 2; ++pair) {
      for (int part = 0; part < parts; ++part) {
        for (int64_t k = 0; k < rows.xh; k += kTileDepth) {
          const int64_t column = k < rows.x ? k : k - rows.x + s.inputs;
          const int64_t count = (k < rows.x ? s.inputs : s.inputs + s.channels) - column;
          for (int gate = 2 * pair; gate < 2 * pair + 2; ++gate, to += kTileSize) {
            VecF square[16];
            for (int n = 0; n < 16; ++n) {
              const T* const row = weight + (first_row(s, gate) + c + n) * (s.inputs + s.channels);
              square[n] = n < columns ? load_pairs(row + column, count, part) : VecF{};
            }
            transpose(square);
            for (int n = 0; n < 16; ++n) store((float*)to + n * 16, square[n]);
          }
        }
      }
    }
  }
}

constexpr int64_t kBlock = 32;  // pixels of a product
struct alignas(64) GateSums {
  float values[kBlock][4][16];
};

// The pre-activations, still without bias, of kBlock pixels for one block of channels. Calls `between` 2 * rows.steps
// times.
template <int parts, class Between>
EVKERNELS_INLINE void tile_gates(const TileFactor& left, const BFloat16* packed, int64_t block, const TileRows& rows,
                                 GateSums& sums, Between between) {
#pragma GCC unroll 1
  for (int pair = 0; pair < 2; ++pair) {
    const BFloat16* const first = packed + (2 * block + pair) * parts * rows.steps * 2 * kTileSize;
    const TileFactor right = {first, kTileSize, 2 * kTileSize, rows.steps * 2 * kTileSize, 64};
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    add_tile_product<parts>(left, right, rows.steps, between);
    float* const to = &sums.values[0][2 * pair][0];
    store_tile_rows<0>(to, 256);
    store_tile_rows<1>(to + 16, 256);
    store_tile_rows<2>(to + 16 * 64, 256);
    store_tile_rows<3>(to + 16 * 64 + 16, 256);
  }
}

// Computes the gates of blocks [begin, end) of channels for kBlock pixels and calls finish(block, pixel, sums) for
// every second pixel of each, during the products of the next block.
template <int parts, class Finish>
EVKERNELS_INLINE void for_each_block(const BFloat16* xh, const BFloat16* packed, const TileRows& rows, int64_t begin,
                                     int64_t end, Finish finish) {
  const TileFactor left = {xh, kTileRows * rows.xh, kTileSize, kTile * rows.xh, 64};
  const int64_t share = (kBlock / 2 + 2 * rows.steps - 1) / (2 * rows.steps) * 2;
  GateSums sums[2];
  if (begin < end) tile_gates<parts>(left, packed, begin, rows, sums[begin % 2], []() EVKERNELS_LOOP_BODY {});
  for (int64_t block = begin; block < end; ++block) {
    int64_t pixel = 0;
    const auto finish_some = [&]() EVKERNELS_LOOP_BODY {
      const int64_t last = smaller(pixel + share, kBlock);
      for (; pixel < last; pixel += 2) finish(block, pixel, sums[block % 2]);
    };
    if (block + 1 < end) {
      tile_gates<parts>(left, packed, block + 1, rows, sums[(block + 1) % 2], finish_some);
    }
    for (; pixel < kBlock; pixel += 2) finish(block, pixel, sums[block % 2]);
  }
}

// The part of a vector that belongs to channels; the rest is zero, lest what infinity and zero make of it spread.
EVKERNELS_INLINE VecF only_columns(VecF v, int64_t columns) {
  return columns >= 16 ? v : (VecF)_mm512_maskz_mov_ps((__mmask16)((1u << columns) - 1), (__m512)v);
}

struct Activated {
  VecF i, f, g, o;
};
// The gates of one pixel, activated.
template <class T>
EVKERNELS_INLINE Activated activate(const GateSums& sums, int64_t pixel, const float* bias) {
  const float* const from = &sums.values[pixel][0][0];
  return {sigmoid_for<T>(load(from) + load(bias)), sigmoid_for<T>(load(from + 16) + load(bias + 16)),
          tanh_for<T>(load(from + 32) + load(bias + 32)), sigmoid_for<T>(load(from + 48) + load(bias + 48))};
}

// Bytes that each thread needs: c, [x, h] of two steps, and h.
template <int parts>
static int64_t amx_buffer_size(const ConvLstmShape& s) {
  const TileRows rows = tile_rows(s);
  return kTile * (2 * parts * rows.xh * 2 + 2 * rows.blocks * 16 * 4);
}

template <int parts, class T, class S>
static void amx_forward(const ConvLstmForward<T, S>& d, const BFloat16* packed, void* memory, const ConvLstmShape& s,
                        int64_t begin, int64_t end) {
  const Tiles tiles;
  const TileRows rows = tile_rows(s);
  const int64_t width = rows.blocks * 16, frame_x = s.inputs * s.pixels, frame_h = s.channels * s.pixels;
  const float* const bias = (const float*)(packed + amx_weights_size<parts>(s));
  float* const cell = (float*)memory;
  T* const h_rows = (T*)(cell + kTile * width);
  BFloat16* const first_xh = (BFloat16*)(cell + 2 * kTile * width);
  const int64_t low = kTile * rows.xh;
  BFloat16* const xh[2] = {first_xh, first_xh + parts * low};
  // What pads the channels stays zero.
  __builtin_memset(first_xh, 0, 2 * parts * low * sizeof(BFloat16));
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / tiles_of_frame(s), first = (index - sample * tiles_of_frame(s)) * kTile;
    const Tile tile = {s.pixels, first, smaller(kTile, s.pixels - first), s.channels_last};
    load_rows<parts>(d.h + sample * frame_h, s.channels, tile, xh[0], rows.x, rows.xh);
    load_tile(d.c + sample * frame_h, s.channels, tile, cell, width);
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t frame = t * s.batch + sample;
      BFloat16 *const now = xh[t % 2], *const next = xh[(t + 1) % 2];
      load_rows<parts>(d.x + frame * frame_x, s.inputs, tile, now, 0, rows.xh);
      if (d.reset && d.reset[frame]) {
        for (int part = 0; part < parts; ++part) zero_tile_rows(now + part * low, rows.x, rows.xh, rows.xh);
        zero_rows(cell, width, width, tile.count);
      }
      const int64_t at = frame * frame_h + first * s.channels;
      T* const h_to = s.channels_last ? d.output + at : h_rows;
      const int64_t h_stride = s.channels_last ? s.channels : width;
      S* const cells = d.cells ? d.cells + at : nullptr;
      T* const gates = d.gates ? d.gates + (frame * s.pixels + first) * 4 * s.kept : nullptr;
      for (int64_t p = 0; p < tile.count; p += kBlock) {
        const auto finish = [&](int64_t block, int64_t pixel, const GateSums& sums) EVKERNELS_LOOP_BODY {
          const int64_t c = block * 16, columns = s.channels - c;
#pragma GCC unroll 2
          for (int64_t m = pixel; m < pixel + 2; ++m) {
            const int64_t q = p + m;
            const auto a = activate<T>(sums, m, bias + 4 * c);
            float* const state = cell + q * width + c;
            const VecF before = load(state);
            const VecF c_next = only_columns(rounded<S>(multiply_add(a.i, a.g, a.f * before)), columns);
            const VecF h = only_columns(a.o * tanh_for<T>(c_next), columns);
            store(state, c_next);
            store_parts<parts>(next + in_tiles(q, rows.x + c, rows.xh), low, h);
            if (q >= tile.count) continue;
            store_columns(h_to + q * h_stride + c, h, h_stride - c);
            if (cells) store_columns(cells + q * s.channels + c, before, columns);
            if (gates && c < s.kept) {
              T* const kept = gates + q * 4 * s.kept + c;
              store(kept, a.i);
              store(kept + s.kept, a.f);
              store(kept + 2 * s.kept, a.g);
              store(kept + 3 * s.kept, a.o);
            }
          }
        };
        for_each_block<parts>(now + in_tiles(p, 0, rows.xh), packed, rows, 0, rows.blocks, finish);
      }
      if (!s.channels_last) store_tile(d.output + frame * frame_h, s.channels, tile, h_rows, width);
    }
    store_tile(d.c_last + sample * frame_h, s.channels, tile, cell, width);
  }
}

#include "conv_lstm_1x1/amx_backward.inl"
