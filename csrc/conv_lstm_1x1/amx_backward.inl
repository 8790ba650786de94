// The gradient of conv_lstm_1x1 on AMX, see amx.inl; how the tiles are grouped and summed, see backward.inl.
//
// The gates' gradients are written twice: as rows for the product with the weight, and in pairs of pixels for the sum
// over pixels [x, h]^T d_gates. The factors of that one are kept for several steps before it is done, because its
// result is read and written in full each time and does not fit into the caches near.

struct BackwardSizes {
  TileRows rows;
  int64_t width, gates;      // channels of h in whole depths, and four times that
  int64_t chunk, strip;      // steps of one sum over pixels, and values of its factors per 16 channels
  int64_t xh_low, pair_low;  // where the low parts of these factors are
};
template <int parts>
static BackwardSizes backward_sizes(const ConvLstmShape& s) {
  constexpr int64_t kChunkBytes = 768 << 10;
  BackwardSizes z;
  z.rows = tile_rows(s);
  z.width = z.rows.xh - z.rows.x;
  z.gates = 4 * z.width;
  const int64_t fitting = kChunkBytes / (kTile * (z.rows.xh + z.gates) * 2 * parts);
  z.chunk = smaller(s.steps, fitting < 1 ? 1 : fitting);
  z.strip = z.chunk * kTile * 16;
  z.xh_low = z.rows.xh / 16 * z.strip;
  z.pair_low = z.gates / 16 * z.strip;
  return z;
}

static int64_t amx_gate_blocks(const ConvLstmShape& s) { return backward_sizes<1>(s).gates / 16; }

// Floats of a group's sums: the weight's gradient as tiles [x and h, gates i f g o], then the bias's.
template <int parts>
static int64_t amx_sums_size(const ConvLstmShape& s) {
  const BackwardSizes z = backward_sizes<parts>(s);
  return z.rows.xh * z.gates + z.gates;
}

template <int parts>
struct AmxBuffers {
  float *d_xh, *d_h, *d_c;
  BFloat16 *xh, *d_gates;             // rows as tiles
  BFloat16 *xh_columns, *gate_pairs;  // factors of the sum over pixels
  int64_t size;                       // in bytes
};
template <int parts>
static AmxBuffers<parts> amx_buffers(float* memory, const BackwardSizes& z) {
  AmxBuffers<parts> b;
  b.d_xh = memory;
  b.d_h = b.d_xh + kTile * z.rows.xh;
  b.d_c = b.d_h + kTile * z.width;
  b.xh = (BFloat16*)(b.d_c + kTile * z.width);
  b.d_gates = b.xh + parts * kTile * z.rows.xh;
  b.xh_columns = b.d_gates + parts * kTile * z.gates;
  b.gate_pairs = b.xh_columns + parts * z.xh_low;
  b.size = (char*)(b.gate_pairs + parts * z.pair_low) - (char*)memory;
  return b;
}
template <int parts>
static int64_t amx_backward_buffer_size(const ConvLstmShape& s) {
  return amx_buffers<parts>(nullptr, backward_sizes<parts>(s)).size;
}

EVKERNELS_INLINE VecI interleaved(VecBFloat16 first, VecBFloat16 second) {
  return __builtin_convertvector(first.bits, VecI) | __builtin_convertvector(second.bits, VecI) << 16;
}
// Two vectors as pairs of values, in one or two parts.
template <int parts>
EVKERNELS_INLINE void store_pairs(BFloat16* to, int64_t low, VecF first, VecF second) {
  const VecBFloat16 a = to_bfloat16(first), b = to_bfloat16(second);
  const VecI high_pairs = interleaved(a, b);
  __builtin_memcpy(to, &high_pairs, sizeof high_pairs);
  if constexpr (parts == 2) {
    const VecI low_pairs = interleaved(to_bfloat16(first - to_float(a)), to_bfloat16(second - to_float(b)));
    __builtin_memcpy(to + low, &low_pairs, sizeof low_pairs);
  }
}

// Values of BFloat16 in the weight packed for the product with the gates' gradients.
template <int parts>
static int64_t amx_panels_size(const ConvLstmShape& s) {
  const BackwardSizes z = backward_sizes<parts>(s);
  return parts * z.gates * z.rows.xh;
}

