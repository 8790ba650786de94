// The gradient of conv_lstm_1x1, see loops.inl: a tile of pixels runs backward through all steps.
//
// A step reads its gates or computes them again, and turns them and the gradients of h and c into those of the
// pre-activations. These stay in the cache for two products: with the weight to the gradients of x and of the h before,
// and with [x, h], summed over the pixels, to the weight's own. The tiles are dealt to groups by the shape alone, each
// group adds up its tiles in float32, and the groups are added up in their order: the same bits for any number of
// threads.
//
// Forward and gradient in float32, as in loops.inl, NCHW: gates of all channels kept 504 | 285 ms, recomputed 409 | 373
// ms, plain PyTorch 1243 | 641 ms. Keeping costs its page faults, four values per element and step, whatever C;
// computing again costs products that grow with C.

constexpr int64_t kGroups = 16;

EVKERNELS_INLINE int64_t tiles_per_group(const ConvLstmShape& s) {
  return (conv_lstm_tiles(s) + kGroups - 1) / kGroups;
}
static int64_t conv_lstm_groups(const ConvLstmShape& s) {
  const int64_t tiles = conv_lstm_tiles(s);
  return tiles == 0 ? 0 : (tiles + tiles_per_group(s) - 1) / tiles_per_group(s);
}

// Elements of a group's sums: the weight's gradient [4 * rows.h rounded up to kRows, rows.xh], gates i, f, g, o, and
// the bias's [4 * rows.h].
template <class T>
static int64_t conv_lstm_sums_size(const ConvLstmShape& s) {
  const Rows rows = rows_of<T>(s);
  return round_up(4 * rows.h, kRows) * rows.xh + 4 * rows.h;
}

// Elements of the weight packed for the product with the gates' gradients: panels [4, C, up to 4 vectors].
template <class T>
static int64_t conv_lstm_panels_size(const ConvLstmShape& s) {
  return 4 * s.channels * rows_of<T>(s).xh;
}

template <class T>
static void conv_lstm_pack_backward(const T* __restrict__ weight, Compute<T>* memory, const ConvLstmShape& s) {
  constexpr int64_t kPer = Factors<T>::kPer, kPanel = 4 * Arithmetic<T>::kLanes;
  const Rows rows = rows_of<T>(s);
  const int64_t depth = s.inputs + s.channels;
  Stored<T>* panels = (Stored<T>*)memory;
  for (int64_t k = 0; k < rows.xh; k += kPanel) {
    const int64_t width = smaller(kPanel, rows.xh - k);
    for (int gate = 0; gate < 4; ++gate) {
      for (int64_t c = 0; c < s.channels; ++c) {
        const T* const row = weight + (first_row(s, gate) + c) * depth;
        for (int64_t j = k; j < k + width; ++j) {
          const int64_t column =
              j < rows.x ? (j < s.inputs ? j : -1) : (j - rows.x < s.channels ? s.inputs + j - rows.x : -1);
          panels[(c / kPer * width + j - k) * kPer + c % kPer] =
              from_float<Stored<T>>(column < 0 ? 0 : to_float(row[column]));
        }
      }
      panels += s.channels * width;
    }
  }
}

// Rows of the gates' gradients: a vector more than the gates, which also keeps them off one set of the cache.
EVKERNELS_INLINE int64_t gradient_stride(const Rows& rows) { return 4 * rows.h + 16; }

