// Blocks of timestamps through the router, forward and backward. Compiled once per instruction set by
// common/foreach_isa.h.
//
// Vectors run over timestamps: products need no horizontal step, and softmax and ranks are a few operations per expert.
// Hidden layers of a block stay in the first-level cache; biases are weights of one more input, which is 1.
//
// One thread of a shared Xeon with AVX-512, 19,200 timestamps, K-MOTE's sizes (1, 64, 32, 4), by `python -m benchmarks
// expert_router`: half the speed of a library's large product, 6.4 times as fast as plain PyTorch and 4 times as fast
// as torch.compile, which sort for the largest weights and write hidden layers to memory; with gradients 2.4 and 1.8. A
// block's inputs are transposed in registers, because element by element, 17 of them made the forward pass take 1.7
// times as long.

#include "learnable_time_embedding/columns.inl"
#include "learnable_time_embedding/features.inl"
#include "learnable_time_embedding/products.inl"
#include "common/exponential.inl"

EVKERNELS_INLINE VecF larger(VecF a, VecF b) { return select(a < b, b, a); }
EVKERNELS_INLINE double larger(double a, double b) { return a < b ? b : a; }
EVKERNELS_INLINE VecF is_above(VecF a, VecF b) { return select(a > b, splat(1.0f), VecF{}); }
EVKERNELS_INLINE double is_above(double a, double b) { return a > b; }
EVKERNELS_INLINE VecF is_at_least(VecF a, VecF b) { return select(a >= b, splat(1.0f), VecF{}); }
EVKERNELS_INLINE double is_at_least(double a, double b) { return a >= b; }

// Memory of a task: for every layer what it is fed, [room] each, the first by time; gates; with gradients, those of two
// layers and those of outputs by timestamp.
template <class A>
struct RouterBlock {
  A *layers[4], *gates, *d_out, *d_in, *by_time;
  static int64_t size(const RouterShape& s, bool backward) {
    int64_t rows = s.room(3);
    for (int k = 0; k < 4; ++k) rows += s.room(k);
    return kTimes * (rows + (backward ? 3 * s.most_room() : 0));
  }
  RouterBlock(A* memory, const RouterShape& s) {
    for (int k = 0; k < 4; ++k) {
      layers[k] = memory;
      memory += s.room(k) * kTimes;
    }
    gates = memory;
    d_out = gates + s.room(3) * kTimes;
    d_in = d_out + s.most_room() * kTimes;
    by_time = d_in + s.most_room() * kTimes;
  }
};

// y[o] = sum over rows of weight[row][o] * x[row], not below 0 if kRectified. Writes whole tiles.
template <bool kRectified, class A>
static void layer_forward(const A* x, int64_t rows, const A* weight, int64_t outputs, A* y) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const int64_t width = padded(outputs);
  for (int64_t o = 0; o < outputs; o += kTile) {
    for (int64_t n = 0; n < kTimes; n += 2 * L) {
      V sums[kTile][2] = {};
      for (int64_t m = 0; m < rows; ++m) {
        const A* const w = weight + m * width + o;
        const V left = load(x + m * kTimes + n), right = load(x + m * kTimes + n + L);
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) {
          const V factor = broadcast(V{}, w[r]);
          sums[r][0] = multiply_add(factor, left, sums[r][0]);
          sums[r][1] = multiply_add(factor, right, sums[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        for (int k = 0; k < 2; ++k) {
          const V sum = sums[r][k];
          store(y + (o + r) * kTimes + n + k * L, kRectified ? where_less(sum, A(0), V{}, sum) : sum);
        }
      }
    }
  }
}

// How many experts weigh more than expert k, or the same and come before it.
template <class A>
EVKERNELS_INLINE typename Arithmetic<A>::Type rank_of(const A* weights, int64_t k, int64_t experts) {
  using V = typename Arithmetic<A>::Type;
  const V own = load(weights + k * kTimes);
  V rank = {};
  for (int64_t j = 0; j < experts; ++j) {
    const V other = load(weights + j * kTimes);
    if (j < k) rank = rank + is_at_least(other, own);
    if (j > k) rank = rank + is_above(other, own);
  }
  return rank;
}

// From logits to weights, in place, and gates.
template <class A>
static void choose(A* weights, A* gates, int64_t experts, int64_t top) {
  using V = typename Arithmetic<A>::Type;
  for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
    A *const w = weights + n, *const g = gates + n;
    V most = load(w), sum = {};
    for (int64_t k = 1; k < experts; ++k) most = larger(most, load(w + k * kTimes));
    for (int64_t k = 0; k < experts; ++k) {
      const V e = exp_negative(most - load(w + k * kTimes));
      store(w + k * kTimes, e);
      sum = sum + e;
    }
    for (int64_t k = 0; k < experts; ++k) store(w + k * kTimes, load(w + k * kTimes) / sum);
    for (int64_t k = 0; k < experts; ++k)
      store(g + k * kTimes, where_less(rank_of(w, k, experts), A(top), load(w + k * kTimes), V{}));
  }
}

