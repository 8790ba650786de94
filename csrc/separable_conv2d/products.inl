// What the loops of separable convolutions are made of: packed weights, products in register blocks, activations of
// rows. Compiled once per instruction set.

#include "common/activations.inl"
#include "common/transpose.inl"

// A register block of a product. Two vectors wide, so that a panel of 256 rows fits into the first-level cache; 6 x 4
// took 1.2 times as long there. Fewer rows than kRows come in steps of kStep.
constexpr int kRows = EVKERNELS_LANES == 16 ? 12 : 6;
constexpr int kStep = kRows / 3;
constexpr int kVectors = 2;
// Pixels of a tile. A multiple of kRows and of kVectors * lanes in turn, small enough for buffer and weights to stay in
// the second-level cache, in channels_last nearly in the first. The sums of the backward pass are loaded and stored
// once per tile, which larger tiles make up for.
constexpr int64_t kPixelsLast = 48, kPixelsBackward = 96;
constexpr int64_t kPixelsFirst = 192;
// Between the channels of an NCHW tile: an odd number of cache lines, or panels would crowd into few sets.
constexpr int64_t kPitch = kPixelsFirst + 16;

EVKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EVKERNELS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
EVKERNELS_INLINE int64_t round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

// The weights in the order in which the loops read them, all in the type of the computation.
template <class R>
struct Packed {
  R* depthwise;       // channels_last: [k*k, channels rounded up]; NCHW: [C, k*k]
  R* depthwise_bias;  // [channels rounded up]
  R* pointwise;  // channels_last: panels [C, kVectors * lanes], the last one narrower; NCHW: [outputs rounded up, C]
  R* pointwise_bias;  // [outputs rounded up]
  int64_t channels, outputs, size;
  int64_t pitch;  // between the pixels of a channels_last tile
};

// Elements between the rows of a tile: rows a power of two apart would crowd into few sets of the first-level cache.
EVKERNELS_INLINE int64_t pitch_of(int64_t columns) { return columns % 128 ? columns : columns + 16; }

// Elements between the pixels of a channels_last tile of outputs.
template <class T>
EVKERNELS_INLINE int64_t outer_pitch(const SeparableShape& s) {
  return pitch_of(round_up(s.outputs, Arithmetic<T>::kLanes));
}

template <class T>
static Packed<Compute<T>> packed_at(Compute<T>* memory, const SeparableShape& s) {
  const int64_t channels = round_up(s.channels, Arithmetic<T>::kLanes);
  const int64_t outputs = round_up(round_up(s.outputs, kStep), Arithmetic<T>::kLanes);
  Packed<Compute<T>> p;
  p.depthwise = memory;
  p.depthwise_bias = p.depthwise + s.size * s.size * channels;
  p.pointwise = p.depthwise_bias + channels;
  p.pointwise_bias = p.pointwise + outputs * s.channels;
  p.channels = channels;
  p.outputs = outputs;
  p.size = p.pointwise_bias + outputs - memory;
  p.pitch = pitch_of(channels);
  return p;
}

// Elements of packed weights, with room for a block of rows that reaches behind them.
template <class T>
static int64_t separable_conv2d_packed_size(const SeparableShape& s) {
  return packed_at<T>(nullptr, s).size + kRows;
}

// Without a pointwise weight all but that.
template <class T>
static void separable_conv2d_pack(const T* __restrict__ depthwise, const T* __restrict__ depthwise_bias,
                                  const T* __restrict__ pointwise, const T* __restrict__ pointwise_bias,
                                  Compute<T>* memory, const SeparableShape& s, bool channels_last) {
  const auto p = packed_at<T>(memory, s);
  const int64_t C = s.channels, O = s.outputs, taps = s.size * s.size;
  __builtin_memset(memory, 0, (p.pointwise - memory) * sizeof *memory);
  // Zeros for the outputs that fill up a vector: where there are none, packing writes every element.
  const int64_t rest = pointwise && p.outputs != O ? 0 : p.pointwise_bias - p.pointwise;
  __builtin_memset(p.pointwise + rest, 0, (memory + p.size - p.pointwise - rest) * sizeof *memory);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t k = 0; k < taps; ++k) {
      p.depthwise[channels_last ? k * p.channels + c : c * taps + k] = to_float(depthwise[c * taps + k]);
    }
    if (depthwise_bias) p.depthwise_bias[c] = to_float(depthwise_bias[c]);
  }
  for (int64_t o = 0; pointwise_bias && o < O; ++o) p.pointwise_bias[o] = to_float(pointwise_bias[o]);
  if (!pointwise) return;
  if (!channels_last) {
    for (int64_t k = 0; k < O * C; ++k) p.pointwise[k] = to_float(pointwise[k]);
    return;
  }
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kPanel = kVectors * kLanes;
  for (int64_t o = 0; o < O; o += kLanes) {
    const int64_t first = o / kPanel * kPanel, width = smaller(kPanel, round_up(O - first, kLanes));
    Compute<T>* const panel = p.pointwise + first * C + o - first;
    int64_t c = 0;
    for (; o + kLanes <= O && c + kLanes <= C; c += kLanes) {
      typename Arithmetic<T>::Type square[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) square[j] = load(pointwise + (o + j) * C + c);
      transpose(square);
      for (int64_t j = 0; j < kLanes; ++j) store(panel + (c + j) * width, square[j]);
    }
    for (; c < C; ++c) {
      for (int64_t j = 0; j < smaller(kLanes, O - o); ++j) panel[c * width + j] = to_float(pointwise[(o + j) * C + c]);
    }
  }
}

