// Attention of one head in one partition, forward and backward. Compiled once per instruction set by
// common/foreach_isa.h.
//
// A unit's query, key and value are gathered from the map into rows of the type of the computation, in the first-level
// cache; keys are transposed in registers, so that vectors run over keys. kRows queries at a time have their scores,
// softmax and output computed; scores never leave that cache. The gradient recomputes them for kQueries queries and
// keeps nothing of the forward pass but its arguments.
//
// Rows of `scores` may be read a few numbers beyond their last key, and rows beyond the last token hold anything:
// nothing that is computed of either is stored. Keys beyond the last one are zeros, and their score is minus infinity.
//
// One thread of a shared Xeon with AVX-512, 160x96 pixels, one head of 32, partitions of 6x10: 2.3 ms, of which
// products are 0.95 (124 GFLOP/s), gathering from a map larger than the second-level cache 0.5, softmax 0.55, writing
// the output 0.2. scaled_dot_product_attention and the copies around it take 4 times as long, with the gradient twice
// as long. The exponential function of activations.inl, whose shares below 1e-38 are subnormal, made the whole call
// take twice as long; one row of the softmax at a time instead of kRows took a tenth more.

#include "common/exponential.inl"
#include "conv_lstm_1x1/tiles.inl"
#include "window_attention/products.inl"

// Queries of which the gradient keeps the scores: a multiple of kRows.
constexpr int64_t kQueries = 60;

EVKERNELS_INLINE double larger(double a, double b) { return a > b ? a : b; }
EVKERNELS_INLINE VecF larger(VecF a, VecF b) { return select(a > b, a, b); }

#if EVKERNELS_LANES == 16
#define EVKERNELS_ACROSS(d) \
  0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d, 8 ^ d, 9 ^ d, 10 ^ d, 11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d
#elif EVKERNELS_LANES == 8
#define EVKERNELS_ACROSS(d) 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d
#else
#define EVKERNELS_ACROSS(d) 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d
#endif

// f of all lanes, in every lane; f joins two vectors.
template <int distance = EVKERNELS_LANES / 2, class F>
EVKERNELS_INLINE VecF across_lanes(VecF v, const F& f) {
  v = f(v, __builtin_shufflevector(v, v, EVKERNELS_ACROSS(distance)));
  if constexpr (distance > 1) v = across_lanes<distance / 2>(v, f);
  return v;
}
template <class F>
EVKERNELS_INLINE double across_lanes(double v, const F&) {
  return v;
}
#undef EVKERNELS_ACROSS

// How long the rows and columns of a unit are in memory.
template <class A>
struct Padded {
  int64_t dim, keys, queries;
  explicit Padded(const WindowShape& s)
      : dim(round_up(s.dim, Arithmetic<A>::kLanes)),
        keys(round_up(s.tokens(), Arithmetic<A>::kLanes)),
        queries(round_up(s.tokens(), kRows)) {}
  int64_t rows() const { return (keys > queries ? keys : queries) * dim; }
  int64_t scores(int64_t count) const { return count * keys + kRows; }
};

// Memory of a task: rows of query, key and value, keys by column, scores and outputs of kRows queries.
template <class A>
struct AttentionMemory {
  Padded<A> p;
  A *q, *k, *v, *key_columns, *scores, *out;
  static int64_t size(const WindowShape& s) {
    const Padded<A> p(s);
    return 3 * p.rows() + p.dim * p.keys + p.scores(kRows) + kRows * p.dim;
  }
  AttentionMemory(A* memory, const WindowShape& s) : p(s) {
    q = memory;
    k = q + p.rows();
    v = k + p.rows();
    key_columns = v + p.rows();
    scores = key_columns + p.dim * p.keys;
    out = scores + p.scores(kRows);
  }
};

// The gradient's, in addition.
template <class A>
struct AttentionGradientMemory {
  A *value_columns, *d_out, *d_k, *d_v, *shares, *d_scores;
  static int64_t size(const WindowShape& s) {
    const Padded<A> p(s);
    return p.dim * p.keys + 3 * p.rows() + 2 * p.scores(kQueries);
  }
  AttentionGradientMemory(A* memory, const WindowShape& s) {
    const Padded<A> p(s);
    value_columns = memory;
    d_out = value_columns + p.dim * p.keys;
    d_k = d_out + p.rows();
    d_v = d_k + p.rows();
    shares = d_v + p.rows();
    d_scores = shares + p.scores(kQueries);
  }
};

template <class T>
static int64_t window_attention_memory(const WindowShape& s, bool backward) {
  using A = Compute<T>;
  return AttentionMemory<A>::size(s) + (backward ? AttentionGradientMemory<A>::size(s) : 0);
}

