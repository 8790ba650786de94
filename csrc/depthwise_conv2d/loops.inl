// Loops of depthwise_conv2d over output rows (forward) and units of output rows (backward), compiled once per
// instruction set. The convolutions themselves are in channels_first.inl and channels_last.inl, one file per layout.
//
// Input and output are read and written in place, whatever the padding and stride, in float and double. The rows of
// 16-bit types pass through a scratch of a few rows, widened on the way in and rounded on the way out. Convolutions on
// 16-bit rows themselves, which convert a value once for each row of the filter, took 0.7 (channels_last forward
// without activation) to 1.5 times as long on AVX2, and this file two and a half times as long to compile. One unit of
// the backward pass forms the gradient at the pre-activation (kept for these rows alone), its products with the input
// and the gradient of the input rows above, while all are in the cache.
//
// The floor is the larger of k * k multiply-adds per output and of one read of x and one write of y; backward, twice
// the multiply-adds, one read of x and of the gradient and one write. At 3 x 3, 1 x 16 x 260 x 346 channels_last in
// float32 and warm memory the forward takes 1.8 times a copy of x at stride 1 and 0.85 times at stride 2 (Zen 5, one
// core); 9 multiply-adds per vector are 4.5 cycles there.

#include "depthwise_conv2d/rows.inl"

#include "depthwise_conv2d/channels_first.inl"
#include "depthwise_conv2d/channels_last.inl"

template <int size>
struct Size {
  static constexpr int value = size;
};

// Calls f(Size<k>) for the sizes that have loops of their own, f(Size<0>) for others and for dilated filters. Double,
// which is there for gradient checks, and x86 processors older than AVX2 make do with the latter: half of the code
// would be for them.
template <class T, class F>
EVKERNELS_INLINE void dispatch_size(const Plane<T>& p, const F& f) {
#if defined(__x86_64__) && EVKERNELS_LANES == 4
  constexpr bool kOwnLoops = false;
#else
  constexpr bool kOwnLoops = !__is_same(T, double);
#endif
  if constexpr (kOwnLoops) {
    if (p.k == 3 && p.dilation == 1) return f(Size<3>{});
    if (p.k == 5 && p.dilation == 1) return f(Size<5>{});
  }
  f(Size<0>{});
}

template <class A>
static void convolve(const Plane<A>& p, int64_t stride, A* out, int64_t first, int64_t last) {
  dispatch_size(p, [&](auto size) {
    constexpr int k = decltype(size)::value;
    if (p.channels == 1) {
      (stride == 1 ? convolve_contiguous<k, 1, A> : convolve_contiguous<k, 2, A>)(p, out, first, last);
    } else {
      (stride == 1 ? convolve_interleaved<k, 1, A> : convolve_interleaved<k, 2, A>)(p, out, first, last);
    }
  });
}

template <class A>
static void convolve_transposed(const Plane<A>& p, A* out, int64_t first, int64_t last) {
  dispatch_size(p, [&](auto size) {
    constexpr int k = decltype(size)::value;
    (p.channels == 1 ? transposed_contiguous<k, A> : transposed_interleaved<k, A>)(p, out, first, last);
  });
}

template <class A>
static void multiply(const Plane<A>& p, int64_t stride, const A* d, A* sums, int64_t first, int64_t last) {
  dispatch_size(p, [&](auto size) {
    constexpr int k = decltype(size)::value;
    if (p.channels == 1) {
      (stride == 1 ? multiply_contiguous<k, 1, A> : multiply_contiguous<k, 2, A>)(p, d, sums, first, last);
    } else {
      (stride == 1 ? multiply_interleaved<k, 1, A> : multiply_interleaved<k, 2, A>)(p, d, sums, first, last);
    }
  });
}

// The rows of a plane that its output rows [first, last) meet: the plane itself or, of 16-bit types, an image of these
// rows in `scratch`. Its output rows are counted from `above` on.
template <class T>
struct Window {
  Plane<Wide<T>> rows;
  int64_t above;