template <class T>
struct BackwardBuffers {
  Compute<T>*d_xh, *d_h, *d_c, *gates;
  Stored<T>*xh, *d_gates;
  // The gates' gradients and a panel of xh as factors of sums over pixels; the former are d_gates itself if kPer is 1.
  typename Factors<T>::Type *d_gates_factors, *panel;
  int64_t size;  // in elements of Compute<T>, at most
};
template <class T>
static BackwardBuffers<T> backward_buffers(Compute<T>* memory, const ConvLstmShape& s) {
  const Rows rows = rows_of<T>(s);
  using Factor = typename Factors<T>::Type;
  const int64_t stride = gradient_stride(rows);
  BackwardBuffers<T> b;
  b.d_xh = memory;
  b.d_h = b.d_xh + kTile * rows.xh;
  b.d_c = b.d_h + kTile * rows.h;
  b.gates = b.d_c + kTile * rows.h;
  b.xh = (Stored<T>*)(b.gates + kTile * 4 * rows.h);
  b.d_gates = b.xh + kTile * rows.xh;
  b.d_gates_factors = (Factor*)(b.d_gates + (Factors<T>::kPer - 1) * kTile * stride);
  b.panel = (Factor*)(b.d_gates + Factors<T>::kPer * kTile * stride);
  b.size = (Compute<T>*)(b.panel + kTile * 4 * Arithmetic<T>::kLanes) - memory;
  return b;
}
template <class T>
static int64_t conv_lstm_backward_buffer_size(const ConvLstmShape& s) {
  return backward_buffers<T>(nullptr, s).size;
}

// The activated gates of a tile from channel s.kept on, [pixel][i, f, g, o][rows.h].
template <class T, class E, class R>
static void recompute_gates(const E* __restrict__ xh, const E* __restrict__ packed, R* __restrict__ gates,
                            int64_t count, const ConvLstmShape& s) {
  using V = typename Arithmetic<T>::Type;
  const Rows rows = rows_of<T>(s);
  for (int64_t c = s.kept; c < s.channels; c += Arithmetic<T>::kLanes) {
    for (int64_t first = 0; first < count; first += kRows) {
      V sum[kRows][4];
      gate_products<T>(sum, xh + first * rows.xh, rows, packed, c, s);
#pragma GCC unroll 4
      for (int gate = 0; gate < 4; ++gate) {
        const Pixels<V> sums = gate_of(sum, gate);
        const Pixels<V> active = gate == 2 ? tanh_for<T>(sums) : sigmoid_for<T>(sums);
#pragma GCC unroll 6
        for (int m = 0; m < kRows; ++m) store(gates + ((first + m) * 4 + gate) * rows.h + c, active.v[m]);
      }
    }
  }
}

// From activated gates at a stride of `width` each to the gradients of the pre-activations, for the lanes from channel
// k on of K pixels. d_h [kTile, rows.h] is that of the new h, d_c [kTile, rows.h] that of the new c on entry and that
// of the old c on return.
template <int K, class T, class S, class G, class E, class R>
EVKERNELS_INLINE void gradients_of_pixels(const G* __restrict__ gates, int64_t width, const S* __restrict__ cells,
                                          const R* __restrict__ d_h, R* __restrict__ d_c, E* __restrict__ d_gates,
                                          int64_t p, int64_t k, const Rows& rows, const ConvLstmShape& s) {
  using V = Interleaved<typename Arithmetic<T>::Type, K>;
  const auto read = [&](const auto* from, int64_t stride) EVKERNELS_LOOP_BODY {
    V result;
#pragma GCC unroll 6
    for (int m = 0; m < K; ++m) result.v[m] = load(from + (p + m) * stride + k);
    return result;
  };
  const auto write = [&](auto* to, int64_t stride, const V& value) EVKERNELS_LOOP_BODY {
#pragma GCC unroll 6
    for (int m = 0; m < K; ++m) store(to + (p + m) * stride + k, value.v[m]);
  };
  const V i = read(gates, 4 * width), f = read(gates + width, 4 * width);
  const V g = read(gates + 2 * width, 4 * width), o = read(gates + 3 * width, 4 * width);
  V c;
#pragma GCC unroll 6
  for (int m = 0; m < K; ++m) c.v[m] = load_columns(cells + (p + m) * s.channels + k, s.channels - k);
  const V d_output = read(d_h, rows.h);
  const auto round = [](auto x) EVKERNELS_LOOP_BODY { return rounded<S>(x); };
  const V tanh_c = tanh_for<T>(each(round, multiply_add(i, g, f * c)));
  const V d_cell = multiply_add(d_output * o, (1.0f - tanh_c) * (1.0f + tanh_c), read(d_c, rows.h));
  const int64_t stride = gradient_stride(rows);
  write(d_gates, stride, d_cell * g * i * (1.0f - i));
  write(d_gates + rows.h, stride, d_cell * c * f * (1.0f - f));
  write(d_gates + 2 * rows.h, stride, d_cell * i * ((1.0f - g) * (1.0f + g)));
  write(d_gates + 3 * rows.h, stride, d_output * tanh_c * o * (1.0f - o));
  write(d_c, rows.h, d_cell * f);
}