// y[m] = sum over k of a[m * a_stride + k * a_step] * b[k] for kRows rows m, or is added to; rows of b and of y are
// `width` numbers, whole vectors. Not inlined: of these few copies per instruction set the file is made.
template <class A>
static __attribute__((noinline)) void product(const A* a, int64_t a_stride, int64_t a_step, const A* b, int64_t depth,
                                              A* y, int64_t width, bool adds) {
  constexpr int L = Arithmetic<A>::kLanes;
  int64_t n = 0;
  for (; n + 4 * L <= width; n += 4 * L) product_block<4>(a, a_stride, a_step, b + n, width, depth, y + n, width, adds);
  for (; n + 2 * L <= width; n += 2 * L) product_block<2>(a, a_stride, a_step, b + n, width, depth, y + n, width, adds);
  for (; n < width; n += L) product_block<1>(a, a_stride, a_step, b + n, width, depth, y + n, width, adds);
}

// Calls f(token, pixel) for the tokens of a unit in their order, rows first.
template <class F>
EVKERNELS_INLINE void for_each_token(const WindowShape& s, int64_t unit, const F& f) {
  const int64_t partition = unit / s.heads % s.partitions(), sample = unit / s.heads / s.partitions();
  const int64_t i = partition / s.across(), j = partition % s.across();
  const int64_t first = s.grid ? i * s.width + j : i * s.rows * s.width + j * s.columns;
  const int64_t row_step = (s.grid ? s.down() : 1) * s.width, step = s.grid ? s.across() : 1;
  for (int64_t a = 0, token = 0; a < s.rows; ++a)
    for (int64_t b = 0; b < s.columns; ++b, ++token)
      f(token, sample * s.height * s.width + first + a * row_step + b * step);
}

// A row of one token: (from + bias) * factor; bias may be null.
template <class T, class A>
EVKERNELS_INLINE void load_token(const T* from, const A* bias, int64_t dim, A factor, A* to) {
  constexpr int64_t L = Arithmetic<T>::kLanes;
  for (int64_t d = 0; d < dim; d += L) {
    auto value = load_columns(from + d, dim - d);
    if (bias) value = value + load_columns(bias + d, dim - d);
    store(to + d, value * factor);
  }
}

template <class T, class A>
EVKERNELS_INLINE void store_token(const A* from, int64_t dim, typename Arithmetic<A>::Type factor, T* to) {
  for (int64_t d = 0; d < dim; d += Arithmetic<T>::kLanes) store_columns(to + d, load(from + d) * factor, dim - d);
}

template <class A>
static void columns_of(const A* rows, const Padded<A>& p, A* columns) {
  constexpr int64_t L = Arithmetic<A>::kLanes;
  for (int64_t d = 0; d < p.dim; d += L) {
    for (int64_t t = 0; t < p.keys; t += L) {
      typename Arithmetic<A>::Type square[L];
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; ++k) square[k] = load(rows + (t + k) * p.dim + d);
      transpose(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < L; ++k) store(columns + (d + k) * p.keys + t, square[k]);
    }
  }
}

// Query, times the scale of the scores, key and value of a unit.
template <class T, class A>
static void load_unit(const T* qkv, const A* bias, const WindowShape& s, int64_t unit, const AttentionMemory<A>& m) {
  const int64_t first = unit % s.heads * 3 * s.dim;
  const A* const b = bias ? bias + first : nullptr;
  const A scale = (A)(1 / __builtin_sqrt((double)s.dim));
  for_each_token(s, unit, [&](int64_t token, int64_t pixel) EVKERNELS_LOOP_BODY {
    const T* const from = qkv + pixel * 3 * s.channels() + first;
    const int64_t at = token * m.p.dim;
    load_token(from, b, s.dim, scale, m.q + at);
    load_token(from + s.dim, b ? b + s.dim : b, s.dim, A(1), m.k + at);
    load_token(from + 2 * s.dim, b ? b + 2 * s.dim : b, s.dim, A(1), m.v + at);
  });
  columns_of(m.k, m.p, m.key_columns);
}

// Exponentials of kRows rows of scores, in place, and what each row is to be multiplied by to sum to 1.
template <class A, class V>
static void exponentials(A* scores, int64_t tokens, int64_t stride, V (&factors)[kRows]) {
  constexpr int64_t L = Arithmetic<A>::kLanes;
  const A lowest = -__builtin_inf();
  A beyond[L];
  for (int64_t k = 0; k < L; ++k) beyond[k] = stride - L + k < tokens ? 0 : lowest;
  const V last = load(beyond);
  V tops[kRows];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    A* const at = scores + row * stride;
    tops[row] = load(at + stride - L) + last;
    store(at + stride - L, tops[row]);
    for (int64_t j = 0; j + L < stride; j += L) tops[row] = larger(load(at + j), tops[row]);
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
    tops[row] = across_lanes(tops[row], [](V a, V b) EVKERNELS_LOOP_BODY { return larger(a, b); });
    factors[row] = V{};
  }
  for (int64_t j = 0; j < stride; j += L) {
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      A* const at = scores + row * stride + j;
      const V e = exp_negative(tops[row] - load(at));
      store(at, e);
      factors[row] += e;
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row)
    factors[row] = A(1) / across_lanes(factors[row], [](V a, V b) EVKERNELS_LOOP_BODY { return a + b; });
}

