// Loops of depthwise_conv2d over output rows (forward, sums for the weights) and input rows (gradient of the input),
// compiled once per instruction set.
//
// Each input row is unpacked once: converted to float (double), with zeros around it and, at stride 2, its even and odd
// columns apart, so that every tap of every output is a plain vector load without a border case. The rows that an
// output row needs stay in a ring. The copy costs one load and one store beside the k * k of the taps, and serves every
// dtype, stride and padding by the same inner loop.
//
// The gradient of the input is that loop again over rows of the output's gradient: at stride s one convolution for each
// remainder of the row and the column, with the taps that reach it.

#include "depthwise_conv2d/rows.inl"

template <class A>
static A* take(A*& memory, int64_t count) {
  A* const taken = memory;
  memory += count;
  return taken;
}

template <class A>
static A* take_zeros(A*& memory, int64_t count) {
  __builtin_memset(memory, 0, count * sizeof(A));
  return take(memory, count);
}

// to[i] = from[2 * i + first] and back, pixel by pixel.
template <class A>
static void every_second(const A* __restrict__ from, A* __restrict__ to, int64_t pixels, int64_t channels) {
  if (channels == 1) {
    for (int64_t i = 0; i < pixels; ++i) to[i] = from[2 * i];
  } else {
    for (int64_t i = 0; i < pixels; ++i) widen(from + 2 * i * channels, to + i * channels, channels);
  }
}
template <class A>
static void to_every_second(const A* __restrict__ from, A* __restrict__ to, int64_t pixels, int64_t channels) {
  if (channels == 1) {
    for (int64_t i = 0; i < pixels; ++i) to[2 * i] = from[i];
  } else {
    for (int64_t i = 0; i < pixels; ++i) widen(from + i * channels, to + 2 * i * channels, channels);
  }
}

// Unpacks the filters of one plane: tile (r, c) of `tiles` holds the taps whose row and column leave the remainders r
// and c at stride s, [taps][repeated]. One tile with all taps for s = 1.
template <class T>
static void unpack_filter(const T* weight, const DepthwiseGeometry& g, int64_t s, Wide<T>* wide, Wide<T>* tiles) {
  const int64_t taps = g.k * g.k;
  widen(weight, wide, g.channels * taps);
  for (int64_t first_row = 0; first_row < s; ++first_row) {
    for (int64_t first_column = 0; first_column < s; ++first_column) {
      for (int64_t r = first_row; r < g.k; r += s) {
        for (int64_t c = first_column; c < g.k; c += s, tiles += g.repeated()) {
          for (int64_t j = 0; j < g.channels; ++j) tiles[j] = wide[j * taps + r * g.k + c];
          for (int64_t j = g.channels; j < g.repeated(); ++j) tiles[j] = tiles[j - g.channels];
        }
      }
    }
  }
}

// The filter, the ring of unpacked input rows and the pre-activation of one output row after the other.
template <class T>
struct ForwardRows {
  using A = Wide<T>;
  const DepthwiseGeometry& g;
  const T *x, *weight, *bias;
  A *wide, *tile, *bias_tile, *ring, *zeros, *narrow;
  RowFilter<A> filter;
  int64_t slot_size, plane = -1, next_row = 0;

  ForwardRows(const DepthwiseGeometry& geometry, const T* input, const T* weights, const T* biases, A*& memory)
      : g(geometry), x(input), weight(weights), bias(biases) {
    wide = take(memory, g.channels * g.k * g.k + 16);
    tile = take(memory, g.k * g.k * g.repeated());
    bias_tile = take(memory, g.repeated());
    slot_size = g.stride * g.input_group();
    ring = take_zeros(memory, (g.k + 1) * slot_size);
    zeros = ring + g.k * slot_size;
    narrow = take(memory, g.plain_row());
    filter.rows = filter.columns = g.k;
    filter.channels = g.channels;
    filter.repeated = g.repeated();
    filter.weight = tile;
    filter.bias = bias ? bias_tile : nullptr;
    for (filter.period = g.channels; filter.period % Arithmetic<A>::kLanes;) filter.period += g.channels;
    for (int64_t c = 0; c < g.k; ++c) filter.offset[c] = c % g.stride * g.input_group() + c / g.stride * g.channels;
  }