template <Activation kind, class V, class R>
EVKERNELS_INLINE void activate_vectors(R* values, int64_t count) {
  for (int64_t k = 0; k < count; k += sizeof(V) / sizeof(R)) store(values + k, activate<kind>((V)load(values + k)));
}

// In place, for a count that is a multiple of the lanes.
template <class V, class R>
static void activate_buffer(Activation kind, R* values, int64_t count) {
  with_activation(kind, [&](auto constant) __attribute__((always_inline)) {
    if (kind != Activation::kNone) activate_vectors<decltype(constant)::value, V>(values, count);
  });
}

// Memory that is needed soon, [at, end) and then [next, next_end): a product asks for a line of it every `step` bytes,
// one per step of its depth, so that it is in the second-level cache in time.
struct Ahead {
  const char *at, *end, *next, *next_end;
  int64_t step;

  void advance(int64_t steps) {
    at += steps * step;
    if (at < end) return;
    at = next;
    end = next = next_end;
    if (at == end) step = 0;
  }
};

// What is added to the sums of a product: a bias per column or per row (null: nothing), or what the result holds.
enum class Start { kColumnBias, kRowBias, kResult };

// rows x (vectors * lanes) of a product: result[m][j] = sum over k of a[m * a_stride + k * a_step] * b[k][j].
template <int rows, int vectors, Start start, class V, class R>
static void product(const R* __restrict__ a, int64_t a_stride, int64_t a_step, const R* __restrict__ b,
                    int64_t b_stride, const R* __restrict__ bias, int64_t depth, R* __restrict__ result,
                    int64_t result_stride, const char* ahead, int64_t step) {
  constexpr int lanes = sizeof(V) / sizeof(R);
  V sum[rows][vectors];
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < vectors; ++n) {
      sum[m][n] = start == Start::kResult ? (V)load(result + m * result_stride + n * lanes) : V{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V column[vectors];
#pragma GCC unroll 2
    for (int n = 0; n < vectors; ++n) column[n] = load(b + k * b_stride + n * lanes);
    if constexpr (start == Start::kColumnBias) __builtin_prefetch(ahead + k * step, 0, 2);
#pragma GCC unroll 12
    for (int m = 0; m < rows; ++m) {
      const V row = a[m * a_stride + k * a_step] - V{};  // a broadcast; 0 + a is an addition
#pragma GCC unroll 2
      for (int n = 0; n < vectors; ++n) sum[m][n] += row * column[n];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < vectors; ++n) {
      // The bias comes last: a sum that starts from a large one rounds every small product to the bias's own unit.
      if (start == Start::kRowBias && bias) sum[m][n] += bias[m] - V{};
      if (start == Start::kColumnBias && bias) sum[m][n] += (V)load(bias + n * lanes);
      store(result + m * result_stride + n * lanes, sum[m][n]);
    }
  }
}

// The blocks of one panel of b; result's rows are a multiple of kStep.
template <int vectors, Start start, class V, class R>
static void multiply_panel(const R* a, int64_t a_stride, int64_t a_step, int64_t rows, const R* b, int64_t b_stride,
                           const R* bias, int64_t depth, R* result, int64_t result_stride, Ahead* ahead) {
  constexpr auto whole = product<kRows, vectors, start, V, R>, most = product<2 * kStep, vectors, start, V, R>,
                 least = product<kStep, vectors, start, V, R>;
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    (left > 2 * kStep ? whole
     : left > kStep   ? most
                      : least)(a + m * a_stride, a_stride, a_step, b, b_stride,
                             bias && start == Start::kRowBias ? bias + m : bias, depth, result + m * result_stride,
                             result_stride, ahead ? ahead->at : (const char*)b, ahead ? ahead->step : 0);
    if (ahead) ahead->advance(depth);
    m += left > 2 * kStep ? kRows : left > kStep ? 2 * kStep : kStep;
  }
}