// That for `count` pixels and channels [begin, end).
template <class T, class S, class G, class E, class R>
static void gate_gradients(const G* __restrict__ gates, int64_t width, const S* __restrict__ cells,
                           const R* __restrict__ d_h, R* __restrict__ d_c, E* __restrict__ d_gates, int64_t count,
                           int64_t begin, int64_t end, const ConvLstmShape& s) {
  const Rows rows = rows_of<T>(s);
  for (int64_t k = begin; k < end; k += Arithmetic<T>::kLanes) {
    int64_t p = 0;
    for (; p + kRows <= count; p += kRows) {
      gradients_of_pixels<kRows, T>(gates, width, cells, d_h, d_c, d_gates, p, k, rows, s);
    }
    for (; p < count; ++p) gradients_of_pixels<1, T>(gates, width, cells, d_h, d_c, d_gates, p, k, rows, s);
  }
}

// d_xh = d_gates * weight for one panel of `vectors` columns.
template <int vectors, class T>
static void input_gradient(const BackwardBuffers<T>& b, const Stored<T>* __restrict__ panel, int64_t column,
                           const Rows& rows, int64_t count, int64_t channels) {
  using V = typename Arithmetic<T>::Type;
  using Factor = typename Factors<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kWidth = vectors * kLanes, kPer = Factors<T>::kPer;
  const int64_t stride = gradient_stride(rows);
  for (int64_t first = 0; first < count; first += kRows) {
    V sum[kRows][vectors] = {};
#pragma GCC unroll 1
    for (int gate = 0; gate < 4; ++gate) {
      // Gate by gate from zero, then added: a chain four times as long would round twice as much.
      V part[kRows][vectors] = {};
      add_product<vectors>(part, (const Factor*)(b.d_gates + first * stride + gate * rows.h), stride / kPer, 1,
                           (const Factor*)(panel + gate * channels * kWidth), kWidth, channels / kPer);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[m][n] += part[m][n];
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) store(b.d_xh + (first + m) * rows.xh + column + n * kLanes, sum[m][n]);
    }
  }
}

// d_weight += d_gates^T * xh for `vectors` columns of xh, which are copied side by side first: at their own stride,
// often a power of two, they would share few sets of the first-level cache.
template <int vectors, class T>
static void weight_gradient(const BackwardBuffers<T>& b, int64_t column, Compute<T>* __restrict__ d_weight,
                            const Rows& rows, int64_t count) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kWidth = vectors * kLanes, kPer = Factors<T>::kPer;
  for (int64_t p = 0; p < count; p += kPer) {
    for (int64_t n = 0; n < kWidth; n += kLanes) {
      store_factors(b.panel + p / kPer * kWidth + n, b.xh + p * rows.xh + column + n, rows.xh);
    }
  }
  for (int64_t j = 0; j < 4 * rows.h; j += kRows) {
    // From zero, then added: a sum that starts from a large one rounds every small product to that one's unit.
    V sum[kRows][vectors] = {};
    add_product<vectors>(sum, b.d_gates_factors + j, 1, gradient_stride(rows), b.panel, kWidth,
                         (count + kPer - 1) / kPer);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) {
        Compute<T>* const element = d_weight + (j + m) * rows.xh + column + n * kLanes;
        store(element, (V)load(element) + sum[m][n]);
      }
    }
  }
}

