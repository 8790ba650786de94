// Loops of depthwise_conv2d over output rows (forward, sums for the weights) and input rows (gradient of the input),
// compiled once per instruction set.
//
// Rows are unpacked first: converted to float (double), with zeros around them and, at stride 2, even and odd rows and
// columns apart, so that every tap of every output is a plain vector load without a border case. Several rows, a band,
// lie behind each other in the cache and are convolved as one long row; what comes out between two rows is dropped.
// The copy costs one load and one store beside the k * k of the taps; it serves every dtype, stride and padding by the
// same inner loop, and spares short rows the cost of starting and ending it.
//
// The gradient of the input is that convolution again over rows of the output's gradient: at stride s one for each
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

// The filter and the unpacked input rows of one band of output rows after the other.
template <class T>
struct InputBand {
  using A = Wide<T>;
  const DepthwiseGeometry& g;
  const T *x, *weight, *bias;
  const int64_t pitch, column_group, row_group;
  A *wide, *tile, *bias_tile, *unpacked, *narrow;
  RowFilter<A> filter;
  int64_t plane = -1;

  InputBand(const DepthwiseGeometry& geometry, const T* input, const T* weights, const T* biases, A*& memory)
      : g(geometry),
        x(input),
        weight(weights),
        bias(biases),
        pitch(g.input_pitch()),
        column_group(g.input_group_rows() * pitch),
        row_group(g.stride * column_group) {
    wide = take(memory, g.channels * g.k * g.k + 16);
    tile = take(memory, g.k * g.k * g.repeated());
    bias_tile = take(memory, g.repeated());
    unpacked = take_zeros(memory, g.unpacked_input());
    narrow = take(memory, g.plain_row());
    filter.rows = filter.columns = g.k;
    filter.channels = g.channels;
    filter.repeated = g.repeated();
    filter.weight = tile;
    filter.bias = bias ? bias_tile : nullptr;
    for (filter.period = g.channels; filter.period % Arithmetic<A>::kLanes;) filter.period += g.channels;
    for (int64_t r = 0; r < g.k; ++r) filter.row[r] = place(r);
    for (int64_t c = 0; c < g.k; ++c) filter.offset[c] = c % g.stride * column_group + c / g.stride * g.channels;
  }

  // Where the row that lies `row` below the band's first, counted from the top of the padding, is unpacked to.
  A* place(int64_t row) const { return unpacked + row % g.stride * row_group + row / g.stride * pitch; }

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
      every_second(source + column * g.channels, to + padded % 2 * column_group + padded / 2 * g.channels,
                   (g.width - column + 1) / 2, g.channels);
    }
  }

  void load_filter() {
    const int64_t channel = g.channels == 1 ? plane % g.filters : 0;
    unpack_filter(weight + channel * g.k * g.k, g, 1, wide, tile);
    if (!bias) return;
    widen(bias + channel, bias_tile, g.channels);
    for (int64_t j = g.channels; j < g.repeated(); ++j) bias_tile[j] = bias_tile[j - g.channels];
  }

  // Unpacks what `rows` output rows from `first` on need.
  void go_to(int64_t new_plane, int64_t first, int64_t rows) {
    const bool same_filter = plane >= 0 && (g.channels > 1 || plane == new_plane);
    plane = new_plane;
    if (!same_filter) load_filter();
    for (int64_t r = 0; r < (rows - 1) * g.stride + g.k; ++r) {
      const int64_t row = first * g.stride + r - g.padding;
      if (row >= 0 && row < g.height) {
        unpack(row, place(r));
      } else {
        for (int64_t c = 0; c < g.stride; ++c) {
          __builtin_memset(place(r) + c * column_group, 0, pitch * sizeof(A));
        }
      }
    }
  }
};

// Output rows [begin, end) of all planes.
template <class T>
static void depthwise_forward(const T* x, const T* weight, const T* bias, T* y, const DepthwiseGeometry& g,
                              Activation activation, Wide<T>* memory, int64_t begin, int64_t end) {
  InputBand<T> band(g, x, weight, bias, memory);
  Wide<T>* const pre = memory;
  const int64_t count = g.out_width * g.channels, largest = g.output_band();
  for (int64_t i = begin; i < end;) {
    const int64_t row = i % g.out_height;
    int64_t rows = end - i < g.out_height - row ? end - i : g.out_height - row;
    if (rows > largest) rows = largest;
    band.go_to(i / g.out_height, row, rows);
    convolve(band.filter, pre, (rows - 1) * band.pitch + count);
    for (int64_t r = 0; r < rows; ++r, ++i) activate_row(activation, pre + r * band.pitch, y + i * count, count);
  }
}

