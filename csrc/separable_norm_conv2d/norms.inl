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

// Columns that pass through a buffer at once: those of a cache line of 16-bit values.
constexpr int64_t kColumns = 32;
template <class T>
using ColumnBuffer __attribute__((aligned(64))) = Compute<T>[kPixelsBackward * kColumns];

// Some channels of a tile's pixels. Loops with activations, most of what there is to compile, are compiled for whole
// vectors of the computation's type alone. Such columns they take where they are; 16-bit ones, and the last few of
// others that fill no vector, by way of buffers in the first-level cache, whose last vector zeros fill up. Loops take
// it by value: behind a reference they would read it anew after every store.
struct Columns {
  int64_t at, channels;  // where the first value is in a tensor, and the distance to the next pixel's
  int64_t pixels, first, count;
  bool in_place;

  int64_t stride() const { return in_place ? channels : kColumns; }

  template <class T>
  const Compute<T>* read(const T* tensor, Compute<T>* buffer) const {
    using V = typename Arithmetic<T>::Type;
    if constexpr (__is_same(T, Compute<T>)) {
      if (in_place) return tensor + at;
    }
    for (int64_t m = 0; m < pixels; ++m) {
      const T* const from = tensor + at + m * channels;
      __builtin_prefetch(from + kPixelsBackward * channels);
      for_vectors<V, Compute<T>>(count, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
        store(buffer + m * kColumns + c, load_some(from + c, lanes));
      });
    }
    return buffer;
  }
  // Where a result goes before `write`.
  template <class T>
  Compute<T>* result(T* tensor, Compute<T>* buffer) const {
    if constexpr (__is_same(T, Compute<T>)) {
      if (in_place) return tensor + at;
    }
    return buffer;
  }
  template <class T>
  void write(const Compute<T>* result, T* tensor) const {
    if (!in_place) convert_rows<typename Arithmetic<T>::Type>(result, kColumns, tensor + at, channels, pixels, count);
  }
};

// f(columns) for all channels of the pixels [first, first + pixels).
template <class T, class F>
EVKERNELS_INLINE void for_columns(int64_t channels, int64_t first, int64_t pixels, const F& f) {
  const int64_t whole = __is_same(T, Compute<T>) ? channels / Arithmetic<T>::kLanes * Arithmetic<T>::kLanes : 0;
  for (int64_t c = 0, count; c < channels; c += count) {
    count = c < whole ? whole : smaller(kColumns, channels - c);
    f(Columns{first * channels + c, channels, pixels, c, count, c < whole});
  }
}

template <Activation kind, class V, class R>
static void outputs_of(Columns k, const R* pre, Affine<R> n, const R* residual, R* y) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  for (int64_t m = 0; m < k.pixels * k.stride(); m += k.stride()) {
    for (int64_t c = 0; c < k.count; c += lanes) {
      V value = activate<kind>(V((V)load(pre + m + c) * (V)load(n.scale + c) + (V)load(n.shift + c)));
      if (residual) value += (V)load(residual + m + c);
      store(y + m + c, value);
    }
  }
}

// y = activation(norm(pre)) + residual, which may be null.
template <class T>
static void norm_outputs(const T* pre, const Affine<Compute<T>>& norm, const T* residual, T* y, const SeparableShape& s,
                         int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  for (int64_t unit = begin; unit < end; ++unit) {
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      for_columns<T>(s.outputs, first, count, [&](const Columns& k) __attribute__((always_inline)) {
        ColumnBuffer<T> buffer, more;
        const Compute<T>* const from = k.read(pre, buffer);
        const Compute<T>* const addend = residual ? k.read(residual, more) : nullptr;
        Compute<T>* const to = k.result(y, buffer);
        with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
          outputs_of<decltype(kind)::value, V>(k, from, norm.at(unit / norm_units(s), k.first), addend, to);
        });
        k.write(to, y);
      });
    });
  }
}

