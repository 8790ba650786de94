// Loops of separable_conv2d over tiles of output pixels, compiled once per instruction set.
//
// A tile's depthwise result, activated, stays in a buffer in the cache; the pointwise product reads it from there and
// writes the output once. The product keeps kRows x kVectors accumulators in registers. channels_last: rows are pixels,
// vectors run over output channels, the pointwise weight is packed into panels of that width. NCHW: rows are output
// channels, vectors run over pixels. Every output element is one sum over the channels in ascending order, whatever
// the tile, so that results do not depend on threads.
//
// channels_last reads the input in place. NCHW first copies a channel's rows under the tile into a zero-padded buffer,
// which rids the vectors of borders, 16-bit types and row ends; that copy costs less than handling them at each tap.

#include "common/activations.inl"

constexpr int kRows = 6;
constexpr int kVectors = EVKERNELS_LANES == 16 ? 4 : 2;
// Pixels of a tile. A multiple of kRows and of kVectors * lanes in turn, small enough for buffer and weights to stay in
// the second-level cache, in channels_last nearly in the first.
constexpr int64_t kPixelsLast = 48;
constexpr int64_t kPixelsFirst = 192;

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
};

template <class T>
static Packed<Compute<T>> packed_at(Compute<T>* memory, const SeparableShape& s) {
  const int64_t channels = round_up(s.channels, Arithmetic<T>::kLanes);
  const int64_t outputs = round_up(round_up(s.outputs, kRows), Arithmetic<T>::kLanes);
  Packed<Compute<T>> p;
  p.depthwise = memory;
  p.depthwise_bias = p.depthwise + s.size * s.size * channels;
  p.pointwise = p.depthwise_bias + channels;
  p.pointwise_bias = p.pointwise + outputs * s.channels;
  p.channels = channels;
  p.outputs = outputs;
  p.size = p.pointwise_bias + outputs - memory;
  return p;
}

// Elements of packed weights, with room for a block of rows that reaches behind them.
template <class T>
static int64_t separable_conv2d_packed_size(const SeparableShape& s) {
  return packed_at<T>(nullptr, s).size + kRows;
}