// The weight as tiles [32 columns of x and h, part, depth over gates, 16 columns of the 32].
template <int parts, class T>
static void amx_pack_backward(const T* __restrict__ weight, BFloat16* __restrict__ panels, const ConvLstmShape& s) {
  const BackwardSizes z = backward_sizes<parts>(s);
  const int64_t depth = s.inputs + s.channels, low = z.gates * 32;
  __builtin_memset(panels, 0, amx_panels_size<parts>(s) * sizeof(BFloat16));
  for (int64_t k = 0; k < z.rows.xh; k += 16) {
    const bool is_x = k < z.rows.x;
    const int64_t column = is_x ? k : k - z.rows.x + s.inputs;
    const int64_t count = (is_x ? s.inputs : depth) - column;
    if (count <= 0) continue;
    BFloat16* const panel = panels + k / 32 * parts * low + k / 16 % 2 * kTileSize;
    for (int64_t j = 0; j < z.gates; j += 2) {
      const int64_t c = j % z.width;
      if (c >= s.channels) continue;
      const T* const row = weight + (first_row(s, j / z.width) + c) * depth + column;
      const VecF next = c + 1 < s.channels ? load_columns(row + depth, count) : VecF{};
      store_pairs<parts>(panel + j / kTileDepth * 2 * kTileSize + j % kTileDepth * 16, low, load_columns(row, count),
                         next);
    }
  }
}

// Channels of a frame as factors of the sum over pixels: tiles of 16 channels by 32 pixels.
template <int parts, class T>
static void load_factor_columns(const T* __restrict__ frame, int64_t channels, const Tile& tile,
                                BFloat16* __restrict__ to, const BackwardSizes& z) {
  for (int64_t c = 0; c < channels; c += 16, to += z.strip) {
    for (int64_t p = 0; p < tile.count; p += 16) {
      VecF square[16];
      load_pixels<false>(square, frame, channels, tile, p, c);
      BFloat16* const at = to + p / kTileDepth * kTileSize + p % kTileDepth;
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) store_parts<parts>(at + k * kTileDepth, z.xh_low, square[k]);
    }
  }
}

// d_xh = d_gates * weight, from column `first` on.
template <int parts>
static void amx_input_gradient(const AmxBuffers<parts>& b, const BFloat16* panels, int64_t first, int64_t count,
                               const BackwardSizes& z) {
  for (int64_t k = first; k < z.rows.xh; k += 32) {
    const BFloat16* const panel = panels + k / 32 * parts * z.gates * 32;
    const TileFactor right = {panel, kTileSize, 2 * kTileSize, z.gates * 32, 64};
    for (int64_t p = 0; p < count; p += kBlock) {
      const TileFactor left = {b.d_gates + in_tiles(p, 0, z.gates), kTileRows * z.gates, kTileSize, kTile * z.gates,
                               64};
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
      add_tile_product<parts>(left, right, z.gates / kTileDepth, []() EVKERNELS_LOOP_BODY {});
      float* const to = b.d_xh + p * z.rows.xh + k;
      store_tile_rows<0>(to, z.rows.xh * 4);
      store_tile_rows<1>(to + 16, z.rows.xh * 4);
      store_tile_rows<2>(to + 16 * z.rows.xh, z.rows.xh * 4);
      store_tile_rows<3>(to + 16 * z.rows.xh + 16, z.rows.xh * 4);
    }
  }
}

// d_weight += [x, h]^T d_gates over `steps` depths of 32 pixels.
template <int parts>
static void amx_weight_gradient(const AmxBuffers<parts>& b, float* d_weight, int64_t steps, const BackwardSizes& z) {
  const int64_t row = z.gates / 16 * 256;  // floats from a row of tiles to the next
  for (int64_t k = 0; k < z.rows.xh / 16; k += 2) {
    const TileFactor left = {b.xh_columns + k * z.strip, z.strip, kTileSize, z.xh_low, 64};
    for (int64_t j = 0; j < z.gates / 16; j += 2) {
      const TileFactor right = {b.gate_pairs + j * z.strip, z.strip, kTileSize, z.pair_low, 64};
      float* const sums = d_weight + k * row + j * 256;
      load_tile_rows<0>(sums, 64);
      load_tile_rows<1>(sums + 256, 64);
      load_tile_rows<2>(sums + row, 64);
      load_tile_rows<3>(sums + row + 256, 64);
      add_tile_product<parts>(left, right, steps, []() EVKERNELS_LOOP_BODY {});
      store_tile_rows<0>(sums, 64);
      store_tile_rows<1>(sums + 256, 64);
      store_tile_rows<2>(sums + row, 64);
      store_tile_rows<3>(sums + row + 256, 64);
    }
  }
}

// From a pixel's gates to the gradients of its pre-activations, i, f, g, o; d_c [16] is updated in place.
template <class T, class S>
EVKERNELS_INLINE void pixel_gradient(VecF (&d_gates)[4], const Activated& a, VecF before, VecF d_h, float* d_c) {
  const VecF tanh_c = tanh_for<T>(rounded<S>(multiply_add(a.i, a.g, a.f * before)));
  const VecF d_cell = multiply_add(d_h * a.o, (1.0f - tanh_c) * (1.0f + tanh_c), load(d_c));
  d_gates[0] = d_cell * a.g * a.i * (1.0f - a.i);
  d_gates[1] = d_cell * before * a.f * (1.0f - a.f);
  d_gates[2] = d_cell * a.i * ((1.0f - a.g) * (1.0f + a.g));
  d_gates[3] = d_h * tanh_c * a.o * (1.0f - a.o);
  store(d_c, d_cell * a.f);
}

