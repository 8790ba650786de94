// Loops of channel_rms_norm, compiled once per instruction set: contiguous samples, where a vector holds pixels of one
// channel, and channels_last, where it holds channels of one pixel.
//
// Each way two passes over what the caches hold: the mean squares (and what the gradient takes away along x), then the
// results. Results are fetched before they are written, since the processor foresees neither the short rows of a block
// nor stores behind a group's divisions: 10 to 35 % of the time, on Zen 3. The same of what is read gains nothing.
// Nothing is kept for the gradient: it reads x anyway, and the square of what it has read costs one more addition.

#include "common/transpose.inl"

// Elements in front of the one written.
constexpr int64_t kAhead = 128;

// How a loop's body reads and writes a vector of a row: all of it; or all of it with lanes that `fresh` leaves out of
// sums; or a part.
struct WholeVector {
  template <class T>
  EVKERNELS_LOOP_BODY typename Arithmetic<T>::Type read(const T* p) const {
    return load(p);
  }
  template <class T, class V>
  EVKERNELS_LOOP_BODY void write(T* p, V v) const {
    store(p, v);
  }
  template <class V>
  EVKERNELS_LOOP_BODY V fresh(V v) const {
    return v;
  }
};
struct MaskedVector : WholeVector {
  VecI left_out;
  EVKERNELS_LOOP_BODY MaskedVector(int64_t begin, int64_t end) {
    VecI lane;
    for (int k = 0; k < EVKERNELS_LANES; ++k) lane[k] = k;
    left_out = (lane < (int32_t)begin) | (lane >= (int32_t)end);
  }
  EVKERNELS_LOOP_BODY VecF fresh(VecF v) const { return select(left_out, VecF{}, v); }
  EVKERNELS_LOOP_BODY double fresh(double v) const { return v; }
};
struct PartialVector {
  int64_t count;
  template <class T>
  EVKERNELS_LOOP_BODY typename Arithmetic<T>::Type read(const T* p) const {
    return load_partial(p, count);
  }
  template <class T, class V>
  EVKERNELS_LOOP_BODY void write(T* p, V v) const {
    store_partial(p, v, count);
  }
  template <class V>
  EVKERNELS_LOOP_BODY V fresh(V v) const {
    return v;
  }
};

// Calls body(access, element, slot, chain) for the vectors of a row of `size` elements. `slot` is the vector's place in
// memory of whole vectors; `chain` is 0 and 1 in turn, for sums that do not wait for each other. What is left at the
// end is in a vector that begins before the last one ended. A row shorter than a vector is written with what follows
// it, which the next row then overwrites, as long as there is `room` from the row's beginning to the end of all rows.
template <int kLanes, class Body>
EVKERNELS_INLINE void for_row(int64_t size, int64_t room, const Body& body) {
  int64_t e = 0;
  for (; e + 2 * kLanes <= size; e += 2 * kLanes) {
    body(WholeVector{}, e, e, 0);
    body(WholeVector{}, e + kLanes, e + kLanes, 1);
  }
  for (; e + kLanes <= size; e += kLanes) body(WholeVector{}, e, e, 0);
  if (e == size) return;
  if (size > kLanes) {
    body(MaskedVector(kLanes - (size - e), kLanes), size - kLanes, e, 1);
  } else if (room >= kLanes) {
    body(MaskedVector(0, size), e, e, 1);
  } else {
    body(PartialVector{size}, e, e, 1);
  }
}

EVKERNELS_INLINE double sum_of_lanes(double v) { return v; }
EVKERNELS_INLINE double sum_of_lanes(VecF v) {
  double sum = 0;
  for (int k = 0; k < EVKERNELS_LANES; ++k) sum += v[k];
  return sum;
}
template <class A>
EVKERNELS_INLINE A inverse_root(A square) {
  return 1 / (sizeof(A) == 8 ? (A)__builtin_sqrt((double)square) : (A)__builtin_sqrtf((float)square));
}

// Calls f(first element, pixels, elements to the unit's end) for each sample, or the block of one, that a unit is.
template <class F>
EVKERNELS_INLINE void for_blocks(const ChannelNormShape& s, int64_t unit, const F& f) {
  if (s.blocks > 1) {
    const int64_t block = unit % s.blocks, first = s.first_pixel(block);
    f(unit / s.blocks * s.channels * s.pixels + first, s.first_pixel(block + 1) - first, s.channels * s.pixels - first);
    return;
  }
  const int64_t end = (unit + 1) * s.samples < s.batch ? (unit + 1) * s.samples : s.batch;
  const int64_t size = s.channels * s.pixels;
  for (int64_t sample = unit * s.samples; sample < end; ++sample) f(sample * size, s.pixels, (end - sample) * size);
}

// Calls f(channel, how many: a constant) for all channels, four and then one at a time.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <class F>
EVKERNELS_INLINE void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) f(c, Count<4>{});
  for (; c < channels; ++c) f(c, Count<1>{});
}