// Units [begin, end) of `rows_per_sum` output rows each: the gradient at the pre-activation, written to d_pre unless
// null, and its products with the input, written to sums [unit][k * k + 1][channels] (the last one for the bias) unless
// null.
template <class T>
static void depthwise_backward_sums(const T* x, const T* weight, const T* bias, const T* d_y, Wide<T>* d_pre,
                                    double* sums, const DepthwiseGeometry& g, Activation activation, Wide<T>* memory,
                                    int64_t begin, int64_t end) {
  using A = Wide<T>;
  InputBand<T> band(g, x, weight, bias, memory);
  A* const pre = take(memory, g.output_band() * band.pitch + 16);
  A* const d = take(memory, g.plain_row());
  A* const unit_sums = memory;
  const int64_t count = g.out_width * g.channels, taps = g.k * g.k, period = band.filter.period;
  for (int64_t unit = begin; unit < end; ++unit) {
    __builtin_memset(unit_sums, 0, (taps + 1) * period * sizeof(A));
    const int64_t plane = unit / g.sums_per_plane(), first = unit % g.sums_per_plane() * g.rows_per_sum();
    const int64_t last = first + g.rows_per_sum() < g.out_height ? first + g.rows_per_sum() : g.out_height;
    for (int64_t start = first; start < last; start += g.output_band()) {
      const int64_t rows = last - start < g.output_band() ? last - start : g.output_band();
      band.go_to(plane, start, rows);
      if (activation != Activation::kNone) convolve(band.filter, pre, (rows - 1) * band.pitch + count);
      // The sums are formed row by row: between the rows, zero times an infinite input would be NaN.
      RowFilter<A> at_row = band.filter;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = (plane * g.out_height + start + row) * count;
        widen(d_y + at, d, count);
        activation_gradient_row(activation, pre + row * band.pitch, d, count);
        if (d_pre) widen(d, d_pre + at, count);
        if (sums) accumulate(at_row, d, unit_sums, unit_sums + taps * period, count);
        for (int64_t r = 0; r < g.k; ++r) at_row.row[r] += band.pitch;
      }
    }
    for (int64_t tap = 0; sums && tap <= taps; ++tap) {
      for (int64_t c = 0; c < g.channels; ++c) {
        double total = 0;
        for (int64_t j = c; j < period; j += g.channels) total += unit_sums[tap * period + j];
        sums[(unit * (taps + 1) + tap) * g.channels + c] = total;
      }
    }
  }
}

// Input rows [begin, end) of all planes, from the gradient d at the pre-activation.
template <class T, class D>
static void depthwise_backward_input(const D* d, const T* weight, T* d_x, const DepthwiseGeometry& g, Wide<T>* memory,
                                     int64_t begin, int64_t end) {
  using A = Wide<T>;
  const int64_t s = g.stride, reach = g.reach(), pitch = g.gradient_pitch(), count = g.width * g.channels;
  const int64_t largest = g.input_band(), column_part = largest * pitch + 16;
  A* const wide = take(memory, g.channels * g.k * g.k + 16);
  A* const tiles = take(memory, g.k * g.k * g.repeated());
  A* const unpacked = take_zeros(memory, g.unpacked_gradient());
  A* const columns = take(memory, s * column_part);
  A* const result = take(memory, g.plain_row());
  RowFilter<A> f;
  f.bias = nullptr;
  f.channels = g.channels;
  f.repeated = g.repeated();
  for (f.period = g.channels; f.period % Arithmetic<A>::kLanes;) f.period += g.channels;
  int64_t plane = -1;
  for (int64_t i = begin; i < end;) {
    if (plane < 0 || (g.channels == 1 && i / g.height != plane)) {
      unpack_filter(weight + (g.channels == 1 ? i / g.height % g.filters : 0) * g.k * g.k, g, s, wide, tiles);
    }
    plane = i / g.height;
    const int64_t row = i % g.height;
    int64_t rows = end - i < g.height - row ? end - i : g.height - row;
    if (rows > largest) rows = largest;
    // Output row m - t meets input row s * m + remainder - padding at the filter's row remainder + s * t.
    const int64_t first_m = (row + g.padding) / s - (reach - 1), last_m = (row + rows - 1 + g.padding) / s;
    for (int64_t m = first_m; m <= last_m; ++m) {
      A* const to = unpacked + (m - first_m) * pitch;
      if (m >= 0 && m < g.out_height) {
        widen(d + (plane * g.out_height + m) * g.out_width * g.channels, to + (reach - 1) * g.channels,
              g.out_width * g.channels);
      } else {
        __builtin_memset(to, 0, pitch * sizeof(A));
      }
    }
    for (int64_t step = 0; step < s && step < rows; ++step) {
      const int64_t first_row = (row + step + g.padding) % s, m = (row + step + g.padding) / s;
      const int64_t parts = (rows - step + s - 1) / s;
      f.rows = (g.k - first_row + s - 1) / s;
      for (int64_t t = 0; t < f.rows; ++t) f.row[t] = unpacked + (m - t - first_m) * pitch;
      f.weight = tiles;
      for (int64_t r = 0; r < first_row; ++r) f.weight += (g.k + s - 1 - r) / s * g.k * g.repeated();
      for (int64_t first_column = 0; first_column < s; ++first_column) {
        f.columns = (g.k - first_column + s - 1) / s;
        // The input's first column with this remainder, and its position in a row of the output.
        const int64_t position = (g.padding - first_column + s - 1) / s, x = first_column - g.padding + s * position;
        for (int64_t t = 0; t < f.columns; ++t) f.offset[t] = (reach - 1 - t + position) * g.channels;
        const int64_t pixels = x < g.width ? (g.width - x + s - 1) / s : 0;
        if (pixels) convolve(f, columns + x * column_part, (parts - 1) * pitch + pixels * g.channels);
        f.weight += f.rows * f.columns * g.repeated();
      }
      for (int64_t part = 0; part < parts; ++part) {
        T* const to = d_x + (i + step + part * s) * count;
        const A* from = columns + part * pitch;
        if (s == 2) {
          for (int64_t x = 0; x < 2 && x < g.width; ++x) {
            to_every_second(from + x * column_part, result + x * g.channels, (g.width - x + 1) / 2, g.channels);
          }
          from = result;
        }
        activate_row(Activation::kNone, from, to, count);
      }
    }
    i += rows;
  }
}
