// Loops of batch_norm_activation over channels_last pixels, compiled once per instruction set: moments, outputs, sums
// of the gradient and gradient, a pass over memory each. What is not written here is separable_norm_conv2d's. A
// projection to one map is added up in the outputs' pass: what it projects is never in memory.
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

// Adds the weighted outputs of some columns to totals [pixels].
template <Activation kind, class V, class R>
static void project(Columns k, const R* x, Affine<R> n, const R* weights, V* totals) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  for (int64_t c = 0; c < k.count; c += lanes) {
    const V scale = load(n.scale + c), shift = load(n.shift + c), weight = load(weights + c);
    for (int64_t m = 0; m < k.pixels; ++m) {
      const R* const at = x + m * k.stride() + c;
      __builtin_prefetch(at + kPixelsBackward * k.stride());
      totals[m] += activate<kind>(V((V)load(at) * scale + shift)) * weight;
    }
  }
}

// y[pixel] = sum of activation(norm(x)) times the weights over the channels.
template <class T>
static void batch_norm_projection(const T* x, const Affine<Compute<T>>& n, const Compute<T>* weights, T* y,
                                  const SeparableShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  for (int64_t unit = begin; unit < end; ++unit) {
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      V totals[kPixelsBackward] = {};
      for_columns<T>(s.outputs, first, count, [&](const Columns& k) __attribute__((always_inline)) {
        ColumnBuffer<T> buffer;
        const R* const from = k.read(x, buffer);
        with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
          project<decltype(kind)::value>(k, from, n.at(0, k.first), weights + k.first, totals);
        });
      });
      for (int64_t m = 0; m < count; ++m) {
        R lanes[Arithmetic<T>::kLanes], sum = 0;
        store(lanes, totals[m]);
        for (const R lane : lanes) sum += lane;
        y[first + m] = from_float<T>(sum);
      }
    });
  }
}

// The gradient of x.
template <bool projected, class T>
static void batch_norm_input_gradient(const T* x, const T* d_y, const Compute<T>* projection,
                                      const Affine<Compute<T>>& n, const NormGradient<Compute<T>>& g, T* d_x,
                                      const SeparableShape& s, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  for (int64_t unit = begin; unit < end; ++unit) {
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      for_columns<T>(s.outputs, first, count, [&](const Columns& k) __attribute__((always_inline)) {
        ColumnBuffer<T> buffer, more;
        const Compute<T>*const from = k.read(x, buffer), *const d = read_gradient<projected>(k, d_y, more);
        Compute<T>* const to = k.result(d_x, buffer);
        with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
          input_gradient_of<decltype(kind)::value, projected, V>(k, from, d, projection, n.at(0, k.first),
                                                                 g.at(0, k.first), to, k.stride(), nullptr);
        });
        k.write(to, d_x);
      });
    });
  }
}