// result [rows, columns] = start + a * b; columns are rounded up to the lanes, rows to kRows. b is packed in panels if
// b_stride is 0. Only Start::kColumnBias minds `ahead`.
template <Start start, class V, class R>
static void multiply(const R* a, int64_t a_stride, int64_t a_step, int64_t rows, const R* b, int64_t b_stride,
                     const R* bias, int64_t columns, int64_t depth, R* result, int64_t result_stride,
                     Ahead* ahead = nullptr) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R), kPanel = kVectors * lanes;
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t width = smaller(kPanel, round_up(columns - j, lanes));
    (width == lanes ? multiply_panel<1, start, V, R>
                    : multiply_panel<2, start, V, R>)(a, a_stride, a_step, rows, b_stride ? b + j : b + j * depth,
                                                      b_stride ? b_stride : width,
                                                      bias && start == Start::kColumnBias ? bias + j : bias, depth,
                                                      result + j, result_stride, ahead);
  }
}

// How many steps such a product with packed panels has: those of Ahead.
template <class V, class R>
EVKERNELS_INLINE int64_t product_steps(int64_t rows, int64_t columns, int64_t depth) {
  constexpr int64_t kPanel = kVectors * sizeof(V) / sizeof(R);
  return (rows + kRows - 1) / kRows * ((columns + kPanel - 1) / kPanel) * depth;
}

// to [rows, columns] = f(from), each at its own stride; in place if they are the same. f takes and returns a vector.
template <class V, class From, class To, class F>
EVKERNELS_INLINE void map_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows,
                               int64_t columns, const F& f) {
  constexpr int64_t lanes = Arithmetic<From>::kLanes;
  for (int64_t m = 0; m < rows; ++m, from += from_stride, to += to_stride) {
    int64_t k = 0;
    for (; k + lanes <= columns; k += lanes) store(to + k, f((V)load(from + k)));
    if (k < columns) store_partial(to + k, f((V)load_partial(from + k, columns - k)), columns - k);
  }
}

// The same in another type.
template <class V, class From, class To>
static void convert_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows,
                         int64_t columns) {
  map_rows<V>(from, from_stride, to, to_stride, rows, columns, [](V v) __attribute__((always_inline)) { return v; });
}

// A function for each activation: in one function for all of them the loops take up to 1.3 times as long.
template <Activation kind, class V, class R>
static void activate_rows_as(const R* __restrict__ from, int64_t from_stride, R* __restrict__ to, int64_t to_stride,
                             int64_t rows, int64_t columns) {
  map_rows<V>(from, from_stride, to, to_stride, rows, columns,
              [](V v) __attribute__((always_inline)) { return activate<kind>(v); });
}

template <Activation kind, class V, class R>
static void activate_in_place(R* values, int64_t stride, int64_t rows, int64_t columns) {
  map_rows<V>((const R*)values, stride, values, stride, rows, columns,
              [](V v) __attribute__((always_inline)) { return activate<kind>(v); });
}

// to = activation(from), rounded. Activations are compiled for the computation's type alone: where that of `to` is a
// 16-bit one they work in place, in `from`, and the result is converted.
template <class V, class R, class T>
EVKERNELS_INLINE void activate_rows(Activation kind, R* from, int64_t from_stride, T* to, int64_t to_stride,
                                    int64_t rows, int64_t columns) {
  if constexpr (__is_same(T, R)) {
    with_activation(kind, [&](auto constant) __attribute__((always_inline)) {
      activate_rows_as<decltype(constant)::value, V>((const R*)from, from_stride, to, to_stride, rows, columns);
    });
  } else {
    if (kind != Activation::kNone) {
      with_activation(kind, [&](auto constant) __attribute__((always_inline)) {
        activate_in_place<decltype(constant)::value, V>(from, from_stride, rows, columns);
      });
    }
    convert_rows<V>((const R*)from, from_stride, to, to_stride, rows, columns);
  }
}

// channels_last only: the pointwise weight once more, in panels [O, kVectors * lanes] for the product with d_y.
template <class T>
static void separable_conv2d_pack_backward(const T* __restrict__ pointwise, Compute<T>* __restrict__ panels,
                                           const SeparableShape& s) {
  constexpr int64_t kPanel = kVectors * Arithmetic<T>::kLanes;
  for (int64_t first = 0; first < s.channels; first += kPanel) {
    const int64_t columns = smaller(kPanel, s.channels - first);
    const int64_t width = round_up(columns, Arithmetic<T>::kLanes);
    for (int64_t o = 0; o < s.outputs; ++o) {
      Compute<T>* const row = panels + first * s.outputs + o * width;
      for (int64_t c = 0; c < width; ++c) row[c] = c < columns ? to_float(pointwise[o * s.channels + first + c]) : 0;
    }
  }
}