  void unpack(int64_t row, A* to) {
    const T* const from = x + (plane * g.height + row) * g.width * g.channels;
    if (g.stride == 1) return widen(from, to + g.padding * g.channels, g.width * g.channels);
    const A* source;
    if constexpr (__is_same(T, A)) {
      source = from;
    } else {
      widen(from, narrow, g.width * g.channels);
      source = narrow;
    }
    for (int64_t column = 0; column < 2 && column < g.width; ++column) {
      const int64_t padded = column + g.padding;
      every_second(source + column * g.channels, to + padded % 2 * g.input_group() + padded / 2 * g.channels,
                   (g.width - column + 1) / 2, g.channels);
    }
  }

  // Makes `filter` that of an output row. Rows of a plane come in ascending order.
  void go_to(int64_t new_plane, int64_t out_row) {
    const int64_t first = out_row * g.stride;  // counted from the top of the padding
    if (new_plane != plane) {
      if (plane < 0 || g.channels == 1) {
        const int64_t channel = g.channels == 1 ? new_plane % g.filters : 0;
        unpack_filter(weight + channel * g.k * g.k, g, 1, wide, tile);
        if (bias) widen(bias + channel, bias_tile, g.channels);
        if (bias)
          for (int64_t j = g.channels; j < g.repeated(); ++j) bias_tile[j] = bias_tile[j - g.channels];
      }
      plane = new_plane;
      next_row = first;
    }
    if (next_row < first) next_row = first;
    A* slot = ring + first % g.k * slot_size;
    for (int64_t r = 0; r < g.k; ++r) {
      const int64_t row = first + r - g.padding;
      const bool inside = row >= 0 && row < g.height;
      if (inside && first + r >= next_row) unpack(row, slot);
      filter.row[r] = inside ? slot : zeros;
      slot = slot + slot_size == zeros ? ring : slot + slot_size;
    }
    next_row = first + g.k;
  }
};

// Output rows [begin, end) of all planes.
template <class T>
static void depthwise_forward(const T* x, const T* weight, const T* bias, T* y, const DepthwiseGeometry& g,
                              Activation activation, Wide<T>* memory, int64_t begin, int64_t end) {
  using A = Wide<T>;
  ForwardRows<T> rows(g, x, weight, bias, memory);
  A* const pre = take(memory, g.plain_row());
  const int64_t count = g.out_width * g.channels;
  int64_t plane = begin / g.out_height, row = begin % g.out_height;
  for (int64_t i = begin; i < end; ++i, row = row + 1 == g.out_height ? 0 : row + 1) {
    if (i > begin && row == 0) ++plane;
    rows.go_to(plane, row);
    if constexpr (__is_same(T, A)) {
      if (activation == Activation::kNone) {
        convolve(rows.filter, y + i * count, count);
        continue;
      }
    }
    convolve(rows.filter, pre, count);
    activate_row(activation, pre, y + i * count, count);
  }
}

// Units [begin, end) of `rows_per_sum` output rows each: the gradient at the pre-activation, written to d_pre unless
// null, and its products with the input, written to sums [unit][k * k + 1][channels] (the last one for the bias) unless
// null.
template <class T>
static void depthwise_backward_sums(const T* x, const T* weight, const T* bias, const T* d_y, Wide<T>* d_pre,
                                    Wide<T>* sums, const DepthwiseGeometry& g, Activation activation, Wide<T>* memory,
                                    int64_t begin, int64_t end) {
  using A = Wide<T>;
  ForwardRows<T> rows(g, x, weight, bias, memory);
  A* const pre = take(memory, g.plain_row());
  A* const d = take(memory, g.plain_row());
  const int64_t count = g.out_width * g.channels, taps = g.k * g.k, period = rows.filter.period;
  for (int64_t unit = begin; unit < end; ++unit) {
    A* const unit_sums = memory;
    __builtin_memset(unit_sums, 0, (taps + 1) * period * sizeof(A));
    const int64_t plane = unit / g.sums_per_plane(), first = unit % g.sums_per_plane() * g.rows_per_sum();
    const int64_t last = first + g.rows_per_sum() < g.out_height ? first + g.rows_per_sum() : g.out_height;
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = (plane * g.out_height + row) * count;
      rows.go_to(plane, row);
      widen(d_y + at, d, count);
      if (activation != Activation::kNone) {
        convolve(rows.filter, pre, count);
        activation_gradient_row(activation, pre, d, count);
        if (d_pre) widen(d, d_pre + at, count);
      }
      if (sums) accumulate(rows.filter, d, unit_sums, unit_sums + taps * period, count);
    }
    for (int64_t tap = 0; sums && tap <= taps; ++tap) {
      A* const total = sums + (unit * (taps + 1) + tap) * g.channels;
      for (int64_t c = 0; c < g.channels; ++c) {
        total[c] = unit_sums[tap * period + c];
        for (int64_t j = c + g.channels; j < period; j += g.channels) total[c] += unit_sums[tap * period + j];
      }
    }
  }
}

