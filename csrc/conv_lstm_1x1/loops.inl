// Loops of conv_lstm_1x1 over tiles of pixels, compiled once per instruction set.
//
// No pixel touches another, so a tile of kTile pixels runs through all steps with its state in the second-level cache.
// Within it rows are pixels and vectors run over channels, whatever the layout of the frames: NCHW is transposed while
// a tile is loaded and stored. The product keeps kRows pixels by the four gates of `lanes` channels in registers, so
// that the gate stage is its epilogue. The weights are packed in panels [Cin + C, 4, lanes], one per vector of
// channels.
//
// Times, one thread of a Zen 5 with AVX-512, ten steps of two samples, C = 64 at 90x160 | C = 256 at 23x40:
//   products alone, at the 260 GFLOP/s of this register block in a loop      73 |  74 ms
//   bytes alone: a copy from x to the output                                 5 |   2 ms
//   the same products by the library's sgemm, whole or by tiles            174-205 | 188-192 ms
//   this file, NCHW | channels_last                                  150, 143 |  93, 91 ms
// so that a library product per tile with the gate stage behind it lost before its first gate: on this processor its
// sgemm runs at 92-108 GFLOP/s, 40 % of the units. With pairs of bfloat16 (product.inl): 95, 85 | 59, 55 ms.
//
// Every gate is one sum over x's channels, then h's, in ascending order, then the bias, whatever the tile: results do
// not depend on threads. Where these are more than kChain products, x's and h's are two sums: in one of 512 a gate's
// error, and with it every gradient's, was 1.4 times eager PyTorch's. Padding in rows (to whole vectors) and behind the
// last pixel is computed but never read into a real value: zero weights would not do, because zero times infinity is
// NaN.

#include "common/gate_math.inl"
#include "conv_lstm_1x1/tiles.inl"
#include "conv_lstm_1x1/product.inl"

// Pixels of a tile: a multiple of kRows and of the lanes.
constexpr int64_t kTile = 96;
constexpr int64_t kChain = 256;

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

// Elements of the packed weights, at most: panels, then the bias [vectors of channels, 4, lanes].
template <class T>
static int64_t conv_lstm_packed_size(const ConvLstmShape& s) {
  return 4 * rows_of<T>(s).h * (s.inputs + s.channels + 1);
}

template <class T>
static void conv_lstm_pack(const T* __restrict__ weight, const T* __restrict__ bias, Compute<T>* memory,
                           const ConvLstmShape& s) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kStrip = 16, kPer = Factors<T>::kPer;
  const int64_t depth = s.inputs + s.channels, channels = rows_of<T>(s).h;
  Stored<T>* const packed = (Stored<T>*)memory;
  Compute<T>* const packed_bias = (Compute<T>*)(packed + 4 * channels * depth);
  for (int64_t c = 0; c < channels; c += kLanes) {
    Stored<T>* const panel = packed + 4 * c * depth;
    for (int gate = 0; gate < 4; ++gate) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool real = c + lane < s.channels;
        const int64_t row = first_row(s, gate) + c + lane;
        packed_bias[4 * c + gate * kLanes + lane] = real && bias ? to_float(bias[row]) : 0;
      }
    }
    // Strips, so that the transposed writes stay in the first-level cache.
    for (int64_t strip = 0; strip < depth; strip += kStrip) {
      int64_t k = strip;
      if constexpr (kPer == 1) {
        // Squares are transposed in registers: a call of one step takes 0.91 of the time, with 256 channels at 15x19.
        for (; c + kLanes <= s.channels && k + kLanes <= smaller(strip + kStrip, depth); k += kLanes) {
          for (int gate = 0; gate < 4; ++gate) {
            typename Arithmetic<T>::Type square[kLanes];
            for (int64_t j = 0; j < kLanes; ++j) square[j] = load(weight + (first_row(s, gate) + c + j) * depth + k);
            transpose(square);
            for (int64_t j = 0; j < kLanes; ++j) store(panel + ((k + j) * 4 + gate) * kLanes, square[j]);
          }
        }
      }
      const int64_t first = k;
      for (int64_t column = 0; column < 4 * kLanes; ++column) {
        const int64_t lane = column % kLanes;
        const bool real = c + lane < s.channels;
        const T* const row = weight + (real ? first_row(s, column / kLanes) + c + lane : 0) * depth;
        for (k = first; k < smaller(strip + kStrip, depth); ++k) {
          panel[(k / kPer * 4 * kLanes + column) * kPer + k % kPer] =
              from_float<Stored<T>>(real ? to_float(row[k]) : 0);
        }
      }
    }
  }
}