// Both products of a step, panel by panel; d_weight may be null.
template <class T>
static void step_products(const BackwardBuffers<T>& b, const Stored<T>* __restrict__ panels, Compute<T>* d_weight,
                          const Rows& rows, int64_t count, int64_t channels) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kPanel = 4 * kLanes;
  if constexpr (Factors<T>::kPer == 2) {
    const int64_t stride = gradient_stride(rows);
    if (count % 2) {
      zero_rows(b.d_gates + count * stride, stride, stride, 1);
      zero_rows(b.xh + count * rows.xh, rows.xh, rows.xh, 1);
    }
    for (int64_t p = 0; d_weight && p < count; p += 2) {
      for (int64_t j = 0; j < stride; j += kLanes) {
        store_factors(b.d_gates_factors + p / 2 * stride + j, b.d_gates + p * stride + j, stride);
      }
    }
  }
  const auto run = [&](auto input, auto weight, int64_t k) __attribute__((always_inline)) {
    input(b, panels + 4 * channels * k, k, rows, count, channels);
    if (d_weight) weight(b, k, d_weight, rows, count);
  };
  for (int64_t k = 0; k < rows.xh; k += kPanel) {
    switch (smaller(kPanel, rows.xh - k) / kLanes) {
      case 1:
        run(input_gradient<1, T>, weight_gradient<1, T>, k);
        break;
      case 2:
        run(input_gradient<2, T>, weight_gradient<2, T>, k);
        break;
      case 3:
        run(input_gradient<3, T>, weight_gradient<3, T>, k);
        break;
      default:
        run(input_gradient<4, T>, weight_gradient<4, T>, k);
    }
  }
}