// Input rows [begin, end) of all planes, from the gradient d at the pre-activation.
template <class T, class D>
static void depthwise_backward_input(const D* d, const T* weight, T* d_x, const DepthwiseGeometry& g, Wide<T>* memory,
                                     int64_t begin, int64_t end) {
  using A = Wide<T>;
  const int64_t s = g.stride, reach = g.reach(), length = g.gradient_row(), count = g.width * g.channels;
  A* const wide = take(memory, g.channels * g.k * g.k + 16);
  A* const tiles = take(memory, g.k * g.k * g.repeated());
  A* const ring = take_zeros(memory, reach * length);
  A* const zeros = take_zeros(memory, length);
  A* const columns = take(memory, s * g.plain_row());
  A* const result = take(memory, g.plain_row());
  RowFilter<A> f;
  f.bias = nullptr;
  f.channels = g.channels;
  f.repeated = g.repeated();
  for (f.period = g.channels; f.period % Arithmetic<A>::kLanes;) f.period += g.channels;
  int64_t plane = -1, next_row = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (i / g.height != plane) {
      if (plane < 0 || g.channels == 1) {
        unpack_filter(weight + (g.channels == 1 ? i / g.height % g.filters : 0) * g.k * g.k, g, s, wide, tiles);
      }
      plane = i / g.height;
      next_row = 0;
    }
    // Output row `last - t` meets this input row at the filter's row first_row + s * t.
    const int64_t padded_row = i % g.height + g.padding, first_row = padded_row % s, last = padded_row / s;
    f.rows = (g.k - first_row + s - 1) / s;
    if (next_row < last - f.rows + 1) next_row = last - f.rows + 1;
    for (; next_row <= last && next_row < g.out_height; ++next_row) {
      widen(d + (plane * g.out_height + next_row) * g.out_width * g.channels,
            ring + next_row % reach * length + (reach - 1) * g.channels, g.out_width * g.channels);
    }
    for (int64_t t = 0; t < f.rows; ++t) {
      const int64_t row = last - t;
      f.row[t] = row >= 0 && row < g.out_height ? ring + row % reach * length : zeros;
    }
    A* to = result;
    if constexpr (__is_same(T, A)) to = d_x + i * count;
    f.weight = tiles;
    for (int64_t r = 0; r < first_row; ++r) f.weight += (g.k + s - 1 - r) / s * g.k * g.repeated();
    for (int64_t first_column = 0; first_column < s; ++first_column) {
      f.columns = (g.k - first_column + s - 1) / s;
      // The first column of the input, x, with this remainder, and its position in a row of the output.
      const int64_t position = (g.padding - first_column + s - 1) / s, x = first_column - g.padding + s * position;
      for (int64_t t = 0; t < f.columns; ++t) f.offset[t] = (reach - 1 - t + position) * g.channels;
      const int64_t pixels = x < g.width ? (g.width - x + s - 1) / s : 0;
      A* const part = s == 1 ? to : columns;
      convolve(f, part, pixels * g.channels);
      if (s == 2) to_every_second(part, to + x * g.channels, pixels, g.channels);
      f.weight += f.rows * f.columns * g.repeated();
    }
    if constexpr (!__is_same(T, A)) activate_row(Activation::kNone, result, d_x + i * count, count);
  }
}
