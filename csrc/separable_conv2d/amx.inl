// The channels_last forward of separable_conv2d on tiles of bfloat16, see loops.inl. Compiled once, for AMX.
//
// The depthwise result is formed and activated in float32, then rounded to bfloat16, as the pointwise convolution of
// plain PyTorch takes it; the product adds up in float32. 64 pixels by the product's depth are a left factor that stays
// in the first-level cache beside one pair of tiles of the weights.

#include "separable_conv2d/products.inl"

#include "separable_conv2d/channels_last.inl"

constexpr int64_t kPixelsTiles = 64, kTileOutputs = 2 * kTileRows;

// Steps of depth, and pairs of tiles of outputs, of the packed weights.
EVKERNELS_INLINE int64_t tile_steps(const SeparableShape& s) { return (s.channels + kTileDepth - 1) / kTileDepth; }
EVKERNELS_INLINE int64_t tile_pairs(const SeparableShape& s) { return (s.outputs + kTileOutputs - 1) / kTileOutputs; }

static int64_t separable_conv2d_tile_weights_size(const SeparableShape& s) {
  return tile_pairs(s) * 2 * tile_steps(s) * kTileSize;
}
static int64_t separable_conv2d_tile_tasks(const SeparableShape& s) {
  return (s.batch * s.out_height * s.out_width + kPixelsTiles - 1) / kPixelsTiles;
}

// The pointwise weight as tiles [outputs / 16][depth / 32], of 16 pairs of channels by 16 outputs.
static void separable_conv2d_pack_tiles(const BFloat16* __restrict__ pointwise, BFloat16* __restrict__ tiles,
                                        const SeparableShape& s) {
  const int64_t C = s.channels, steps = tile_steps(s);
  __builtin_memset(tiles, 0, separable_conv2d_tile_weights_size(s) * sizeof(BFloat16));
  for (int64_t o = 0; o < s.outputs; ++o) {
    BFloat16* const to = tiles + o / kTileRows * steps * kTileSize + o % kTileRows * 2;
    for (int64_t c = 0; c + 1 < C; c += 2) __builtin_memcpy(to + c * kTileRows, pointwise + o * C + c, 4);
    if (C % 2) to[(C - 1) * kTileRows] = pointwise[o * C + C - 1];
  }
}

// to = activation(from), rounded, [count, columns] from rows at a pitch of their own.
template <Activation kind>
EVKERNELS_INLINE void round_rows(const float* __restrict__ from, int64_t from_pitch, const float* __restrict__ bias,
                                 BFloat16* __restrict__ to, int64_t to_pitch, int64_t count, int64_t columns) {
  for (int64_t m = 0; m < count; ++m, from += from_pitch, to += to_pitch) {
    for (int64_t c = 0; c < columns; c += EVKERNELS_LANES) {
      const VecF value = activate<kind>(bias ? load(from + c) + load(bias + c) : load(from + c));
      const VecBFloat16 rounded = to_bfloat16(value);
      const int64_t left = smaller(columns - c, EVKERNELS_LANES);
      _mm256_mask_storeu_epi16(to + c, (__mmask16)((1u << left) - 1), (__m256i)rounded.bits);
    }
  }
}

// Tasks [begin, end) of kPixelsTiles output pixels each.
static void separable_conv2d_tiles_last(const BFloat16* __restrict__ x, float* packed, const BFloat16* weights,
                                        BFloat16* __restrict__ y, const SeparableShape& s, int64_t begin, int64_t end,
                                        float* buffer) {
  const Packed<float> p = packed_at<BFloat16>(packed, s);
  const int64_t O = s.outputs, pixels = s.batch * s.out_height * s.out_width;
  const int64_t steps = tile_steps(s), depth = steps * kTileDepth;
  float* const sums = buffer + kPixelsTiles * p.pitch;
  BFloat16* const a = (BFloat16*)(sums + kTileOutputs * kTileOutputs);
  __builtin_memset(a, 0, kPixelsTiles * depth * sizeof(BFloat16));
  const Tiles tiles;
  for (int64_t first = begin * kPixelsTiles; first < smaller(end * kPixelsTiles, pixels); first += kPixelsTiles) {
    const int64_t count = smaller(kPixelsTiles, pixels - first);
    depthwise_last(x, p, buffer, s, first, count);
    with_activation(s.activation, [&](auto kind) __attribute__((always_inline)) {
      round_rows<decltype(kind)::value>(buffer, p.pitch, nullptr, a, depth, count, s.channels);
    });
    for (int64_t o = 0; o < O; o += kTileOutputs) {
      const TileFactor right = {weights + o / kTileRows * steps * kTileSize, steps * kTileSize, kTileSize, 0, 64};
      for (int64_t m = 0; m < count; m += kTileOutputs) {
        const TileFactor left = {a + m * depth, kTileRows * depth, kTileDepth, 0, depth * 2};
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
        add_tile_product<1>(left, right, steps, [] {});
        constexpr int64_t kRowBytes = kTileOutputs * sizeof(float);
        store_tile_rows<0>(sums, kRowBytes);
        store_tile_rows<1>(sums + kTileRows, kRowBytes);
        store_tile_rows<2>(sums + kTileRows * kTileOutputs, kRowBytes);
        store_tile_rows<3>(sums + kTileRows * kTileOutputs + kTileRows, kRowBytes);
        with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
          round_rows<decltype(kind)::value>(sums, kTileOutputs, p.pointwise_bias + o, y + (first + m) * O + o, O,
                                            smaller(kTileOutputs, count - m), smaller(kTileOutputs, O - o));
        });
      }
    }
  }
}

// Elements of float that each thread needs.
static int64_t separable_conv2d_tile_buffer_size(const SeparableShape& s) {
  return kPixelsTiles * packed_at<BFloat16>(nullptr, s).pitch + kTileOutputs * kTileOutputs +
         kPixelsTiles * tile_steps(s) * kTileDepth / 2;
}