  Window(const Plane<T>& p, int64_t stride, int64_t first, int64_t last, Wide<T>* scratch) {
    if constexpr (__is_same(T, Wide<T>)) {
      rows = p;
      above = 0;
    } else {
      above = larger(0, (first * stride - p.padding) / stride);
      const int64_t top = smaller(above * stride, p.height), row = p.width * p.channels;
      const int64_t bottom = larger(top, smaller((last - 1) * stride - p.padding + p.span(), p.height));
      widen(p.x + top * row, scratch, (bottom - top) * row);
      rows = {scratch, bottom - top, p.width, p.out_width, p.channels, p.k, p.padding, p.dilation, p.filter, p.bias};
    }
  }
};

// Sums [vector of channels][taps][lanes], or those of one channel [taps][lanes], as [taps][channels].
template <class A>
static void write_sums(const A* sums, int64_t channels, int64_t taps, double* to) {
  constexpr int kLanes = Arithmetic<A>::kLanes;
  if (channels == 1) {
    for (int64_t tap = 0; tap < taps; ++tap, sums += kLanes) {
      double total = 0;
      for (int j = 0; j < kLanes; ++j) total += sums[j];
      to[tap] = total;
    }
    return;
  }
  for (int64_t v = 0; v < channel_vectors<A>(channels); ++v) {
    for (int64_t tap = 0; tap < taps; ++tap, sums += kLanes) {
      double* const at = to + tap * channels + first_channel<A>(v, channels);
      for (int j = 0; j < kLanes; ++j) at[j] = sums[j];
    }
  }
}

template <class A>
static A* take(A*& memory, int64_t count) {
  A* const taken = memory;
  memory += count;
  return taken;
}

// The filters of the planes that a task goes through, one after the other.
template <class T>
struct Filters {
  using A = Wide<T>;
  const DepthwiseGeometry& g;
  const T *weight, *bias;
  A *filter, *turned, *bias_values;
  int64_t loaded = -1;

  Filters(const DepthwiseGeometry& geometry, const T* weights, const T* biases, bool want_turned, A*& memory)
      : g(geometry), weight(weights), bias(biases) {
    filter = take(memory, g.k * g.k * g.padded_channels());
    turned = want_turned ? take(memory, g.k * g.k * g.padded_channels()) : nullptr;
    bias_values = take(memory, g.padded_channels());
  }

  void go_to(int64_t plane) {
    const int64_t wanted = g.channels == 1 ? plane % g.filters : 0;
    if (wanted == loaded) return;
    loaded = wanted;
    const T* const from = weight + wanted * g.k * g.k;
    arrange_filter(from, g.channels, g.k * g.k, false, filter);
    if (turned) arrange_filter(from, g.channels, g.k * g.k, true, turned);
    if (bias) arrange_filter(bias + wanted, g.channels, 1, false, bias_values);
  }

  Plane<T> input(const T* x, int64_t plane) const {
    return {x + plane * g.height * g.width * g.channels,
            g.height,
            g.width,
            g.out_width,
            g.channels,
            g.k,
            g.padding,
            g.dilation,
            filter,
            bias ? bias_values : nullptr};
  }
};

// Output rows [begin, end) of all planes.
template <class T>
static void depthwise_forward(const T* x, const T* weight, const T* bias, T* y, const DepthwiseGeometry& g,
                              Activation activation, Wide<T>* memory, int64_t begin, int64_t end) {
  using A = Wide<T>;
  constexpr bool kWidened = !__is_same(T, A);
  Filters<T> filters(g, weight, bias, false, memory);
  const int64_t count = g.out_width * g.channels;
  A* const scratch = kWidened ? take(memory, g.rows_at_once(count, kWidened) * count) : nullptr;
  // Rows go on to the activation while they are in the cache.
  const int64_t most = activation == Activation::kNone && !kWidened ? g.out_height : g.rows_at_once(count, kWidened);
  for (int64_t i = begin; i < end;) {
    const int64_t plane = i / g.out_height, row = i % g.out_height;
    const int64_t rows = smaller(most, smaller(end - i, g.out_height - row));
    filters.go_to(plane);
    const Window<T> window(filters.input(x, plane), g.stride, row, row + rows, memory);
    A* pre = scratch;
    if constexpr (!kWidened) pre = y + i * count;
    convolve(window.rows, g.stride, pre, row - window.above, row + rows - window.above);
    if (kWidened || activation != Activation::kNone) activate_row(activation, pre, y + i * count, rows * count);
    i += rows;
  }
}