// Groups [begin, end) of tiles; `sums` holds amx_sums_size floats per group.
template <int parts, class T, class S>
static void amx_backward(const ConvLstmBackward<T, S>& d, const BFloat16* packed, const BFloat16* panels, float* sums,
                         void* memory, const ConvLstmShape& s, int64_t begin, int64_t end) {
  const Tiles tiles;
  const BackwardSizes z = backward_sizes<parts>(s);
  const TileRows& rows = z.rows;
  const AmxBuffers<parts> b = amx_buffers<parts>((float*)memory, z);
  const float* const bias = (const float*)(packed + amx_weights_size<parts>(s));
  const int64_t frame_x = s.inputs * s.pixels, frame_h = s.channels * s.pixels, sums_size = amx_sums_size<parts>(s);
  const int64_t kept_blocks = s.kept / 16, per_group = tiles_per_group(s);
  const bool recomputes = kept_blocks < rows.blocks;
  // What pads channels and pixels stays zero.
  __builtin_memset(memory, 0, b.size);
  for (int64_t group = begin; group < end; ++group) {
    float* const d_weight = sums + group * sums_size;
    float* const d_bias = d_weight + sums_size - z.gates;
    __builtin_memset(d_weight, 0, sums_size * sizeof(float));
    for (int64_t index = group * per_group; index < smaller((group + 1) * per_group, conv_lstm_tiles(s)); ++index) {
      const int64_t sample = index / tiles_of_frame(s), first = (index - sample * tiles_of_frame(s)) * kTile;
      const Tile tile = {s.pixels, first, smaller(kTile, s.pixels - first), s.channels_last};
      if (tile.count < kTile) __builtin_memset(b.xh_columns, 0, parts * (z.xh_low + z.pair_low) * sizeof(BFloat16));
      // What the next step leaves: nothing behind the last one.
      zero_rows(b.d_xh + rows.x, rows.xh, z.width, kTile);
      zero_rows(b.d_c, z.width, z.width, kTile);
      if (d.d_c_last) load_tile(d.d_c_last + sample * frame_h, s.channels, tile, b.d_c, z.width);
      int64_t slot = 0;
      for (int64_t t = s.steps - 1; t >= 0; --t) {
        const int64_t frame = t * s.batch + sample, at_slot = slot * kTile * 16;
        const bool restarts = d.reset && d.reset[frame];
        const T* const x = d.x + frame * frame_x;
        const T* const h = t == 0 ? d.h + sample * frame_h : d.output + (frame - s.batch) * frame_h;
        if (d.d_output) {
          load_tile(d.d_output + frame * frame_h, s.channels, tile, b.d_h, z.width);
        } else {
          zero_rows(b.d_h, z.width, z.width, tile.count);
        }
        if (recomputes) {
          load_rows<parts>(x, s.inputs, tile, b.xh, 0, rows.xh);
          if (restarts) {
            for (int part = 0; part < parts; ++part) {
              zero_tile_rows(b.xh + part * kTile * rows.xh, rows.x, rows.xh, rows.xh);
            }
          } else {
            load_rows<parts>(h, s.channels, tile, b.xh, rows.x, rows.xh);
          }
        }
        if (d.needs_weight) {
          load_factor_columns<parts>(x, s.inputs, tile, b.xh_columns + at_slot, z);
          BFloat16* const h_columns = b.xh_columns + rows.x / 16 * z.strip + at_slot;
          if (!restarts) {
            load_factor_columns<parts>(h, s.channels, tile, h_columns, z);
          } else {
            for (int part = 0; part < parts; ++part) {
              zero_rows(h_columns + part * z.xh_low, z.strip, kTile * 16, rows.blocks);
            }
          }
        }
        const int64_t pixel = frame * s.pixels + first;
        const S* const cells = d.cells + pixel * s.channels;
        const T* const gates = d.gates + 4 * pixel * s.kept;
        // Two pixels from q on of one block of channels, whose gates `read` gives.
        const auto finish = [&](int64_t block, int64_t q, auto read) EVKERNELS_LOOP_BODY {
          const int64_t c = block * 16, columns = s.channels - c;
          VecF d_gates[2][4] = {};
#pragma GCC unroll 2
          for (int m = 0; m < 2; ++m) {
            if (q + m >= tile.count) continue;
            const int64_t row = (q + m) * z.width + c;
            const VecF d_h = load(b.d_h + row) + load(b.d_xh + (q + m) * rows.xh + rows.x + c);
            const VecF before = load_columns(cells + (q + m) * s.channels + c, columns);
            pixel_gradient<T, S>(d_gates[m], read(m), before, d_h, b.d_c + row);
            for (VecF& v : d_gates[m]) v = only_columns(v, columns);
          }
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate) {
            const int64_t column = gate * z.width + c;
            const VecF u = d_gates[0][gate], v = d_gates[1][gate];
            store_parts<parts>(b.d_gates + in_tiles(q, column, z.gates), kTile * z.gates, u);
            store_parts<parts>(b.d_gates + in_tiles(q + 1, column, z.gates), kTile * z.gates, v);
            store(d_bias + column, load(d_bias + column) + (u + v));
            if (!d.needs_weight) continue;
            BFloat16* const pairs = b.gate_pairs + column / 16 * z.strip + at_slot;
            store_pairs<parts>(pairs + q / kTileDepth * kTileSize + q % kTileDepth * 16, z.pair_low, u, v);
          }
        };
        for (int64_t p = 0; p < tile.count; p += kBlock) {
          for (int64_t block = 0; block < kept_blocks; ++block) {
            for (int64_t q = p; q < smaller(p + kBlock, tile.count); q += 2) {
              finish(block, q, [&](int m) EVKERNELS_LOOP_BODY {
                const T* const kept = gates + (q + m) * 4 * s.kept + block * 16;
                return Activated{load(kept), load(kept + s.kept), load(kept + 2 * s.kept), load(kept + 3 * s.kept)};
              });
            }
          }
          for_each_block<parts>(b.xh + in_tiles(p, 0, rows.xh), packed, rows, kept_blocks, rows.blocks,
                                [&](int64_t block, int64_t m, const GateSums& pre) EVKERNELS_LOOP_BODY {
                                  finish(block, p + m, [&](int n) EVKERNELS_LOOP_BODY {
                                    return activate<T>(pre, m + n, bias + 64 * block);
                                  });
                                });
        }
        amx_input_gradient(b, panels, d.d_x ? 0 : rows.x, tile.count, z);
        ++slot;
        if (d.needs_weight && (slot == z.chunk || t == 0)) {
          amx_weight_gradient(b, d_weight, slot * kTile / kTileDepth, z);
          slot = 0;
        }
        if (d.d_x) store_tile(d.d_x + frame * frame_x, s.inputs, tile, b.d_xh, rows.xh);
        if (restarts) {
          zero_rows(b.d_xh + rows.x, rows.xh, z.width, tile.count);
          zero_rows(b.d_c, z.width, z.width, tile.count);
        }
      }
      if (d.d_h) store_tile(d.d_h + sample * frame_h, s.channels, tile, b.d_xh + rows.x, rows.xh);
      if (d.d_c) store_tile(d.d_c + sample * frame_h, s.channels, tile, b.d_c, z.width);
    }
  }
}

