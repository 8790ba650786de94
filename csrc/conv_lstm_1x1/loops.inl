// Loops of conv_lstm_1x1 over tiles of pixels, compiled once per instruction set.
//
// No pixel touches another, so a tile of kTile pixels runs through all steps with its state in the second-level cache.
// Within it rows are pixels and vectors run over channels, whatever the layout of the frames: NCHW is transposed while
// a tile is loaded and stored. The product keeps kRows pixels by the four gates of `lanes` channels in registers, so
// that the gate stage is its epilogue. The weights are packed in panels [Cin + C, 4, lanes], one per vector of channels.
//
// Every gate is one sum over x's channels, then h's, in ascending order, then the bias, whatever the tile: results do
// not depend on threads. Padding in rows (to whole vectors) and behind the last pixel is computed but never read into a
// real value: zero weights would not do, because zero times infinity is NaN.

#include "lstm_gates/math.inl"
#include "conv_lstm_1x1/tiles.inl"

constexpr int kRows = EVKERNELS_LANES == 16 ? 6 : 3;
// A multiple of kRows and of the lanes.
constexpr int64_t kTile = 96;

// Strides of a tile's rows: x and h side by side, each from a whole vector on.
struct Rows {
  int64_t x, h, xh;
};
template <class T>
EVKERNELS_INLINE Rows rows_of(const ConvLstmShape& s) {
  const int64_t x = round_up(s.inputs, Arithmetic<T>::kLanes), h = round_up(s.channels, Arithmetic<T>::kLanes);
  return {x, h, x + h};
}

EVKERNELS_INLINE int64_t tiles_of_frame(const ConvLstmShape& s) { return (s.pixels + kTile - 1) / kTile; }
static int64_t conv_lstm_tiles(const ConvLstmShape& s) { return s.batch * tiles_of_frame(s); }

// The rows of the weight where the blocks i, f, g and o begin.
EVKERNELS_INLINE int64_t first_row(const ConvLstmShape& s, int gate) {
  const int places[4] = {s.order.i, s.order.f, s.order.g, s.order.o};
  return places[gate] * s.channels;
}

// Elements of the packed weights: panels, then the bias [vectors of channels, 4, lanes].
template <class T>
static int64_t conv_lstm_packed_size(const ConvLstmShape& s) {
  return 4 * rows_of<T>(s).h * (s.inputs + s.channels + 1);
}

template <class T>
static void conv_lstm_pack(const T* __restrict__ weight, const T* __restrict__ bias, Compute<T>* __restrict__ packed,
                           const ConvLstmShape& s) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kStrip = 16;
  const int64_t depth = s.inputs + s.channels, channels = rows_of<T>(s).h;
  Compute<T>* const packed_bias = packed + 4 * channels * depth;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Compute<T>* const panel = packed + 4 * c * depth;
    for (int gate = 0; gate < 4; ++gate) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool real = c + lane < s.channels;
        const int64_t row = first_row(s, gate) + c + lane;
        packed_bias[4 * c + gate * kLanes + lane] = real && bias ? to_float(bias[row]) : 0;
      }
    }
    // Strips, so that the transposed writes stay in the first-level cache.
    for (int64_t strip = 0; strip < depth; strip += kStrip) {
      for (int64_t column = 0; column < 4 * kLanes; ++column) {
        const int64_t lane = column % kLanes;
        const bool real = c + lane < s.channels;
        const T* const row = weight + (real ? first_row(s, column / kLanes) + c + lane : 0) * depth;
        for (int64_t k = strip; k < smaller(strip + kStrip, depth); ++k) {
          panel[k * 4 * kLanes + column] = real ? to_float(row[k]) : 0;
        }
      }
    }
  }
}

// sum[m][n] += sum over k of a[m * a_stride + k * a_step] * b[k * b_stride + n * lanes].
template <int vectors, class V, class R>
EVKERNELS_INLINE void add_product(V (&sum)[kRows][vectors], const R* __restrict__ a, int64_t a_stride, int64_t a_step,
                                  const R* __restrict__ b, int64_t b_stride, int64_t depth) {
  constexpr int kLanes = sizeof(V) / sizeof(R);
  for (int64_t k = 0; k < depth; ++k) {
    V column[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) column[n] = load(b + k * b_stride + n * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const V row = a[m * a_stride + k * a_step] - V{};
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[m][n] = multiply_add(row, column[n], sum[m][n]);
    }
  }
}

// The value that storing as T and loading gives.
template <class T, class V>
EVKERNELS_INLINE V rounded(V value) {
  if constexpr (sizeof(T) == 2) {
    T stored[Arithmetic<T>::kLanes];
    store(stored, value);
    return load(stored);
  }
  return value;
}

template <class T, class V>
EVKERNELS_INLINE void store_columns(T* to, V value, int64_t count) {
  if (count >= Arithmetic<T>::kLanes) {
    store(to, value);
  } else {
    store_partial(to, value, count);
  }
}
template <class T>
EVKERNELS_INLINE typename Arithmetic<T>::Type load_columns(const T* from, int64_t count) {
  return count >= Arithmetic<T>::kLanes ? load(from) : load_partial(from, count);
}