// Rows [first, last) of the gradient of the input, from that at the pre-activation.
template <class T>
static void input_gradient(const Plane<Wide<T>>& d, const DepthwiseGeometry& g, Wide<T>* scratch, T* d_x, int64_t first,
                           int64_t last) {
  using A = Wide<T>;
  constexpr bool kWidened = !__is_same(T, A);
  const int64_t count = g.width * g.channels, most = kWidened ? g.rows_at_once(count, kWidened) : last;
  for (int64_t rows; first < last; first += rows, d_x += rows * count) {
    rows = smaller(most, last - first);
    A* to = scratch;
    if constexpr (!kWidened) to = d_x;
    if (g.stride == 1) {
      convolve(d, 1, to, first, first + rows);
    } else {
      convolve_transposed(d, to, first, first + rows);
    }
    if (kWidened) activate_row(Activation::kNone, to, d_x, rows * count);
  }
}

// Units [begin, end) of g.rows_per_sum() output rows each, and the input rows from there to the next unit: the gradient
// of the input, and sums [unit][k * k + 1][channels] of the gradients of weights and bias; either may be null. `d_y`
// begins with row `d_first` of all planes' output rows; g.rows_above_sum() above the first unit's are read, too.
template <class T>
static void depthwise_backward(const T* x, const T* weight, const T* bias, const T* d_y, int64_t d_first, T* d_x,
                               double* sums, const DepthwiseGeometry& g, Activation activation, Wide<T>* memory,
                               int64_t begin, int64_t end) {
  using A = Wide<T>;
  constexpr bool kWidened = !__is_same(T, A);
  Filters<T> filters(g, weight, bias, true, memory);
  const int64_t count = g.out_width * g.channels, taps = g.k * g.k + 1;
  const int64_t sums_size = taps * larger(g.padded_channels(), 16);
  A* const unit_sums = take(memory, sums_size);
  A* const pre = take(memory, g.rows_before_sum() * count);
  const bool plain = activation == Activation::kNone, in_place = plain && !kWidened;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / g.sums_per_plane(), first = unit % g.sums_per_plane() * g.rows_per_sum();
    const int64_t last = smaller(first + g.rows_per_sum(), g.out_height);
    filters.go_to(plane);
    const int64_t top = larger(0, first - g.rows_above_sum());
    const T* const d_rows = d_y + (plane * g.out_height + top - d_first) * count;
    // The gradient at the pre-activation, from output row `top` on.
    const A* d = pre;
    if constexpr (!kWidened) d = in_place ? d_rows : pre;
    __builtin_memset(unit_sums, 0, sums_size * sizeof(A));
    for (int64_t row = in_place ? first : top, rows; row < last; row += rows) {
      const int64_t stop = row < first ? first : last;
      rows = in_place ? stop - row : smaller(g.rows_at_once(count, kWidened), stop - row);
      const bool summed = sums && row >= first;
      A* const to = pre + (row - top) * count;
      if (plain && !in_place) widen(d_rows + (row - top) * count, to, rows * count);
      if (plain && !summed) continue;
      const Window<T> window(filters.input(x, plane), g.stride, row, row + rows, memory);
      const int64_t from = row - window.above;
      if (!plain) {
        convolve(window.rows, g.stride, to, from, from + rows);
        activation_gradient_row(activation, to, d_rows + (row - top) * count, rows * count);
      }
      if (summed) multiply(window.rows, g.stride, d + (row - top) * count, unit_sums, from, from + rows);
    }
    if (sums) write_sums<A>(unit_sums, g.channels, taps, sums + unit * taps * g.channels);
    if (!d_x) continue;
    const int64_t from = first == 0 ? 0 : g.input_row(first), to = last == g.out_height ? g.height : g.input_row(last);
    // The rows of d, from `top` on, as an image; row `top` of the output lies above row stride * top of the input.
    const int64_t shift = g.stride * top;
    const Plane<A> gradient = {d,
                               last - top,
                               g.out_width,
                               g.width,
                               g.channels,
                               g.k,
                               g.stride == 1 ? g.span() - 1 - g.padding : g.padding,
                               g.dilation,
                               g.stride == 1 ? filters.turned : filters.filter,
                               nullptr};
    input_gradient<T>(gradient, g, memory, d_x + (plane * g.height + from) * g.width * g.channels, from - shift,
                      to - shift);
  }
}
