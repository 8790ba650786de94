// Loops of separable_norm_conv2d over tiles of channels_last pixels, compiled once per instruction set.
//
// A norm needs all of its input's statistics before the first of its outputs, so that each norm costs a pass over that
// input. The depthwise result is formed anew in every pass, from x, at k * k multiply-adds per value: less than writing
// and reading it would cost. The pointwise result is kept, for it costs as much again as the whole block.
//
// Forward: moments of the depthwise result; product and its moments, with the first norm folded into the depthwise
// filters; second norm. Backward: sums of the second norm's gradient; products, and sums of the first norm's; gradient
// at the depthwise result, from where depthwise_conv2d goes on. Sums are formed per tile in float, relative to the
// first pixel of their unit where they are moments, and added up in double in an order that the shape alone sets.

#include "separable_norm_conv2d/norms.inl"

#include "separable_conv2d/channels_last.inl"

// Adds sums of rows - reference and of its square to sums[0] and sums[1] of [channels]; rows are padded to vectors.
template <class V, class R>
static void add_moments(const R* __restrict__ rows, int64_t stride, int64_t count, int64_t channels,
                        const R* __restrict__ reference, double* sums, double* squares) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  for (int64_t c = 0; c < channels; c += lanes) {
    const V middle = load(reference + c);
    // Several chains of sums, which hide the latency of an addition.
    V sum[4] = {}, square[4] = {};
    int64_t m = 0;
    for (; m + 4 <= count; m += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V v = load(rows + (m + j) * stride + c) - middle;
        sum[j] += v;
        square[j] += v * v;
      }
    }
    for (; m < count; ++m) {
      const V v = load(rows + m * stride + c) - middle;
      sum[0] += v;
      square[0] += v * v;
    }
    add_lanes<V, R>((sum[0] + sum[1]) + (sum[2] + sum[3]), sums + c, channels - c);
    add_lanes<V, R>((square[0] + square[1]) + (square[2] + square[3]), squares + c, channels - c);
  }
}

// Elements of R that each thread needs in any of the passes.
template <class T>
static int64_t norm_buffer_size(const SeparableShape& s) {
  const auto p = packed_at<T>(nullptr, s);
  const int64_t inner = kPixelsBackward * p.pitch, outer = kPixelsBackward * larger(p.outputs, outer_pitch<T>(s));
  return 3 * inner + outer + (s.size * s.size + 1) * p.channels + larger(p.outputs, p.channels) + 64;
}

// The packed weights with the depthwise filters multiplied by `scale` per channel and their bias by it and shifted.
template <class R>
static Packed<R> folded(const Packed<R>& p, const Affine<R>& norm, int64_t taps, R* memory) {
  Packed<R> q = p;
  q.depthwise = memory;
  q.depthwise_bias = memory + taps * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t k = 0; k < taps; ++k)
      q.depthwise[k * p.channels + c] = p.depthwise[k * p.channels + c] * norm.scale[c];
    q.depthwise_bias[c] = p.depthwise_bias[c] * norm.scale[c] + norm.shift[c];
  }
  return q;
}

// Units [begin, end): moments of the depthwise result, as [unit][reference, sum, sum of squares][C].
template <class T>
static void norm_depthwise_moments(const T* x, Compute<T>* packed, double* sums, Compute<T>* buffer,
                                   const SeparableShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  const Packed<R> p = packed_at<T>(packed, s);
  R* const reference = buffer + kPixelsBackward * p.pitch;
  for (int64_t unit = begin; unit < end; ++unit) {
    double* const to = sums + unit * 3 * s.channels;
    for (int64_t c = 0; c < 3 * s.channels; ++c) to[c] = 0;
    bool is_first = true;
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      depthwise_last(x, p, buffer, s, first, count);
      if (is_first) {
        for (int64_t c = 0; c < p.channels; ++c) reference[c] = buffer[c];
        for (int64_t c = 0; c < s.channels; ++c) to[c] = reference[c];
        is_first = false;
      }
      add_moments<typename Arithmetic<T>::Type>(buffer, p.pitch, count, s.channels, (const R*)reference,
                                                to + s.channels, to + 2 * s.channels);
    });
  }
}

