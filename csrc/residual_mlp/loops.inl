// Layer norm, linear map, GELU, linear map, scale and addition for tiles of kTile rows, which stay in the second-level
// cache from the norm to the sum. Compiled once per instruction set by common/foreach_isa.h.
//
// Rows are pixels, and vectors run over channels. Both weights are packed once per call: panels of up to four vectors
// of outputs, all of whose inputs follow each other, so that a product streams through memory. Sums run over all inputs
// in ascending order, in parts of kDepth, then the bias is added: results do not depend on tiles or threads. Channels
// beyond the last one are zeros in everything that is read; rows beyond the last one hold anything and are not stored.
//
// One thread of a shared Xeon with AVX-512, `python -m benchmarks residual_mlp`, against PyTorch's operators in
// place: 1.3 times as fast at 32 and 64 channels, 1.1 at 128, 0.94 at 256, where either side spends its time in
// products at 100 GFLOP/s. What is saved is the hidden layer's way through memory and, in a library's linear map, the
// copy of the bias. At 32 channels a third of the time is GELU. Sums in one go over all inputs lost three times as much
// as the library's at 2048 of them, and read panels from the second-level cache.

#include "common/activations.inl"
#include "conv_lstm_1x1/tiles.inl"
#include "window_attention/products.inl"

// Rows of a tile, a multiple of kRows, and inputs whose products are summed in one go: that much of a panel stays in
// the first-level cache while all rows pass, and long sums lose less in parts.
constexpr int64_t kTile = 96, kDepth = 128;
static int64_t residual_mlp_tile() { return kTile; }