// Adds up the groups' sums in their order, for blocks [begin, end) of 16 gates. d_weight [4*C, Cin + C] and d_bias
// [4*C] may be null.
template <int parts, class T>
static void amx_reduce(const float* __restrict__ sums, T* __restrict__ d_weight, T* __restrict__ d_bias,
                       const ConvLstmShape& s, int64_t begin, int64_t end) {
  const BackwardSizes z = backward_sizes<parts>(s);
  const int64_t groups = conv_lstm_groups(s), size = amx_sums_size<parts>(s), depth = s.inputs + s.channels;
  const auto total = [&](int64_t at) EVKERNELS_LOOP_BODY {
    VecF sum = {};
    for (int64_t group = 0; group < groups; ++group) sum += load(sums + group * size + at);
    return sum;
  };
  for (int64_t block = begin; block < end; ++block) {
    const int64_t c = block * 16 % z.width, columns = s.channels - c;
    if (columns <= 0) continue;
    const int64_t row = first_row(s, block * 16 / z.width) + c;
    if (d_bias) store_columns(d_bias + row, total(z.rows.xh * z.gates + block * 16), columns);
    for (int64_t k = 0; d_weight && k < z.rows.xh; k += 16) {
      const int64_t column = k < z.rows.x ? k : k - z.rows.x + s.inputs;
      const int64_t count = (k < z.rows.x ? s.inputs : depth) - column;
      if (count <= 0) continue;
      VecF square[16];
      for (int n = 0; n < 16; ++n) square[n] = total((k / 16 * (z.gates / 16) + block) * 256 + n * 16);
      transpose(square);
      for (int n = 0; n < smaller(16, columns); ++n) {
        store_columns(d_weight + (row + n) * depth + column, square[n], count);
      }
    }
  }
}