// The gradient of an output's column, pixel by pixel: as it is read, or, of an output that is projected to one map,
// that map's times the projection's weights. A tile is read column by column, which a processor does not foresee:
// without the prefetches batch_norm_activation's gradient takes 1.5 times as long for 32 channels at 260x346.
template <bool projected, class V, class R>
EVKERNELS_INLINE auto output_gradient(const Columns& k, const R* d_output, const R* projection, int64_t c) {
  V weights = {};
  if constexpr (projected) weights = load(projection + k.first + c);
  return [=, stride = k.stride()](int64_t m) __attribute__((always_inline)) {
    if constexpr (projected) return V(weights * d_output[m]);
    const R* const at = d_output + m * stride + c;
    __builtin_prefetch(at + kPixelsBackward * stride);
    return V(load(at));
  };
}
// What it reads, which with a projection is [pixels].
template <bool projected, class T>
EVKERNELS_INLINE const Compute<T>* read_gradient(const Columns& k, const T* d_output, Compute<T>* buffer) {
  if (!projected) return k.read(d_output, buffer);
  for (int64_t m = 0; m < k.pixels; ++m) buffer[m] = to_float(d_output[k.at / k.channels + m]);
  return buffer;
}

template <Activation kind, bool projected, class V, class R>
static void output_sums_of(Columns k, const R* pre, const R* d_output, const R* projection, Affine<R> n,
                           Affine<R> normal, double* sums) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  const int64_t O = k.channels, stride = k.stride();
  for (int64_t c = 0; c < k.count; c += lanes) {
    const V scale = load(n.scale + c), shift = load(n.shift + c);
    const V unit_scale = load(normal.scale + c), unit_shift = load(normal.shift + c);
    const auto gradient = output_gradient<projected, V>(k, d_output, projection, c);
    V sum = {}, product = {}, output_product = {};
    for (int64_t m = 0; m < k.pixels; ++m) {
      __builtin_prefetch(pre + (m + kPixelsBackward) * stride + c);
      const V v = load(pre + m * stride + c), z = v * scale + shift;
      const V d = activation_gradient<kind>(z, gradient(m));
      sum += d;
      product += d * (v * unit_scale + unit_shift);
      if constexpr (projected) output_product += activate<kind>(z) * d_output[m];
    }
    add_lanes<V, R>(sum, sums + c, k.count - c);
    add_lanes<V, R>(product, sums + O + c, k.count - c);
    if constexpr (projected) add_lanes<V, R>(output_product, sums + 2 * O + c, k.count - c);
  }
}

// Sums of the gradient after the second norm, of its products with that norm's normalised input and, with a projection,
// of the products of its map's gradient with the output: [unit][2 or 3][O]. `normal` normalises alone, `norm` is the
// whole norm.
template <bool projected, class T>
static void norm_output_sums(const T* pre, const T* d_output, const Compute<T>* projection,
                             const Affine<Compute<T>>& norm, const Affine<Compute<T>>& normal, double* sums,
                             const SeparableShape& s, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  const int64_t size = (projected ? 3 : 2) * s.outputs;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / norm_units(s);
    double* const to = sums + unit * size;
    for (int64_t o = 0; o < size; ++o) to[o] = 0;
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      for_columns<T>(s.outputs, first, count, [&](const Columns& k) __attribute__((always_inline)) {
        ColumnBuffer<T> buffer, more;
        const Compute<T>*const from = k.read(pre, buffer), *const d = read_gradient<projected>(k, d_output, more);
        with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
          output_sums_of<decltype(kind)::value, projected, V>(k, from, d, projection, norm.at(sample, k.first),
                                                              normal.at(sample, k.first), to + k.first);
        });
      });
    });
  }
}

// The gradient before a norm, which is added to `sums` per channel unless that is null.
template <Activation kind, bool projected, class V, class R>
static void input_gradient_of(Columns k, const R* x, const R* d_output, const R* projection, Affine<R> n,
                              NormGradient<R> g, R* d_x, int64_t d_x_stride, double* sums) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  const int64_t stride = k.stride();
  for (int64_t c = 0; c < k.count; c += lanes) {
    const V scale = load(n.scale + c), shift = load(n.shift + c);
    const V k1 = load(g.k1 + c), k2 = load(g.k2 + c), k3 = load(g.k3 + c), mean = load(g.mean + c);
    const auto gradient = output_gradient<projected, V>(k, d_output, projection, c);
    V sum = {};
    for (int64_t m = 0; m < k.pixels; ++m) {
      const R* const from = x + m * stride + c;
      R* const to = d_x + m * d_x_stride + c;
      __builtin_prefetch(from + kPixelsBackward * stride);
      __builtin_prefetch(to + kPixelsBackward * d_x_stride, 1);
      const V v = load(from), after = activation_gradient<kind>(V(v * scale + shift), gradient(m));
      const V d = after * k1 + ((v - mean) * k2 + k3);
      sum += d;
      store(to, d);
    }
    if (sums) add_lanes<V, R>(sum, sums + c, k.count - c);
  }
}