// Weights and gates of `count` timestamps, whose inputs are rows of x.
template <class T, class A>
static void route_block(const T* x, int64_t count, const A* weights, const RouterShape& s, const RouterBlock<A>& b) {
  if (s.sizes[0] == 1) {
    for (int64_t n = 0; n < kTimes; ++n) b.layers[0][n] = n < count ? to_float(x[n]) : A(0);
  } else {
    columns_of(x, count, s.sizes[0], b.layers[0]);
  }
  for (int k = 0; k < 3; ++k) {
    A* const bias = b.layers[k] + s.sizes[k] * kTimes;
    for (int64_t n = 0; n < kTimes; ++n) {
      bias[n] = 1;
      bias[kTimes + n] = 0;
    }
    if (k < 2) {
      layer_forward<true>(b.layers[k], s.sizes[k] + 1, weights, s.sizes[k + 1], b.layers[k + 1]);
    } else {
      layer_forward<false>(b.layers[k], s.sizes[k] + 1, weights, s.sizes[k + 1], b.layers[k + 1]);
    }
    weights += s.layer_weights(k);
  }
  choose(b.layers[3], b.gates, s.sizes[3], s.top);
}

// The first `count` numbers of `from`, rounded.
template <class T, class A>
static void write_row(const A* from, int64_t count, T* to) {
  constexpr int L = Arithmetic<A>::kLanes;
  int64_t n = 0;
  for (; n + L <= count; n += L) store(to + n, load(from + n));
  for (; n < count; ++n) to[n] = from_float<T>(from[n]);
}

// Timestamps begin to end - 1 of N, `begin` at the start of a block.
template <class T, class A>
static void expert_router_forward(const T* x, T* weights_out, T* gates_out, const A* weights, const RouterShape& s,
                                  int64_t N, int64_t begin, int64_t end, A* memory) {
  const RouterBlock<A> b(memory, s);
  for (; begin < end; begin += kTimes) {
    const int64_t count = end - begin < kTimes ? end - begin : kTimes;
    route_block(x + begin * s.sizes[0], count, weights, s, b);
    for (int64_t k = 0; k < s.sizes[3]; ++k) {
      write_row(b.layers[3] + k * kTimes, count, weights_out + k * N + begin);
      write_row(b.gates + k * kTimes, count, gates_out + k * N + begin);
    }
  }
}

// Gradients of the logits, into b.d_out, from those of weights and gates, either of which may be null.
template <class T, class A>
static void logit_gradients(const T* d_weights, const T* d_gates, int64_t N, int64_t count, const RouterShape& s,
                            const RouterBlock<A>& b) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const int64_t experts = s.sizes[3];
  A of_weight[kTimes] = {}, of_gate[kTimes] = {};
  V mean[kTimes / L] = {};
  for (int64_t k = 0; k < experts; ++k) {
    for (int64_t n = 0; n < count; ++n) {
      if (d_weights) of_weight[n] = to_float(d_weights[k * N + n]);
      if (d_gates) of_gate[n] = to_float(d_gates[k * N + n]);
    }
    for (int64_t n = 0; n < kTimes; n += L) {
      const V rank = rank_of(b.layers[3] + n, k, experts);
      const V d = load(of_weight + n) + where_less(rank, A(s.top), load(of_gate + n), V{});
      mean[n / L] = multiply_add(d, load(b.layers[3] + k * kTimes + n), mean[n / L]);
      store(b.d_out + k * kTimes + n, d);
    }
  }
  for (int64_t k = 0; k < experts; ++k) {
    for (int64_t n = 0; n < kTimes; n += L) {
      A* const d = b.d_out + k * kTimes + n;
      store(d, (load(d) - mean[n / L]) * load(b.layers[3] + k * kTimes + n));
    }
  }
}

// Gradients of one chunk of timestamps, `begin` at the start of a block: d_x, and the chunk's part of those of the
// weights, laid out as they are. `list` is memory for the numbers of most_room + kRows rows.
template <class T, class A>
static void expert_router_backward(const T* d_weights, const T* d_gates, const T* x, T* d_x, A* sums, const A* weights,
                                   const RouterShape& s, int64_t N, int64_t begin, int64_t end, A* memory,
                                   int32_t* list) {
  using V = typename Arithmetic<A>::Type;
  RouterBlock<A> b(memory, s);
  for (int64_t k = 0; k < s.weights(); ++k) sums[k] = 0;
  for (; begin < end; begin += kTimes) {
    const int64_t count = end - begin < kTimes ? end - begin : kTimes;
    route_block(x + begin * s.sizes[0], count, weights, s, b);
    logit_gradients(d_weights ? d_weights + begin : nullptr, d_gates ? d_gates + begin : nullptr, N, count, s, b);
    int64_t at = s.weights();
    for (int k = 2; k >= 0; --k) {
      at -= s.layer_weights(k);
      const int64_t inputs = s.sizes[k], outputs = s.sizes[k + 1], width = padded(outputs);
      for (int64_t m = 0; m < inputs + 1 + kRows; ++m) list[m] = (int32_t)(m <= inputs ? m : inputs + 1);
      rows_of(b.d_out, kTimes, outputs, width, b.by_time);
      add_weight_gradients(b.layers[k], list, inputs + 1, b.by_time, outputs, sums + at);
      row_gradients(b.d_out, outputs, weights + at, list, inputs, b.d_in);
      for (int64_t m = 0; k > 0 && m < inputs * kTimes; m += Arithmetic<A>::kLanes)
        store(b.d_in + m, where_equal(load(b.layers[k] + m), A(0), V{}, load(b.d_in + m)));
      A* const from = b.d_out;
      b.d_out = b.d_in;
      b.d_in = from;
    }
    rows_of(b.d_out, count, s.sizes[0], s.sizes[0], d_x + begin * s.sizes[0]);
  }
}

template <class A>
static int64_t router_memory(const RouterShape& s, bool backward) {
  return RouterBlock<A>::size(s, backward);
}