// Contiguous: units [begin, end). `memory` holds a block's pixels.
template <class T>
static void channel_norm_forward(const T* x, const Compute<T>* weight, const Compute<T>* bias, T* y,
                                 const ChannelNormShape& s, Compute<T>* memory, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t C = s.channels, P = s.pixels;
  for (int64_t unit = begin; unit < end; ++unit) {
    for_blocks(s, unit, [&](int64_t first, int64_t count, int64_t room) EVKERNELS_LOOP_BODY {
      const T* const from = x + first;
      T* const to = y + first;
      for (int64_t j = 0; j < count + kLanes; ++j) memory[j] = 0;
      for_channels(C, [&](int64_t c, auto channels) EVKERNELS_LOOP_BODY {
        for_row<kLanes>(count, room - (c + decltype(channels)::value - 1) * P,
                        [&](auto at, int64_t e, int64_t slot, int) EVKERNELS_LOOP_BODY {
                          V sum = {};
#pragma GCC unroll 4
                          for (int k = 0; k < decltype(channels)::value; ++k) {
                            const V v = at.read(from + (c + k) * P + e);
                            sum = multiply_add(v, v, sum);
                          }
                          store(memory + slot, (V)load(memory + slot) + sum);
                        });
      });
      for (int64_t j = 0; j < count + kLanes; ++j) memory[j] = inverse_root(memory[j] / (A)C + (A)s.eps);
      for (int64_t c = 0; c < C; ++c) {
        const V w = V{} + weight[c], b = V{} + bias[c];
        for_row<kLanes>(count, room - c * P, [&](auto at, int64_t e, int64_t slot, int) EVKERNELS_LOOP_BODY {
          __builtin_prefetch(to + (c + 1) * P + e, 1);
          at.write(to + c * P + e, multiply_add((V)at.read(from + c * P + e) * (V)load(memory + slot), w, b));
        });
      }
    });
  }
}

// Contiguous: the gradient of x, and for each unit the sums [2][C] that make the gradients of weight and bias. `memory`
// holds two blocks' pixels.
template <class T>
static void channel_norm_backward(const T* d_y, const T* x, const Compute<T>* weight, T* d_x, double* sums,
                                  const ChannelNormShape& s, Compute<T>* memory, int64_t pitch, int64_t begin,
                                  int64_t end) {
  using A = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t C = s.channels, P = s.pixels;
  A *const scale = memory, *const along = memory + pitch;
  for (int64_t unit = begin; unit < end; ++unit) {
    double *const d_weight = sums + unit * 2 * C, *const d_bias = d_weight + C;
    for (int64_t c = 0; c < 2 * C; ++c) d_weight[c] = 0;
    for_blocks(s, unit, [&](int64_t first, int64_t count, int64_t room) EVKERNELS_LOOP_BODY {
      const T *const from = x + first, *const gradient = d_y + first;
      T* const to = d_x + first;
      for (int64_t j = 0; j < count + kLanes; ++j) scale[j] = along[j] = 0;
      for_channels(C, [&](int64_t c, auto channels) EVKERNELS_LOOP_BODY {
        for_row<kLanes>(count, room - (c + decltype(channels)::value - 1) * P,
                        [&](auto at, int64_t e, int64_t slot, int) EVKERNELS_LOOP_BODY {
                          V square = {}, product = {};
#pragma GCC unroll 4
                          for (int k = 0; k < decltype(channels)::value; ++k) {
                            const V v = at.read(from + (c + k) * P + e), g = at.read(gradient + (c + k) * P + e);
                            square = multiply_add(v, v, square);
                            product = multiply_add(V(v * weight[c + k]), g, product);
                          }
                          store(scale + slot, (V)load(scale + slot) + square);
                          store(along + slot, (V)load(along + slot) + product);
                        });
      });
      for (int64_t j = 0; j < count + kLanes; ++j) {
        const A r = inverse_root(scale[j] / (A)C + (A)s.eps);
        scale[j] = r;
        along[j] = along[j] * r / (A)C * r * r;
      }
      for (int64_t c = 0; c < C; ++c) {
        const V w = V{} + weight[c];
        V products[2] = {}, gradients[2] = {};
        for_row<kLanes>(count, room - c * P, [&](auto at, int64_t e, int64_t slot, int chain) EVKERNELS_LOOP_BODY {
          const V v = at.read(from + c * P + e), g = at.read(gradient + c * P + e);
          const V scaled = g * (V)load(scale + slot);
          __builtin_prefetch(to + (c + 1) * P + e, 1);
          products[chain] = multiply_add((V)at.fresh(scaled), (V)at.fresh(v), products[chain]);
          gradients[chain] += (V)at.fresh(g);
          at.write(to + c * P + e, multiply_add(scaled, w, V(-v * (V)load(along + slot))));
        });
        d_weight[c] += sum_of_lanes(products[0] + products[1]);
        d_bias[c] += sum_of_lanes(gradients[0] + gradients[1]);
      }
    });
  }
}