// Vectors of the panel that begins at output `n` of `width`, whole vectors.
template <class A>
EVKERNELS_INLINE int64_t panel_vectors(int64_t n, int64_t width) {
  const int64_t left = (width - n) / Arithmetic<A>::kLanes;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class A>
struct MlpMemory {
  int64_t width, hidden;  // of rows, whole vectors
  A *rows, *layer;
  static int64_t padded(int64_t size) { return round_up(size, Arithmetic<A>::kLanes); }
  static int64_t size(const MlpShape& s) { return kTile * (padded(s.channels) + padded(s.hidden)); }
  MlpMemory(A* memory, const MlpShape& s) : width(padded(s.channels)), hidden(padded(s.hidden)) {
    rows = memory;
    layer = rows + kTile * width;
  }
};
template <class T>
static int64_t residual_mlp_memory(const MlpShape& s) {
  return MlpMemory<Compute<T>>::size(s);
}
template <class T>
static int64_t residual_mlp_packed_size(int64_t inputs, int64_t outputs) {
  return inputs * MlpMemory<Compute<T>>::padded(outputs);
}

// Panels of a weight [outputs, inputs].
template <class T, class A>
static void residual_mlp_pack(const T* weight, int64_t inputs, int64_t outputs, A* packed) {
  constexpr int64_t L = Arithmetic<T>::kLanes;
  const int64_t width = MlpMemory<A>::padded(outputs);
  for (int64_t n = 0; n < width;) {
    const int64_t size = panel_vectors<A>(n, width) * L;
    for (int64_t k = 0; k < inputs; k += L) {
      for (int64_t j = 0; j < size; j += L) {
        typename Arithmetic<T>::Type square[L];
        for (int64_t r = 0; r < L; ++r) {
          const int64_t o = n + j + r;
          square[r] = o < outputs ? load_columns(weight + o * inputs + k, inputs - k) : typename Arithmetic<T>::Type{};
        }
        transpose(square);
        for (int64_t r = 0; r < L && k + r < inputs; ++r) store(packed + n * inputs + (k + r) * size + j, square[r]);
      }
    }
    n += size;
  }
}

// kRows rows of a panel's outputs, or what is added to them. Not inlined: of these few copies per instruction set the
// file is made.
template <class A>
static __attribute__((noinline)) void panel_product(const A* rows, int64_t stride, const A* panel, int64_t vectors,
                                                    int64_t depth, A* y, int64_t y_stride, bool adds) {
  constexpr int L = Arithmetic<A>::kLanes;
  switch (vectors) {
    case 4:
      return product_block<4>(rows, stride, 1, panel, 4 * L, depth, y, y_stride, adds);
    case 2:
      return product_block<2>(rows, stride, 1, panel, 2 * L, depth, y, y_stride, adds);
    default:
      return product_block<1>(rows, stride, 1, panel, L, depth, y, y_stride, adds);
  }
}

// y [count, width] = rows [count, inputs] times packed panels; calls finish(n, size) when the outputs n to n + size - 1
// of all rows are done.
template <class A, class F>
EVKERNELS_INLINE void linear(const A* rows, int64_t stride, const A* packed, int64_t inputs, A* y, int64_t width,
                             int64_t count, const F& finish) {
  for (int64_t n = 0; n < width;) {
    const int64_t vectors = panel_vectors<A>(n, width), size = vectors * Arithmetic<A>::kLanes;
    for (int64_t k = 0; k < inputs; k += kDepth) {
      for (int64_t r = 0; r < count; r += kRows)
        panel_product(rows + r * stride + k, stride, packed + n * inputs + k * size, vectors,
                      smaller(kDepth, inputs - k), y + r * width + n, width, k > 0);
    }
    finish(n, size);
    n += size;
  }
}

template <class A>
EVKERNELS_INLINE A sum_of_lanes(typename Arithmetic<A>::Type v) {
  constexpr int L = Arithmetic<A>::kLanes;
  A lanes[L];
  store(lanes, v);
  for (int step = L / 2; step > 0; step /= 2)
    for (int k = 0; k < step; ++k) lanes[k] += lanes[k + step];
  return lanes[0];
}

// One row, normalised. Its mean is taken away before squares are summed.
template <class T, class A>
static void normalise(const T* x, const MlpShape& s, const MlpVectors<A>& p, A* row) {
  using V = typename Arithmetic<A>::Type;
  constexpr int64_t L = Arithmetic<A>::kLanes;
  V sum = {}, squares = {};
  for (int64_t c = 0; c < s.channels; c += L) sum = sum + load_columns(x + c, s.channels - c);
  const A mean = sum_of_lanes<A>(sum) / s.channels;
  for (int64_t c = 0; c < s.channels; c += L) {
    V d = load_columns(x + c, s.channels - c) - mean;
    store(row + c, d);
    if (s.channels - c < L) d = load_columns(row + c, s.channels - c);
    squares = multiply_add(d, d, squares);
  }
  const A variance = sum_of_lanes<A>(squares) / s.channels + (A)s.eps;
  const A factor = 1 / (sizeof(A) == 8 ? (A)__builtin_sqrt((double)variance) : (A)__builtin_sqrtf((float)variance));
  for (int64_t c = 0; c < s.channels; c += L)
    store(row + c, multiply_add(load(row + c) * factor, load(p.norm_weight + c), load(p.norm_bias + c)));
}

// Tiles begin to end - 1.
template <class T, class A>
static void residual_mlp_forward(const T* x, const A* packed1, const A* packed2, const MlpVectors<A>& p, T* y,
                                 const MlpShape& s, int64_t begin, int64_t end, A* memory) {
  using V = typename Arithmetic<A>::Type;
  constexpr int64_t L = Arithmetic<A>::kLanes;
  const MlpMemory<A> m(memory, s);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTile, count = smaller(kTile, s.count - first);
    for (int64_t r = 0; r < count; ++r) normalise(x + (first + r) * s.channels, s, p, m.rows + r * m.width);
    linear(m.rows, m.width, packed1, s.channels, m.layer, m.hidden, count,
           [&](int64_t n, int64_t size) EVKERNELS_LOOP_BODY {
             for (int64_t r = 0; r < count; ++r) {
               A* const to = m.layer + r * m.hidden;
               for (int64_t k = n; k < n + size; k += L)
                 store(to + k, activate<Activation::kGelu>(load(to + k) + load(p.bias1 + k)));
             }
           });
    // Normalised rows have been read for the last time.
    linear(m.layer, m.hidden, packed2, s.hidden, m.rows, m.width, count,
           [&](int64_t n, int64_t size) EVKERNELS_LOOP_BODY {
             for (int64_t r = 0; r < count; ++r) {
               const int64_t at = (first + r) * s.channels;
               for (int64_t c = n; c < smaller(n + size, s.channels); c += L) {
                 const V branch = load(m.rows + r * m.width + c) + load(p.bias2 + c);
                 const V before = load_columns(x + at + c, s.channels - c);
                 store_columns(y + at + c, multiply_add(branch, load(p.scale + c), before), s.channels - c);
               }
             }
           });
  }
}