// The pointwise result, without its norm, and its moments [unit][3][O]; `norm` is the first one.
template <class T>
static void norm_products(const T* x, Compute<T>* packed, const Affine<Compute<T>>& norm, T* pre, double* sums,
                          Compute<T>* buffer, const SeparableShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const Packed<R> p = packed_at<T>(packed, s);
  const int64_t C = s.channels, O = s.outputs, pitch = outer_pitch<T>(s);
  R* const output = buffer + kPixelsBackward * p.pitch;
  R* const reference = output + kPixelsBackward * pitch;
  R* const filters = reference + p.outputs;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Packed<R> q = folded(p, norm.at(unit / norm_units(s)), s.size * s.size, filters);
    double* const to = sums + unit * 3 * O;
    for (int64_t o = 0; o < 3 * O; ++o) to[o] = 0;
    bool is_first = true;
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      depthwise_last(x, q, buffer, s, first, count);
      activate_buffer<V>(s.activation, buffer, count * p.pitch);
      Ahead ahead = input_ahead(x, s, first + count, kPixelsBackward, product_steps<V, R>(kPixelsBackward, O, C));
      multiply<Start::kColumnBias, V, R>(buffer, p.pitch, 1, count, p.pointwise, 0, p.pointwise_bias, O, C, output,
                                         pitch, &ahead);
      for (int64_t o = 0; is_first && o < O; ++o) to[o] = reference[o] = output[o];
      add_moments<V>((const R*)output, pitch, count, O, (const R*)reference, to + O, to + 2 * O);
      convert_rows<V>((const R*)output, pitch, pre + first * O, O, count, O);
      is_first = false;
    });
  }
}

template <class T>
static int64_t norm_weight_rows(const SeparableShape& s) {
  return packed_at<T>(nullptr, s).outputs;
}
template <class T>
static int64_t norm_weight_sums_size(const SeparableShape& s) {
  const auto p = packed_at<T>(nullptr, s);
  return p.outputs * p.channels;
}

// The gradient after the first norm, from that after its activation, and its sums; rows `pitch` apart.
template <Activation kind, class V, class R>
static void inner_gradient_of(Columns k, const R* normal, const R* d_a, int64_t pitch, Affine<R> n, R* d_inner,
                              double* sums) {
  for (int64_t c = 0; c < k.count; c += sizeof(V) / sizeof(R)) {
    const V scale = load(n.scale + c), shift = load(n.shift + c);
    V sum = {}, product = {};
    for (int64_t m = 0; m < k.pixels; ++m) {
      const V v = load(normal + m * pitch + c);
      const V d = activation_gradient<kind>(V(v * scale + shift), (V)load(d_a + m * pitch + c));
      sum += d;
      product += d * v;
      store(d_inner + m * k.stride() + c, d);
    }
    add_lanes<V, R>(sum, sums + c, k.count - c);
    add_lanes<V, R>(product, sums + k.channels + c, k.count - c);
  }
}

// a = activation(norm(normal)), whole vectors.
template <Activation kind, class V, class R>
static void norm_activate(const R* __restrict__ normal, R* __restrict__ a, const Affine<R>& n, int64_t count,
                          int64_t channels, int64_t pitch) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  for (int64_t m = 0; m < count * pitch; m += pitch) {
    for (int64_t c = 0; c < channels; c += lanes) {
      store(a + m + c, activate<kind>(V((V)load(normal + m + c) * (V)load(n.scale + c) + (V)load(n.shift + c))));
    }
  }
}

