// The channels_last loop of separable_conv2d, see loops.inl. Vectors run over the channels of a pixel.

// Taps [y_begin, y_end) x [x_begin, x_end) of one vector of channels of one pixel. `corner` is the offset of tap (0,
// 0), which may lie outside of the input. Vectors may reach into the next pixel's channels but not behind the input's
// end.
template <class T, class V, class R>
EVKERNELS_INLINE V depthwise_pixel(const T* __restrict__ x, int64_t total, int64_t corner, int64_t row,
                                   int64_t channels, const R* __restrict__ w, int64_t w_stride, int64_t size,
                                   int64_t y_begin, int64_t y_end, int64_t x_begin, int64_t x_end, V sum) {
  for (int64_t ky = y_begin; ky < y_end; ++ky) {
    for (int64_t kx = x_begin; kx < x_end; ++kx) {
      const int64_t at = corner + ky * row + kx * channels;
      const V value = total - at >= Arithmetic<T>::kLanes ? (V)load(x + at) : (V)load_partial(x + at, total - at);
      sum += load(w + (ky * size + kx) * w_stride) * value;
    }
  }
  return sum;
}

// The same for `pixels` pixels side by side that have all their taps. They share their weights, and what they load, and
// for 16-bit types convert, where their windows overlap.
template <int pixels, int size, int stride, class T, class R>
EVKERNELS_INLINE void depthwise_block(const T* __restrict__ x, int64_t row, int64_t channels, const R* __restrict__ w,
                                      int64_t w_stride, const R* __restrict__ bias, R* __restrict__ a,
                                      int64_t a_stride) {
  using V = typename Arithmetic<T>::Type;
  V sum[pixels];
#pragma GCC unroll 4
  for (int q = 0; q < pixels; ++q) sum[q] = load(bias);
#pragma GCC unroll 5
  for (int ky = 0; ky < size; ++ky) {
    V weight[size];
#pragma GCC unroll 5
    for (int kx = 0; kx < size; ++kx) weight[kx] = load(w + (ky * size + kx) * w_stride);
    const T* at = x + ky * row;
    // An unknown address: of known ones the compiler keeps each tap's, which do not fit into registers.
    asm("" : "+r"(at));
#pragma GCC unroll 11
    for (int j = 0; j < (pixels - 1) * stride + size; ++j) {
      const V value = load(at + j * channels);
#pragma GCC unroll 4
      for (int q = 0; q < pixels; ++q) {
        const int kx = j - q * stride;
        if (kx >= 0 && kx < size) sum[q] += weight[kx] * value;
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < pixels; ++q) store(a + q * a_stride, sum[q]);
}

// All channels of `count` pixels that have all their taps; with `pixels` = 1 for any stride, of which `step` is the
// distance in memory. Channels are the inner loop: a row of pixels under one vector crowds into few sets of the
// first-level cache where the pixels lie a power of two apart, and took 1.5 times as long at 256 channels (AVX2).
template <int pixels, int size, int stride, class T, class R>
static void depthwise_inner(const T* __restrict__ x, int64_t step, int64_t row, int64_t channels, const Packed<R>& p,
                            R* __restrict__ a, int64_t count) {
  for (; count >= pixels; count -= pixels, x += pixels * step, a += pixels * p.pitch) {
    for (int64_t c = 0; c < channels; c += Arithmetic<T>::kLanes) {
      depthwise_block<pixels, size, stride>(x + c, row, channels, p.depthwise + c, p.channels, p.depthwise_bias + c,
                                            a + c, p.pitch);
    }
  }
  if constexpr (pixels > 1) depthwise_inner<1, size, 1>(x, step, row, channels, p, a, count);
}

// The depthwise result of the output pixels [first, first + count), without activation, into a [count, p.pitch].
template <class T, class R>
static void depthwise_last(const T* __restrict__ x, const Packed<R>& p, R* __restrict__ a, const SeparableShape& s,
                           int64_t first, int64_t count) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t C = s.channels, K = s.size, row = s.width * C, step = s.stride * C;
  const int64_t total = s.batch * s.height * row;
  // Columns [inner_begin, inner_end) have all their taps.
  const int64_t inner_begin = (s.padding + s.stride - 1) / s.stride;
  const int64_t reach = s.width + s.padding - K;
  const int64_t inner_end = reach < 0 ? 0 : smaller(reach / s.stride + 1, s.out_width);
  int64_t length;
  for (int64_t done = 0; done < count; done += length) {
    const int64_t pixel = first + done, line = pixel / s.out_width, column = pixel - line * s.out_width;
    length = smaller(count - done, s.out_width - column);
    const int64_t sample = line / s.out_height;
    const int64_t top = (line - sample * s.out_height) * s.stride - s.padding;
    const int64_t y_begin = larger(0, -top), y_end = smaller(K, s.height - top);
    const int64_t corner = ((sample * s.height + top) * s.width + column * s.stride - s.padding) * C;
    const bool all_rows = y_begin == 0 && y_end == K && (K == 3 || K == 5);
    const int64_t begin = all_rows ? smaller(larger(inner_begin - column, 0), length) : length;
    int64_t end = all_rows ? larger(smaller(inner_end - column, length), begin) : length;
    // The last vectors of the input's last pixels may reach behind its end.
    const int64_t reached = corner - step + (K - 1) * (row + C) + round_up(C, kLanes);
    while (end > begin && reached + end * step > total) --end;
    R* const result = a + done * p.pitch;
    if (begin < end) {
      const auto call = [&](auto function) {
        function(x + corner + begin * step, step, row, C, p, result + begin * p.pitch, end - begin);
      };
      if (K == 5) {
        s.stride == 1 ? call(depthwise_inner<4, 5, 1, T, R>) : call(depthwise_inner<1, 5, 1, T, R>);
      } else if (s.stride == 1) {
        call(depthwise_inner<4, 3, 1, T, R>);
      } else if (s.stride == 2) {
        call(depthwise_inner<4, 3, 2, T, R>);
      } else {
        call(depthwise_inner<1, 3, 1, T, R>);
      }
    }
    for (int64_t k = begin == 0 ? end : 0; k < length; k = k + 1 == begin ? end : k + 1) {
      const int64_t left = (column + k) * s.stride - s.padding;
      for (int64_t c = 0; c < C; c += kLanes) {
        const V sum =
            depthwise_pixel<T, V>(x, total, corner + c + k * step, row, C, p.depthwise + c, p.channels, K, y_begin,
                                  y_end, larger(0, -left), smaller(K, s.width - left), (V)load(p.depthwise_bias + c));
        store(result + k * p.pitch + c, sum);
      }
    }
  }
}

// The rows of x that `count` output pixels from `first` on reach below those of the output row above them, to be asked
// for during `steps` steps.
template <class T>
static Ahead input_ahead(const T* x, const SeparableShape& s, int64_t first, int64_t count, int64_t steps) {
  const int64_t line = first / s.out_width, sample = line / s.out_height, width = count * s.stride;
  const int64_t row = (line - sample * s.out_height) * s.stride - s.padding + s.size - s.stride;
  const int64_t begin = (sample * s.height + row) * s.width + (first - line * s.out_width) * s.stride;
  const auto at = [&](int64_t pixel) {
    return (const char*)(x + smaller(larger(pixel, 0), s.batch * s.height * s.width) * s.channels);
  };
  // At stride 1 one row alone.
  const int64_t second = s.stride == 1 ? begin + width : begin + s.width;
  Ahead ahead = {at(begin), at(begin + width), at(second), at(second + (s.stride - 1) * width), 0};
  const int64_t bytes = ahead.end - ahead.at + ahead.next_end - ahead.next;
  ahead.step = round_up(larger(bytes / steps, 1), 64);
  return ahead;
}

// Tiles [begin, end) of kPixelsLast output pixels. `buffer` holds their depthwise results and their outputs: written
// panel by panel, y's lines would be asked for too late, and waiting for them took a quarter of the time at 16 to 32
// channels (AVX2). The result before its activation is kept in `pre`, which may be null.
template <class T>
static void separable_conv2d_channels_last(const T* __restrict__ x, Compute<T>* packed, T* __restrict__ y,
                                           T* __restrict__ pre, Compute<T>* buffer, const SeparableShape& s,
                                           int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const Packed<R> p = packed_at<T>(packed, s);
  const int64_t C = s.channels, O = s.outputs, pixels = s.batch * s.out_height * s.out_width;
  const int64_t pitch = outer_pitch<T>(s);
  R* const output = buffer + kPixelsLast * p.pitch;
  for (int64_t first = begin * kPixelsLast; first < smaller(end * kPixelsLast, pixels); first += kPixelsLast) {
    const int64_t count = smaller(kPixelsLast, pixels - first);
    depthwise_last(x, p, buffer, s, first, count);
    activate_buffer<V>(s.activation, buffer, count * p.pitch);
    Ahead ahead = input_ahead(x, s, first + kPixelsLast, kPixelsLast, product_steps<V, R>(kPixelsLast, O, C));
    multiply<Start::kColumnBias, V, R>(buffer, p.pitch, 1, count, p.pointwise, 0, p.pointwise_bias, O, C, output, pitch,
                                       &ahead);
    if (pre) convert_rows<V>((const R*)output, pitch, pre + first * O, O, count, O);
    activate_rows<V>(s.output_activation, output, pitch, y + first * O, O, count, O);
  }
}
