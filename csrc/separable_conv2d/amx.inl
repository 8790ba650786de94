// The channels_last forward of separable_conv2d on tiles of bfloat16, see loops.inl. Compiled once, for AMX.
//
// The depthwise result is formed and activated in float32, then rounded to bfloat16, as the pointwise convolution of
// plain PyTorch takes it; the product adds up in float32. 64 pixels by the product's depth are a left factor that stays
// in the first-level cache beside one pair of tiles of the weights. The product is a fifth to two fifths of the time.
//
// float32 as three parts of bfloat16 and six products of tiles, as accurate as sums in float32, was tried as well: of
// the time on vectors the product took 0.6 to 0.8 where the tiles ran at full speed, but 1.3 to 1.4 where a neighbour
// took most of it (7 and 33 ns per product of two tiles on the same machine), and splitting ate half of the gain.

#include "common/gate_math.inl"

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
  for (int64_t o = 0; o < tile_pairs(s) * kTileOutputs; o += kTileRows) {
    for (int64_t c = 0; c < s.channels; c += kTileDepth, tiles += kTileSize) {
      VecF rows[kTileRows] = {};
      const int64_t depth = smaller(kTileDepth, s.channels - c);
      for (int64_t j = 0; j < smaller(kTileRows, s.outputs - o); ++j) {
        const BFloat16* const from = pointwise + (o + j) * s.channels + c;
        if (depth == kTileDepth) {
          rows[j] = load((const float*)from);
        } else {
          __builtin_memcpy(&rows[j], from, depth * sizeof(BFloat16));
        }
      }
      transpose(rows);
      for (int64_t j = 0; j < kTileRows; ++j) store((float*)(tiles + j * kTileDepth), rows[j]);
    }
  }
}

// For results that are rounded to bfloat16, where an error of 1e-4 does not show.
template <Activation kind>
EVKERNELS_INLINE VecF activate_roughly(VecF x) {
  if constexpr (kind == Activation::kSilu) return x * sigmoid_for<BFloat16>(x);
  if constexpr (kind == Activation::kGeluTanh) return x * sigmoid_for<BFloat16>(gelu_tanh_argument(x));
  if constexpr (kind == Activation::kSigmoid) return sigmoid_for<BFloat16>(x);
  return activate<kind>(x);
}

// to = activation(from + bias), rounded, [count, columns] from rows at a pitch of their own; asks for one line of what
// is ahead per row.
template <Activation kind>
EVKERNELS_INLINE void round_rows(const float* __restrict__ from, int64_t from_pitch, const float* __restrict__ bias,
                                 BFloat16* __restrict__ to, int64_t to_pitch, int64_t count, int64_t columns,
                                 Ahead& ahead) {
  for (int64_t m = 0; m < count; ++m, from += from_pitch, to += to_pitch) {
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.advance(1);
    for (int64_t c = 0; c < columns; c += EVKERNELS_LANES) {
      const VecF value = activate_roughly<kind>(bias ? load(from + c) + load(bias + c) : load(from + c));
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
    Ahead ahead = input_ahead(x, s, first + kPixelsTiles, kPixelsTiles, kPixelsTiles * (tile_pairs(s) + 1));
    with_activation(s.activation, [&](auto kind) __attribute__((always_inline)) {
      round_rows<decltype(kind)::value>(buffer, p.pitch, nullptr, a, depth, count, s.channels, ahead);
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
                                            smaller(kTileOutputs, count - m), smaller(kTileOutputs, O - o), ahead);
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
