// Loops of depthwise_conv2d over output rows (forward) and units of output rows (backward), compiled once per
// instruction set. The convolutions themselves are in channels_first.inl and channels_last.inl, one file per layout.
//
// Input and output are read and written in place, whatever the padding and stride. Rows pass through a scratch of a few
// rows only on their way to 16-bit types. One unit of the backward pass forms the gradient at the pre-activation (kept
// for these rows alone), its products with the input and the gradient of the input rows above, while all are in the
// cache.
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

// Y is Wide<T>; or a 16-bit T, which needs no scratch, if channels_last and nothing follows the convolution: a scratch
// takes 1.1 to 1.2 times as long there, and no longer where rows are contiguous.
template <class T, class Y>
static void convolve(const Plane<T>& p, int64_t stride, Y* out, int64_t first, int64_t last) {
  dispatch_size(p, [&](auto size) {
    constexpr int k = decltype(size)::value;
    if (p.channels == 1) {
      (stride == 1 ? convolve_contiguous<k, 1, T> : convolve_contiguous<k, 2, T>)(p, (Wide<T>*)out, first, last);
    } else {
      (stride == 1 ? convolve_interleaved<k, 1, T, Y> : convolve_interleaved<k, 2, T, Y>)(p, out, first, last);
    }
  });
}

template <class T>
static void convolve_transposed(const Plane<T>& p, Wide<T>* out, int64_t first, int64_t last) {
  dispatch_size(p, [&](auto size) {
    constexpr int k = decltype(size)::value;
    (p.channels == 1 ? transposed_contiguous<k, T> : transposed_interleaved<k, T>)(p, out, first, last);
  });
}

template <class T, class D>
static void multiply(const Plane<T>& p, int64_t stride, const D* d, Wide<T>* sums, int64_t first, int64_t last) {
  dispatch_size(p, [&](auto size) {
    constexpr int k = decltype(size)::value;
    if (p.channels == 1) {
      (stride == 1 ? multiply_contiguous<k, 1, T, D> : multiply_contiguous<k, 2, T, D>)(p, d, sums, first, last);
    } else {
      (stride == 1 ? multiply_interleaved<k, 1, T, D> : multiply_interleaved<k, 2, T, D>)(p, d, sums, first, last);
    }
  });
}

template <class P>
struct PointeeOf;
template <class T>
struct PointeeOf<const T*> {
  using type = T;
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
  Filters<T> filters(g, weight, bias, false, memory);
  const int64_t count = g.out_width * g.channels;
  // Rows go on to the activation while they are in the cache.
  const bool in_place = activation == Activation::kNone && (__is_same(T, A) || g.channels > 1);
  const int64_t most = in_place ? g.out_height : g.rows_at_once(count);
  for (int64_t i = begin; i < end;) {
    const int64_t plane = i / g.out_height, row = i % g.out_height;
    const int64_t rows = smaller(most, smaller(end - i, g.out_height - row));
    filters.go_to(plane);
    if (in_place) {
      convolve(filters.input(x, plane), g.stride, y + i * count, row, row + rows);
    } else {
      A* pre = memory;
      if constexpr (__is_same(T, A)) pre = y + i * count;
      convolve(filters.input(x, plane), g.stride, pre, row, row + rows);
      activate_row(activation, pre, y + i * count, rows * count);
    }
    i += rows;
  }
}

// Rows [first, last) of the gradient of the input, from that at the pre-activation.
template <class T, class D>
static void input_gradient(const Plane<D>& d, const DepthwiseGeometry& g, Wide<T>* scratch, T* d_x, int64_t first,
                           int64_t last) {
  using A = Wide<T>;
  if constexpr (__is_same(T, D)) {
    if (g.stride == 1 && (__is_same(T, A) || g.channels > 1)) return convolve(d, 1, d_x, first, last);
  }
  const int64_t count = g.width * g.channels, most = __is_same(T, A) ? last : g.rows_at_once(count);
  for (int64_t rows; first < last; first += rows, d_x += rows * count) {
    rows = smaller(most, last - first);
    A* to = scratch;
    if constexpr (__is_same(T, A)) to = d_x;
    if (g.stride == 1) {
      convolve(d, 1, to, first, first + rows);
    } else {
      convolve_transposed(d, to, first, first + rows);
    }
    if (!__is_same(T, A)) activate_row(Activation::kNone, to, d_x, rows * count);
  }
}

// Units [begin, end) of g.rows_per_sum() output rows each, and the input rows from there to the next unit: the gradient
// of the input, and sums [unit][k * k + 1][channels] of the gradients of weights and bias; either may be null.
template <class T>
static void depthwise_backward(const T* x, const T* weight, const T* bias, const T* d_y, T* d_x, double* sums,
                               const DepthwiseGeometry& g, Activation activation, Wide<T>* memory, int64_t begin,
                               int64_t end) {
  using A = Wide<T>;
  Filters<T> filters(g, weight, bias, true, memory);
  A* const unit_sums = take(memory, (g.k * g.k + 1) * larger(g.padded_channels(), 16));
  A* const pre = take(memory, g.rows_before_sum() * g.out_width * g.channels);
  const int64_t count = g.out_width * g.channels, taps = g.k * g.k + 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / g.sums_per_plane(), first = unit % g.sums_per_plane() * g.rows_per_sum();
    const int64_t last = smaller(first + g.rows_per_sum(), g.out_height);
    filters.go_to(plane);
    const Plane<T> input = filters.input(x, plane);
    const auto backward = [&](const auto* d, int64_t top, int64_t bottom) {
      if (sums) {
        __builtin_memset(unit_sums, 0, taps * larger(g.padded_channels(), 16) * sizeof(A));
        multiply(input, g.stride, d + (first - top) * count, unit_sums, first, last);
        write_sums<A>(unit_sums, g.channels, taps, sums + unit * taps * g.channels);
      }
      if (!d_x) return;
      const int64_t from = first == 0 ? 0 : g.input_row(first),
                    to = last == g.out_height ? g.height : g.input_row(last);
      // The rows of d, from `top` on, as an image; row `top` of the output lies above row stride * top of the input.
      const int64_t shift = g.stride * top;
      const Plane<typename PointeeOf<decltype(d)>::type> gradient = {
          d,
          bottom - top,
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
    };
    const T* const d_plane = d_y + plane * g.out_height * count;
    if (activation == Activation::kNone) {
      backward(d_plane, 0, g.out_height);
    } else {
      const int64_t top = larger(0, first - (g.span() - 1) / g.stride);
      for (int64_t row = top, rows; row < last; row += rows) {
        rows = smaller(g.rows_at_once(count), last - row);
        A* const to = pre + (row - top) * count;
        convolve(input, g.stride, to, row, row + rows);
        activation_gradient_row(activation, to, d_plane + row * count, rows * count);
      }
      backward((const A*)pre, top, last);
    }
  }
}
