// Loops of channel_attention over channels_last pixels, compiled once per instruction set: sums over the pixels of a
// sample, and what is done to every pixel once its sample's sums are known; a pass over memory each.
//
// Sums are formed per tile in float and added up in double in an order that the shape alone sets.

#include "separable_norm_conv2d/norms.inl"

// Units [begin, end): sums [unit][C] of x, or of its products with d_y.
template <bool products, class T>
static void attention_sums(const T* x, const T* d_y, double* sums, const SeparableShape& s, int64_t begin,
                           int64_t end) {
  using V = typename Arithmetic<T>::Type;
  const int64_t C = s.outputs, ahead = kPixelsBackward * C;
  for (int64_t unit = begin; unit < end; ++unit) {
    double* const to = sums + unit * C;
    for (int64_t c = 0; c < C; ++c) to[c] = 0;
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      for_vectors<V, Compute<T>>(C, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
        // Several chains of sums, which hide the latency of an addition.
        V sum[4] = {};
        for (int64_t m = 0; m < count; m += 4) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            if (m + j >= count) break;
            const int64_t at = (first + m + j) * C + c;
            V v = load_some(x + at, lanes);
            __builtin_prefetch(x + at + ahead);
            if constexpr (products) {
              v *= (V)load_some(d_y + at, lanes);
              __builtin_prefetch(d_y + at + ahead);
            }
            sum[j] += v;
          }
        }
        add_lanes<V, Compute<T>>((sum[0] + sum[1]) + (sum[2] + sum[3]), to + c, lanes);
      });
    });
  }
}

// to = from * scale + shift, with those of the sample.
template <class T>
static void attention_scale(const T* from, const Affine<Compute<T>>& rows, T* to, const SeparableShape& s,
                            int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  const int64_t C = s.outputs;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Affine<Compute<T>> n = rows.at(unit / norm_units(s));
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      for (int64_t m = first * C; m < (first + count) * C; m += C) {
        for_vectors<V, Compute<T>>(C, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
          const V v = load_some(from + m + c, lanes) * (V)load(n.scale + c) + (V)load(n.shift + c);
          store_some(to + m + c, v, lanes);
        });
      }
    });
  }
}