// Groups [begin, end) of tiles; `sums` holds conv_lstm_sums_size elements per group.
template <class T, class S>
static void conv_lstm_backward(const ConvLstmBackward<T, S>& d, const Compute<T>* packed, const Compute<T>* panels,
                               Compute<T>* sums, Compute<T>* memory, const ConvLstmShape& s, int64_t begin,
                               int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const Rows rows = rows_of<T>(s);
  const BackwardBuffers<T> b = backward_buffers<T>(memory, s);
  const int64_t frame_x = s.inputs * s.pixels, frame_h = s.channels * s.pixels, stride = gradient_stride(rows);
  const int64_t sums_size = conv_lstm_sums_size<T>(s), per_group = tiles_per_group(s);
  for (int64_t group = begin; group < end; ++group) {
    R* const d_weight = sums + group * sums_size;
    R* const d_bias = d_weight + sums_size - 4 * rows.h;
    __builtin_memset(d_weight, 0, sums_size * sizeof(R));
    for (int64_t index = group * per_group; index < smaller((group + 1) * per_group, conv_lstm_tiles(s)); ++index) {
      const int64_t sample = index / tiles_of_frame(s), first = (index - sample * tiles_of_frame(s)) * kTile;
      const Tile tile = {s.pixels, first, smaller(kTile, s.pixels - first), s.channels_last};
      // What the next step leaves: nothing behind the last one. d_xh is also where the first gradient of h begins.
      zero_rows(b.d_xh + rows.x, rows.xh, rows.h, kTile);
      zero_rows(b.d_c, rows.h, rows.h, kTile);
      if (d.d_c_last) load_tile(d.d_c_last + sample * frame_h, s.channels, tile, b.d_c, rows.h);
      for (int64_t t = s.steps - 1; t >= 0; --t) {
        const int64_t frame = t * s.batch + sample;
        const bool restarts = d.reset && d.reset[frame];
        if (d.d_output) {
          load_tile(d.d_output + frame * frame_h, s.channels, tile, b.d_h, rows.h);
        } else {
          zero_rows(b.d_h, rows.h, rows.h, tile.count);
        }
        for (int64_t p = 0; p < tile.count; ++p) {
          for (int64_t c = 0; c < rows.h; c += kLanes) {
            R* const to = b.d_h + p * rows.h + c;
            store(to, (V)load(to) + (V)load(b.d_xh + p * rows.xh + rows.x + c));
          }
        }
        load_tile(d.x + frame * frame_x, s.inputs, tile, b.xh, rows.xh);
        if (restarts) {
          zero_rows(b.xh + rows.x, rows.xh, rows.h, tile.count);
        } else {
          const T* const before = t == 0 ? d.h + sample * frame_h : d.output + (frame - s.batch) * frame_h;
          load_tile(before, s.channels, tile, b.xh + rows.x, rows.xh);
        }
        const int64_t pixel = frame * s.pixels + first;
        const S* const cells = d.cells + pixel * s.channels;
        if (s.kept) {
          gate_gradients<T>(d.gates + 4 * pixel * s.kept, s.kept, cells, b.d_h, b.d_c, b.d_gates, tile.count, 0, s.kept,
                            s);
        }
        if (s.kept < s.channels) {
          recompute_gates<T>(b.xh, (const Stored<T>*)packed, b.gates, tile.count, s);
          gate_gradients<T>(b.gates, rows.h, cells, b.d_h, b.d_c, b.d_gates, tile.count, s.kept, s.channels, s);
        }
        step_products<T>(b, (const Stored<T>*)panels, d.needs_weight ? d_weight : nullptr, rows, tile.count,
                         s.channels);
        for (int64_t j = 0; j < 4 * rows.h; j += kLanes) {
          V sums[4] = {};
          for (int64_t p = 0; p < tile.count; ++p) sums[p % 4] += (V)load(b.d_gates + p * stride + j);
          store(d_bias + j, (V)load(d_bias + j) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
        }
        if (d.d_x) store_tile(d.d_x + frame * frame_x, s.inputs, tile, b.d_xh, rows.xh);
        if (restarts) {
          zero_rows(b.d_xh + rows.x, rows.xh, rows.h, tile.count);
          zero_rows(b.d_c, rows.h, rows.h, tile.count);
        }
      }
      if (d.d_h) store_tile(d.d_h + sample * frame_h, s.channels, tile, b.d_xh + rows.x, rows.xh);
      if (d.d_c) store_tile(d.d_c + sample * frame_h, s.channels, tile, b.d_c, rows.h);
    }
  }
}

// Adds up the groups' sums in their order, for channels [begin, end). d_weight [4*C, Cin + C] and d_bias [4*C] may be
// null.
template <class T>
static void conv_lstm_reduce(const Compute<T>* __restrict__ sums, T* __restrict__ d_weight, T* __restrict__ d_bias,
                             const ConvLstmShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const Rows rows = rows_of<T>(s);
  const int64_t groups = conv_lstm_groups(s), size = conv_lstm_sums_size<T>(s), depth = s.inputs + s.channels;
  const auto total = [&](int64_t at) __attribute__((always_inline)) {
    typename Arithmetic<T>::Type sum = {};
    for (int64_t group = 0; group < groups; ++group) sum += load(sums + group * size + at);
    return sum;
  };
  for (int gate = 0; gate < 4; ++gate) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t row = gate * rows.h + c;
      T* const to = d_weight + (first_row(s, gate) + c) * depth;
      for (int64_t k = 0; d_weight && k < s.inputs; k += kLanes) {
        store_columns(to + k, total(row * rows.xh + k), s.inputs - k);
      }
      for (int64_t k = 0; d_weight && k < s.channels; k += kLanes) {
        store_columns(to + s.inputs + k, total(row * rows.xh + rows.x + k), s.channels - k);
      }
      R sum = 0;
      for (int64_t group = 0; group < groups; ++group) sum += sums[(group + 1) * size - 4 * rows.h + row];
      if (d_bias) d_bias[first_row(s, gate) + c] = from_float<T>(sum);
    }
  }
}
