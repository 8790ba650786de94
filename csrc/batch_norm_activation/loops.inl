// Loops of batch_norm_activation over channels_last pixels, compiled once per instruction set: moments, outputs, sums
// of the gradient and gradient, a pass over memory each. What is not written here is separable_norm_conv2d's.
//
// Sums are formed per tile in float, relative to the first pixel of their unit where they are moments, and added up in
// double in an order that the shape alone sets. PyTorch's own norm in channels_last adds up a thread's pixels in one
// float, and its gradients have three times the rounding error.

#include "separable_norm_conv2d/norms.inl"

// Units [begin, end): moments of x, as [unit][reference, sum, sum of squares][O].
template <class T>
static void batch_norm_moments(const T* x, double* sums, const SeparableShape& s, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  const int64_t O = s.outputs;
  for (int64_t unit = begin; unit < end; ++unit) {
    double* const to = sums + unit * 3 * O;
    const T* const reference = x + unit * norm_unit_size() * O;
    for (int64_t o = 0; o < O; ++o) {
      to[o] = to_float(reference[o]);
      to[O + o] = to[2 * O + o] = 0;
    }
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      for_vectors<V, Compute<T>>(O, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
        const V middle = load_some(reference + c, lanes);
        const T* const from = x + first * O + c;
        // Several chains of sums, which hide the latency of an addition.
        V sum[4] = {}, square[4] = {};
        for (int64_t m = 0; m < count; m += 4) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            if (m + j >= count) break;
            const V v = load_some(from + (m + j) * O, lanes) - middle;
            sum[j] += v;
            square[j] += v * v;
          }
        }
        add_lanes<V, Compute<T>>((sum[0] + sum[1]) + (sum[2] + sum[3]), to + O + c, lanes);
        add_lanes<V, Compute<T>>((square[0] + square[1]) + (square[2] + square[3]), to + 2 * O + c, lanes);
      });
    });
  }
}

// The gradient of x; for the prefetches see norm_output_sums.
template <class T>
static void batch_norm_input_gradient(const T* x, const T* d_y, const Affine<Compute<T>>& n,
                                      const NormGradient<Compute<T>>& g, T* d_x, const SeparableShape& s, int64_t begin,
                                      int64_t end) {
  using V = typename Arithmetic<T>::Type;
  const int64_t O = s.outputs;
  with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t unit = begin; unit < end; ++unit) {
      for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        for_vectors<V, Compute<T>>(O, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
          const V scale = load(n.scale + c), shift = load(n.shift + c);
          const V k1 = load(g.k1 + c), k2 = load(g.k2 + c), k3 = load(g.k3 + c), mean = load(g.mean + c);
          for (int64_t m = first * O + c; m < (first + count) * O; m += O) {
            const V v = load_some(x + m, lanes);
            __builtin_prefetch(x + m + kPixelsBackward * O);
            __builtin_prefetch(d_y + m + kPixelsBackward * O);
            __builtin_prefetch(d_x + m + kPixelsBackward * O, 1);
            const V after =
                activation_gradient<decltype(kind)::value>(V(v * scale + shift), (V)load_some(d_y + m, lanes));
            store_some(d_x + m, V(after * k1 + ((v - mean) * k2 + k3)), lanes);
          }
        });
      });
    }
  });
}
