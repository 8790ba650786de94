// A norm with live statistics over channels_last pixels, as far as it does not matter what made them: how pixels are
// shared out, outputs, and the sums that its gradient needs. Compiled once per instruction set.

#include "separable_conv2d/products.inl"

// Tiles that one task sums up: the gradient of the pointwise weight is added up once for each.
constexpr int64_t kTilesPerUnit = 16;

static int64_t norm_unit_size() { return kPixelsBackward * kTilesPerUnit; }

static int64_t norm_units(const SeparableShape& s) {
  return (s.out_height * s.out_width + norm_unit_size() - 1) / norm_unit_size();
}

// Calls f(first pixel of all samples' pixels, how many) for the tiles of a unit; units are numbered through samples.
template <class F>
EVKERNELS_INLINE void for_tiles(const SeparableShape& s, int64_t unit, const F& f) {
  const int64_t pixels = s.out_height * s.out_width, units = norm_units(s), sample = unit / units;
  const int64_t begin = unit % units * kPixelsBackward * kTilesPerUnit;
  const int64_t end = smaller(begin + kPixelsBackward * kTilesPerUnit, pixels);
  for (int64_t k = begin; k < end; k += kPixelsBackward) f(sample * pixels + k, smaller(kPixelsBackward, end - k));
}

// Adds a vector's lanes to the sums of channels [c, channels).
template <class V, class R>
EVKERNELS_INLINE void add_lanes(V sum, double* to, int64_t left) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  R values[lanes];
  store(values, sum);
  for (int64_t l = 0; l < smaller(lanes, left); ++l) to[l] += values[l];
}

// f(column, how many of a vector's lanes are channels) for all vectors of [channels].
template <class V, class R, class F>
EVKERNELS_INLINE void for_vectors(int64_t channels, const F& f) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) f(c, lanes);
  if (c < channels) f(c, channels - c);
}
template <class T>
EVKERNELS_INLINE typename Arithmetic<T>::Type load_some(const T* p, int64_t count) {
  return count == Arithmetic<T>::kLanes ? load(p) : load_partial(p, count);
}
template <class T>
EVKERNELS_INLINE void store_some(T* p, typename Arithmetic<T>::Type v, int64_t count) {
  if (count == Arithmetic<T>::kLanes) {
    store(p, v);
  } else {
    store_partial(p, v, count);
  }
}

// y = activation(norm(pre)) + residual, which may be null.
template <class T>
static void norm_outputs(const T* pre, const Affine<Compute<T>>& norm, const T* residual, T* y, const SeparableShape& s,
                         int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  const int64_t O = s.outputs;
  with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Affine<Compute<T>> n = norm.at(unit / norm_units(s));
      for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        for (int64_t m = first * O; m < (first + count) * O; m += O) {
          for_vectors<V, Compute<T>>(O, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
            const V z = load_some(pre + m + c, lanes) * (V)load(n.scale + c) + (V)load(n.shift + c);
            V value = activate<decltype(kind)::value>(z);
            if (residual) value += load_some(residual + m + c, lanes);
            store_some(y + m + c, value, lanes);
          });
        }
      });
    }
  });
}

// The gradient of an output's channels [c, c + lanes), pixel by pixel: as it is read, or, of an output that is
// projected to one map, that map's times the projection's weights. A tile is read column by column, which a processor
// does not foresee: without the prefetches batch_norm_activation's gradient takes 1.5 times as long for 32 channels at
// 260x346.
template <bool projected, class T>
EVKERNELS_INLINE auto output_gradient(const T* d_output, const Compute<T>* projection, int64_t channels, int64_t c,
                                      int64_t lanes) {
  using V = typename Arithmetic<T>::Type;
  V weights = {};
  if constexpr (projected) weights = load(projection + c);
  return [=](int64_t pixel) __attribute__((always_inline)) {
    if constexpr (projected) return V(weights * to_float(d_output[pixel]));
    const T* const at = d_output + pixel * channels + c;
    __builtin_prefetch(at + kPixelsBackward * channels);
    return load_some(at, lanes);
  };
}

// Sums of the gradient after the second norm, of its products with that norm's normalised input and, with a projection,
// of the products of its map's gradient with the output: [unit][2 or 3][O]. `normal` normalises alone, `norm` is the
// whole norm.
template <bool projected, class T>
static void norm_output_sums(const T* pre, const T* d_output, const Compute<T>* projection,
                             const Affine<Compute<T>>& norm, const Affine<Compute<T>>& normal, double* sums,
                             const SeparableShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const int64_t O = s.outputs, size = (projected ? 3 : 2) * O;
  with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Affine<R> n = norm.at(unit / norm_units(s)), plain = normal.at(unit / norm_units(s));
      double* const to = sums + unit * size;
      for (int64_t o = 0; o < size; ++o) to[o] = 0;
      for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        for_vectors<V, R>(O, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
          const V scale = load(n.scale + c), shift = load(n.shift + c);
          const V unit_scale = load(plain.scale + c), unit_shift = load(plain.shift + c);
          const auto gradient = output_gradient<projected>(d_output, projection, O, c, lanes);
          V sum = {}, product = {}, output_product = {};
          for (int64_t pixel = first; pixel < first + count; ++pixel) {
            __builtin_prefetch(pre + (pixel + kPixelsBackward) * O + c);
            const V v = load_some(pre + pixel * O + c, lanes), z = v * scale + shift;
            const V d = activation_gradient<decltype(kind)::value>(z, gradient(pixel));
            sum += d;
            product += d * (v * unit_scale + unit_shift);
            if constexpr (projected) output_product += activate<decltype(kind)::value>(z) * to_float(d_output[pixel]);
          }
          add_lanes<V, R>(sum, to + c, lanes);
          add_lanes<V, R>(product, to + O + c, lanes);
          if constexpr (projected) add_lanes<V, R>(output_product, to + 2 * O + c, lanes);
        });
      });
    }
  });
}