template <class T>
static void separable_conv2d_pack(const T* __restrict__ depthwise, const T* __restrict__ depthwise_bias,
                                  const T* __restrict__ pointwise, const T* __restrict__ pointwise_bias,
                                  Compute<T>* memory, const SeparableShape& s, bool channels_last) {
  const auto p = packed_at<T>(memory, s);
  const int64_t C = s.channels, O = s.outputs, taps = s.size * s.size;
  for (int64_t k = 0; k < p.size; ++k) memory[k] = 0;
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t k = 0; k < taps; ++k) {
      p.depthwise[channels_last ? k * p.channels + c : c * taps + k] = to_float(depthwise[c * taps + k]);
    }
    if (depthwise_bias) p.depthwise_bias[c] = to_float(depthwise_bias[c]);
  }
  for (int64_t o = 0; pointwise_bias && o < O; ++o) p.pointwise_bias[o] = to_float(pointwise_bias[o]);
  if (!channels_last) {
    for (int64_t k = 0; k < O * C; ++k) p.pointwise[k] = to_float(pointwise[k]);
    return;
  }
  constexpr int64_t kPanel = kVectors * Arithmetic<T>::kLanes, kStrip = 16;
  for (int64_t first = 0; first < O; first += kPanel) {
    const int64_t columns = smaller(kPanel, O - first);
    const int64_t width = round_up(columns, Arithmetic<T>::kLanes);
    // Strips of channels, so that the transposed writes stay in the first-level cache.
    for (int64_t strip = 0; strip < C; strip += kStrip) {
      for (int64_t o = 0; o < columns; ++o) {
        for (int64_t c = strip; c < smaller(strip + kStrip, C); ++c) {
          p.pointwise[first * C + c * width + o] = to_float(pointwise[(first + o) * C + c]);
        }
      }
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

// What is added to the sums of a product: a bias per column or per row (null: nothing), or what the result holds.
enum class Start { kColumnBias, kRowBias, kResult };

// kRows x (vectors * lanes) of a product: result[m][j] = sum over k of a[m * a_stride + k * a_step] * b[k][j].
template <int vectors, Start start, class V, class R>
EVKERNELS_INLINE void product(const R* __restrict__ a, int64_t a_stride, int64_t a_step, const R* __restrict__ b,
                              int64_t b_stride, const R* __restrict__ bias, int64_t depth, R* __restrict__ result,
                              int64_t result_stride) {
  constexpr int lanes = sizeof(V) / sizeof(R);
  V sum[kRows][vectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      sum[m][n] = start == Start::kResult ? (V)load(result + m * result_stride + n * lanes) : V{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    V column[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) column[n] = load(b + k * b_stride + n * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const V row = V{} + a[m * a_stride + k * a_step];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[m][n] += row * column[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      // The bias comes last: a sum that starts from a large one rounds every small product to the bias's own unit.
      if (start == Start::kRowBias && bias) sum[m][n] += bias[m];
      if (start == Start::kColumnBias && bias) sum[m][n] += (V)load(bias + n * lanes);
      store(result + m * result_stride + n * lanes, sum[m][n]);
    }
  }
}

// One register block, from the product to the output: y [rows, columns] at a stride of y_stride.
template <int vectors, Start start, class V, class R, class T>
static void product_block(const R* a, int64_t a_stride, const R* b, int64_t b_stride, const R* bias, int64_t depth,
                          Activation activation, T* __restrict__ y, int64_t y_stride, int64_t rows, int64_t columns) {
  constexpr int lanes = sizeof(V) / sizeof(R);
  alignas(64) R tile[kRows * vectors * lanes];
  product<vectors, start, V>(a, a_stride, 1, b, b_stride, bias, depth, tile, vectors * lanes);
  activate_buffer<V>(activation, tile, rows * vectors * lanes);
  for (int64_t m = 0; m < rows; ++m) {
    for (int n = 0; n < vectors; ++n) {
      const V value = load(tile + (m * vectors + n) * lanes);
      const int64_t left = columns - n * lanes;
      if (left >= lanes) {
        store(y + m * y_stride + n * lanes, value);
      } else if (left > 0) {
        store_partial(y + m * y_stride + n * lanes, value, left);
      }
    }
  }
}

// product_block for as many vectors as `columns` needs.
template <Start start, class V, class R, class... Rest>
EVKERNELS_INLINE void product_columns(int64_t columns, Rest... rest) {
  switch ((columns + sizeof(V) / sizeof(R) - 1) / (sizeof(V) / sizeof(R))) {
    case 1:
      return product_block<1, start, V, R>(rest..., columns);
    case 2:
      return product_block<2, start, V, R>(rest..., columns);
    case 3:
      if constexpr (kVectors > 2) return product_block<3, start, V, R>(rest..., columns);
      break;
    default:
      if constexpr (kVectors > 2) return product_block<4, start, V, R>(rest..., columns);
  }
}

#include "separable_conv2d/channels_last.inl"
#include "separable_conv2d/channels_first.inl"

static int64_t separable_conv2d_tiles(const SeparableShape& s, bool channels_last) {
  const int64_t pixels = s.out_height * s.out_width;
  return channels_last ? (s.batch * pixels + kPixelsLast - 1) / kPixelsLast : s.batch * tiling_of(s).tiles;
}

// Elements that each thread needs.
template <class T>
static int64_t separable_conv2d_buffer_size(const SeparableShape& s, bool channels_last) {
  return channels_last ? kPixelsLast * round_up(s.channels, Arithmetic<T>::kLanes)
                       : (s.channels + 1) * kPixelsFirst + separable_conv2d_patch_size(s);
}

#include "separable_conv2d/backward.inl"