// The pre-activations of kRows pixels of `xh`, for one vector of channels at c, into sum[pixel][i, f, g, o].
template <class T, class V, class R>
EVKERNELS_INLINE void gate_products(V (&sum)[kRows][4], const R* __restrict__ xh, const Rows& rows,
                                    const R* __restrict__ packed, int64_t c, const ConvLstmShape& s) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t depth = s.inputs + s.channels;
  const R* const panel = packed + 4 * c * depth;
  const R* const bias = packed + 4 * rows.h * depth + 4 * c;
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sum[m][n] = V{};
  }
  add_product<4>(sum, xh, rows.xh, 1, panel, 4 * kLanes, s.inputs);
  add_product<4>(sum, xh + rows.x, rows.xh, 1, panel + s.inputs * 4 * kLanes, 4 * kLanes, s.channels);
  // The bias comes last: a sum that starts from a large one rounds every small product to the bias's own unit.
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sum[m][n] += (V)load(bias + n * kLanes);
  }
}

// One step of a tile: `cell` [kTile, rows.h] is updated in place, h goes to `h_next` at the stride of `xh`. `gates`, if
// not null, takes the activated gates, [pixel][i, f, g, o][C].
template <class T, class S, class R>
static void conv_lstm_step(const R* __restrict__ xh, const R* __restrict__ packed, R* __restrict__ cell,
                           R* __restrict__ h_next, T* __restrict__ gates, int64_t count, const ConvLstmShape& s) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const Rows rows = rows_of<T>(s);
  for (int64_t c = 0; c < s.channels; c += kLanes) {
    for (int64_t first = 0; first < count; first += kRows) {
      V sum[kRows][4];
      gate_products<T>(sum, xh + first * rows.xh, rows, packed, c, s);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        R* const state = cell + (first + m) * rows.h + c;
        const V i = sigmoid(sum[m][0]), f = sigmoid(sum[m][1]), g = tanh(sum[m][2]), o = sigmoid(sum[m][3]);
        const V c_next = rounded<S>(multiply_add(i, g, f * load(state)));
        store(state, c_next);
        store(h_next + (first + m) * rows.xh + c, rounded<T>(o * tanh(c_next)));
        if (gates && first + m < count) {
          T* const kept = gates + (first + m) * 4 * s.channels + c;
          store_columns(kept, i, s.channels - c);
          store_columns(kept + s.channels, f, s.channels - c);
          store_columns(kept + 2 * s.channels, g, s.channels - c);
          store_columns(kept + 3 * s.channels, o, s.channels - c);
        }
      }
    }
  }
}

// Elements that each thread needs: x and h of two steps, c.
template <class T>
static int64_t conv_lstm_buffer_size(const ConvLstmShape& s) {
  const Rows rows = rows_of<T>(s);
  return kTile * (2 * rows.xh + rows.h);
}

// Tiles [begin, end) through all steps.
template <class T, class S>
static void conv_lstm_forward(const ConvLstmForward<T, S>& d, const Compute<T>* packed, Compute<T>* buffer,
                              const ConvLstmShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  const Rows rows = rows_of<T>(s);
  R* const xh[2] = {buffer, buffer + kTile * rows.xh};
  R* const cell = xh[1] + kTile * rows.xh;
  const int64_t frame_x = s.inputs * s.pixels, frame_h = s.channels * s.pixels;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / tiles_of_frame(s), first = (index - sample * tiles_of_frame(s)) * kTile;
    const Tile tile = {s.pixels, first, smaller(kTile, s.pixels - first), s.channels_last};
    const Tile by_pixel = {s.pixels, first, tile.count, true};
    load_tile(d.h + sample * frame_h, s.channels, tile, xh[0] + rows.x, rows.xh);
    load_tile(d.c + sample * frame_h, s.channels, tile, cell, rows.h);
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t frame = t * s.batch + sample;
      R *const now = xh[t % 2], *const next = xh[(t + 1) % 2];
      load_tile(d.x + frame * frame_x, s.inputs, tile, now, rows.xh);
      if (d.reset && d.reset[frame]) {
        zero_rows(now + rows.x, rows.xh, rows.h, tile.count);
        zero_rows(cell, rows.h, rows.h, tile.count);
      }
      if (d.cells) store_tile(d.cells + frame * frame_h, s.channels, by_pixel, cell, rows.h);
      conv_lstm_step<T, S>(now, packed, cell, next + rows.x,
                           d.gates ? d.gates + 4 * (frame * frame_h + first * s.channels) : nullptr, tile.count, s);
      store_tile(d.output + frame * frame_h, s.channels, tile, next + rows.x, rows.xh);
    }
    store_tile(d.c_last + sample * frame_h, s.channels, tile, cell, rows.h);
  }
}

#include "conv_lstm_1x1/backward.inl"