// Sums over the lanes of as many vectors as a vector has lanes, side by side.
EVKERNELS_INLINE VecF sums_of_lanes(VecF (&rows)[EVKERNELS_LANES]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int half = EVKERNELS_LANES / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) rows[k] += rows[k + half];
  }
  return rows[0];
}
EVKERNELS_INLINE double sums_of_lanes(double (&rows)[1]) { return rows[0]; }

// channels_last: pixels [begin, end), as many at once as a vector has lanes.
template <class T>
static void channel_norm_last_forward(const T* x, const Compute<T>* weight, const Compute<T>* bias, T* y,
                                      const ChannelNormShape& s, int64_t begin, int64_t end) {
  using A = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t C = s.channels;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t rows = first + kLanes < end ? kLanes : end - first;
    V squares[kLanes];
    for (int64_t k = rows; k < kLanes; ++k) squares[k] = V{};
    for (int64_t k = 0; k < rows; ++k) {
      V sums[2] = {};
      for_row<kLanes>(C, (end - first - k) * C, [&](auto at, int64_t e, int64_t, int chain) EVKERNELS_LOOP_BODY {
        const V v = at.fresh((V)at.read(x + (first + k) * C + e));
        sums[chain] = multiply_add(v, v, sums[chain]);
      });
      squares[k] = sums[0] + sums[1];
    }
    A scale[kLanes];
    store(scale, sums_of_lanes(squares));
    for (int64_t k = 0; k < kLanes; ++k) scale[k] = inverse_root(scale[k] / (A)C + (A)s.eps);
    for (int64_t k = 0; k < rows; ++k) {
      const V r = V{} + scale[k];
      for_row<kLanes>(C, (end - first - k) * C, [&](auto at, int64_t e, int64_t, int) EVKERNELS_LOOP_BODY {
        const int64_t m = (first + k) * C + e;
        __builtin_prefetch(y + m + kAhead, 1);
        at.write(y + m, multiply_add((V)at.read(x + m) * r, (V)load(weight + e), (V)load(bias + e)));
      });
    }
  }
}

// channels_last: the gradient of x, and the sums [2][C] of one unit's pixels. `memory` holds [2][pitch] of them.
template <class T>
static void channel_norm_last_backward(const T* d_y, const T* x, const Compute<T>* weight, T* d_x, double* sums,
                                       const ChannelNormShape& s, Compute<T>* memory, int64_t pitch, int64_t begin,
                                       int64_t end) {
  using A = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t C = s.channels;
  for (int64_t c = 0; c < 2 * pitch; ++c) memory[c] = 0;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t rows = first + kLanes < end ? kLanes : end - first;
    V squares[kLanes], products[kLanes];
    for (int64_t k = rows; k < kLanes; ++k) squares[k] = products[k] = V{};
    for (int64_t k = 0; k < rows; ++k) {
      V square[2] = {}, product[2] = {};
      for_row<kLanes>(C, (end - first - k) * C, [&](auto at, int64_t e, int64_t, int chain) EVKERNELS_LOOP_BODY {
        const int64_t m = (first + k) * C + e;
        const V v = at.fresh((V)at.read(x + m)), g = at.fresh((V)at.read(d_y + m));
        square[chain] = multiply_add(v, v, square[chain]);
        product[chain] = multiply_add(V(v * (V)load(weight + e)), g, product[chain]);
      });
      squares[k] = square[0] + square[1];
      products[k] = product[0] + product[1];
    }
    A scale[kLanes], along[kLanes];
    store(scale, sums_of_lanes(squares));
    store(along, sums_of_lanes(products));
    for (int64_t k = 0; k < kLanes; ++k) {
      const A r = inverse_root(scale[k] / (A)C + (A)s.eps);
      scale[k] = r;
      along[k] = along[k] * r / (A)C * r * r;
    }
    for_row<kLanes>(C, (end - first - rows + 1) * C, [&](auto at, int64_t e, int64_t slot, int) EVKERNELS_LOOP_BODY {
      const V w = load(weight + e);
      V d_weight = {}, d_bias = {};
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t m = (first + k) * C + e;
        const V v = at.read(x + m), g = at.read(d_y + m), scaled = g * scale[k];
        __builtin_prefetch(d_x + m + kLanes * C, 1);
        d_weight = multiply_add(scaled, v, d_weight);
        d_bias += g;
        at.write(d_x + m, multiply_add(scaled, w, V(-v * along[k])));
      }
      store(memory + slot, (V)load(memory + slot) + d_weight);
      store(memory + pitch + slot, (V)load(memory + pitch + slot) + d_bias);
    });
  }
  // An overlapping vector has its channels in its last lanes.
  const int64_t whole = C / kLanes * kLanes, skipped = whole > 0 && whole < C ? kLanes - (C - whole) : 0;
  for (int64_t c = 0; c < C; ++c) {
    const int64_t slot = c < whole ? c : c + skipped;
    sums[c] = memory[slot];
    sums[C + c] = memory[pitch + slot];
  }
}