// The pre-activations of kRows pixels of `xh`, for one vector of channels at c, into sum[pixel][i, f, g, o].
template <class T, class V, class E>
EVKERNELS_INLINE void gate_products(V (&sum)[kRows][4], const E* __restrict__ xh, const Rows& rows,
                                    const E* __restrict__ packed, int64_t c, const ConvLstmShape& s) {
  using Factor = typename Factors<T>::Type;
  constexpr int64_t kPer = Factors<T>::kPer;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t depth = s.inputs + s.channels;
  const E* const panel = packed + 4 * c * depth;
  const Compute<T>* const bias = (const Compute<T>*)(packed + 4 * rows.h * depth) + 4 * c;
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sum[m][n] = V{};
  }
  add_product<4>(sum, (const Factor*)xh, rows.xh / kPer, 1, (const Factor*)panel, 4 * kLanes, s.inputs / kPer);
  V of_x[kRows][4] = {};  // assigned below where it is read, which the compiler does not see
  const bool apart = depth > kChain;
  if (apart) {
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        of_x[m][n] = sum[m][n];
        sum[m][n] = V{};
      }
    }
  }
  add_product<4>(sum, (const Factor*)(xh + rows.x), rows.xh / kPer, 1, (const Factor*)(panel + s.inputs * 4 * kLanes),
                 4 * kLanes, s.channels / kPer);
  // The bias comes last: a sum that starts from a large one rounds every small product to the bias's own unit.
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      if (apart) sum[m][n] += of_x[m][n];
      sum[m][n] += (V)load(bias + n * kLanes);
    }
  }
}

// One gate of the pixels of a register block.
template <class V>
using Pixels = Interleaved<V, kRows>;

// One step of a tile: `cell` [kTile, rows.h] is updated in place, h goes to `h_next` at the stride of `xh`. `gates`, if
// not null, takes the activated gates of the first channels, [pixel][i, f, g, o][s.kept].
template <class T, class S, class E, class R>
static void conv_lstm_step(const E* __restrict__ xh, const E* __restrict__ packed, R* __restrict__ cell,
                           E* __restrict__ h_next, T* __restrict__ gates, int64_t count, const ConvLstmShape& s) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const Rows rows = rows_of<T>(s);
  for (int64_t c = 0; c < s.channels; c += kLanes) {
    for (int64_t first = 0; first < count; first += kRows) {
      V sum[kRows][4];
      gate_products<T>(sum, xh + first * rows.xh, rows, packed, c, s);
      const Pixels<V> i = sigmoid_for<T>(gate_of(sum, 0)), f = sigmoid_for<T>(gate_of(sum, 1));
      const Pixels<V> g = tanh_for<T>(gate_of(sum, 2)), o = sigmoid_for<T>(gate_of(sum, 3));
      R* const state = cell + first * rows.h + c;
      Pixels<V> before;
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) before.v[m] = load(state + m * rows.h);
      const Pixels<V> c_next =
          each([](V c) EVKERNELS_LOOP_BODY { return rounded<S>(c); }, multiply_add(i, g, f * before));
      const Pixels<V> h = o * tanh_for<T>(c_next);
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        store(state + m * rows.h, c_next.v[m]);
        store(h_next + (first + m) * rows.xh + c, sizeof(E) == sizeof(T) ? h.v[m] : rounded<T>(h.v[m]));
        if (gates && c < s.kept && first + m < count) {
          T* const kept = gates + (first + m) * 4 * s.kept + c;
          store(kept, i.v[m]);
          store(kept + s.kept, f.v[m]);
          store(kept + 2 * s.kept, g.v[m]);
          store(kept + 3 * s.kept, o.v[m]);
        }
      }
    }
  }
}

// Elements that each thread needs, at most: c, x and h of two steps.
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
  R* const cell = buffer;
  Stored<T>* const first_xh = (Stored<T>*)(cell + kTile * rows.h);
  Stored<T>* const xh[2] = {first_xh, first_xh + kTile * rows.xh};
  const int64_t frame_x = s.inputs * s.pixels, frame_h = s.channels * s.pixels;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t sample = index / tiles_of_frame(s), first = (index - sample * tiles_of_frame(s)) * kTile;
    const Tile tile = {s.pixels, first, smaller(kTile, s.pixels - first), s.channels_last};
    const Tile by_pixel = {s.pixels, first, tile.count, true};
    load_tile(d.h + sample * frame_h, s.channels, tile, xh[0] + rows.x, rows.xh);
    load_tile(d.c + sample * frame_h, s.channels, tile, cell, rows.h);
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t frame = t * s.batch + sample;
      Stored<T>*const now = xh[t % 2], *const next = xh[(t + 1) % 2];
      load_tile(d.x + frame * frame_x, s.inputs, tile, now, rows.xh);
      if (d.reset && d.reset[frame]) {
        zero_rows(now + rows.x, rows.xh, rows.h, tile.count);
        zero_rows(cell, rows.h, rows.h, tile.count);
      }
      if (d.cells) store_tile(d.cells + frame * frame_h, s.channels, by_pixel, cell, rows.h);
      conv_lstm_step<T, S>(now, (const Stored<T>*)packed, cell, next + rows.x,
                           d.gates ? d.gates + (frame * s.pixels + first) * 4 * s.kept : nullptr, tile.count, s);
      store_tile(d.output + frame * frame_h, s.channels, tile, next + rows.x, rows.xh);
    }
    store_tile(d.c_last + sample * frame_h, s.channels, tile, cell, rows.h);
  }
}

#include "conv_lstm_1x1/backward.inl"