template <class T>
static void norm_backward_products(const NormBackward<T>& b, Compute<T>* packed, Compute<T>* buffer,
                                   const SeparableShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const Packed<R> p = packed_at<T>(packed, s);
  const int64_t C = s.channels, O = s.outputs, size = norm_weight_sums_size<T>(s);
  R* const normal = buffer;
  R* const a = normal + kPixelsBackward * p.pitch;
  R* const d_a = a + kPixelsBackward * p.pitch;
  R* const d_y = d_a + kPixelsBackward * p.pitch;
  R* const filters = d_y + kPixelsBackward * p.outputs;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / norm_units(s);
    const Packed<R> q = folded(p, b.normal.at(sample), s.size * s.size, filters);
    R* const d_weight = b.d_weights + unit * size;
    for (int64_t k = 0; k < size; ++k) d_weight[k] = 0;
    for (int64_t c = 0; c < 2 * C; ++c) b.sums[unit * 2 * C + c] = 0;
    for (int64_t o = 0; o < O; ++o) b.bias_sums[unit * O + o] = 0;
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      depthwise_last(b.x, q, normal, s, first, count);
      with_activation(s.activation, [&](auto kind) __attribute__((always_inline)) {
        norm_activate<decltype(kind)::value, V, R>(normal, a, b.norm.at(sample), count, C, p.pitch);
      });
      for_columns<T>(O, first, count, [&](const Columns& k) __attribute__((always_inline)) {
        ColumnBuffer<T> buffer, more;
        const R *const pre = k.read(b.pre, buffer), *const d_output = k.read(b.d_output, more);
        with_activation(s.output_activation, [&](auto kind) __attribute__((always_inline)) {
          input_gradient_of<decltype(kind)::value, false, V>(
              k, pre, d_output, (const R*)nullptr, b.output_norm.at(sample, k.first),
              b.output_gradient.at(sample, k.first), d_y + k.first, p.outputs, b.bias_sums + unit * O + k.first);
        });
      });
      multiply<Start::kColumnBias, V, R>(d_y, p.outputs, 1, count, b.panels, 0, nullptr, C, O, d_a, p.pitch);
      multiply<Start::kResult, V, R>(d_y, 1, p.outputs, O, a, p.pitch, nullptr, C, count, d_weight, p.channels);
      for_columns<T>(C, first, count, [&](const Columns& k) __attribute__((always_inline)) {
        ColumnBuffer<T> buffer;
        R* const to = k.result(b.d_inner, buffer);
        with_activation(s.activation, [&](auto kind) __attribute__((always_inline)) {
          inner_gradient_of<decltype(kind)::value, V>(k, (const R*)normal + k.first, (const R*)d_a + k.first, p.pitch,
                                                      b.norm.at(sample, k.first), to, b.sums + unit * 2 * C + k.first);
        });
        k.write(to, b.d_inner);
      });
    });
  }
}

// In place of the gradient after the first norm the gradient at the depthwise result. `gradient` takes the normalised
// depthwise result, whose mean is 0, as the norm's input.
template <class T>
static void norm_depthwise_gradient(const T* x, Compute<T>* packed, const Affine<Compute<T>>& normal,
                                    const NormGradient<Compute<T>>& gradient, T* d_inner, Compute<T>* buffer,
                                    const SeparableShape& s, int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const Packed<R> p = packed_at<T>(packed, s);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / norm_units(s);
    const Packed<R> q = folded(p, normal.at(sample), s.size * s.size, buffer + kPixelsBackward * p.pitch);
    const NormGradient<R> g = gradient.at(sample);
    for_tiles(s, unit, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
      depthwise_last(x, q, buffer, s, first, count);
      for (int64_t m = 0; m < count; ++m) {
        T* const row = d_inner + (first + m) * s.channels;
        for_vectors<V, R>(s.channels, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
          const V d = load_some(row + c, lanes) * (V)load(g.k1 + c) +
                      ((V)load(buffer + m * p.pitch + c) * (V)load(g.k2 + c) + (V)load(g.k3 + c));
          store_some(row + c, d, lanes);
        });
      }
    });
  }
}