// Units begin to end - 1.
template <class T, class A>
static void window_attention_forward(const T* qkv, const A* bias, T* out, const WindowShape& s, int64_t begin,
                                     int64_t end, A* memory) {
  using V = typename Arithmetic<T>::Type;
  const AttentionMemory<A> m(memory, s);
  const int64_t tokens = s.tokens(), dim = m.p.dim, keys = m.p.keys;
  for (int64_t unit = begin; unit < end; ++unit) {
    load_unit(qkv, bias, s, unit, m);
    V factors[kRows];
    for_each_token(s, unit, [&](int64_t token, int64_t pixel) EVKERNELS_LOOP_BODY {
      const int64_t row = token % kRows;
      if (row == 0) {
        product(m.q + token * dim, dim, 1, m.key_columns, s.dim, m.scores, keys, false);
        exponentials(m.scores, tokens, keys, factors);
        product(m.scores, keys, 1, m.v, tokens, m.out, dim, false);
      }
      store_token(m.out + row * dim, s.dim, factors[row], out + pixel * s.channels() + unit % s.heads * s.dim);
    });
  }
}

// Shares of all keys in each of `count` queries from `first` on, and the gradients of their scores.
template <class A>
static void score_gradients(const AttentionMemory<A>& m, const AttentionGradientMemory<A>& g, const WindowShape& s,
                            int64_t first, int64_t count) {
  using V = typename Arithmetic<A>::Type;
  const int64_t dim = m.p.dim, keys = m.p.keys;
  for (int64_t i = 0; i < count; i += kRows) {
    A *const shares = g.shares + i * keys, *const d_scores = g.d_scores + i * keys;
    V factors[kRows];
    product(m.q + (first + i) * dim, dim, 1, m.key_columns, s.dim, shares, keys, false);
    exponentials(shares, s.tokens(), keys, factors);
    product(g.d_out + (first + i) * dim, dim, 1, g.value_columns, s.dim, d_scores, keys, false);
    for (int row = 0; row < kRows; ++row) {
      A *const share = shares + row * keys, *const d = d_scores + row * keys;
      V mean = {};
      for (int64_t j = 0; j < keys; j += Arithmetic<A>::kLanes) {
        store(share + j, load(share + j) * factors[row]);
        mean = multiply_add(load(share + j), load(d + j), mean);
      }
      mean = across_lanes(mean, [](V a, V b) EVKERNELS_LOOP_BODY { return a + b; });
      for (int64_t j = 0; j < keys; j += Arithmetic<A>::kLanes) store(d + j, load(share + j) * (load(d + j) - mean));
    }
  }
}

// Units begin to end - 1.
template <class T, class A>
static void window_attention_backward(const T* grad, const T* qkv, const A* bias, T* d_qkv, const WindowShape& s,
                                      int64_t begin, int64_t end, A* memory) {
  using V = typename Arithmetic<T>::Type;
  const AttentionMemory<A> m(memory, s);
  const AttentionGradientMemory<A> g(memory + AttentionMemory<A>::size(s), s);
  const int64_t tokens = s.tokens(), dim = m.p.dim, keys = m.p.keys;
  const V one = V{} + A(1), scale = V{} + (A)(1 / __builtin_sqrt((double)s.dim));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit % s.heads * s.dim;
    load_unit(qkv, bias, s, unit, m);
    columns_of(m.v, m.p, g.value_columns);
    for_each_token(s, unit, [&](int64_t token, int64_t pixel) EVKERNELS_LOOP_BODY {
      load_token(grad + pixel * s.channels() + head, (const A*)nullptr, s.dim, A(1), g.d_out + token * dim);
    });
    for (int64_t first = 0; first < tokens; first += kQueries) {
      const int64_t count = smaller(kQueries, tokens - first);
      score_gradients(m, g, s, first, count);
      // Queries were last read for these scores and those of keys: their gradients take the place of the former.
      for (int64_t j = 0; j < tokens; j += kRows) {
        product(g.d_scores + j, 1, keys, m.q + first * dim, count, g.d_k + j * dim, dim, first > 0);
        product(g.shares + j, 1, keys, g.d_out + first * dim, count, g.d_v + j * dim, dim, first > 0);
      }
      for (int64_t i = 0; i < count; i += kRows)
        product(g.d_scores + i * keys, keys, 1, m.k, tokens, m.q + (first + i) * dim, dim, false);
    }
    for_each_token(s, unit, [&](int64_t token, int64_t pixel) EVKERNELS_LOOP_BODY {
      T* const to = d_qkv + pixel * 3 * s.channels() + 3 * head;
      store_token(m.q + token * dim, s.dim, scale, to);
      store_token(g.d_k + token * dim, s.dim, one, to + s.dim);
      store_token(g.d_v + token * dim, s.dim, one, to + 2 * s.dim);
    });
  }
}
