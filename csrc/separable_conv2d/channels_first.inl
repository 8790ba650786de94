// The NCHW loop of separable_conv2d, see loops.inl. Vectors run over consecutive output pixels.

// A tile is some whole output rows or, where a row is longer than kPixelsFirst, a part of one; its pixels are
// consecutive either way.
struct Tiling {
  int64_t lines, columns;               // of the largest tile
  int64_t parts;                        // of a row
  int64_t tiles;                        // of a sample
  int64_t patch_columns, patch_stride;  // of the input that the largest tile reads; vectors may reach behind it
};

EVKERNELS_INLINE Tiling tiling_of(const SeparableShape& s) {
  Tiling t;
  t.parts = (s.out_width + kPixelsFirst - 1) / kPixelsFirst;
  t.columns = (s.out_width + t.parts - 1) / t.parts;
  t.lines = smaller(kPixelsFirst / t.columns, s.out_height);
  if (t.parts > 1) t.lines = 1;
  t.tiles = t.parts * ((s.out_height + t.lines - 1) / t.lines);
  t.patch_columns = (t.columns - 1) * s.stride + s.size;
  t.patch_stride = round_up(t.patch_columns, 16) + 32;
  return t;
}

static int64_t separable_conv2d_patch_size(const SeparableShape& s) {
  const Tiling t = tiling_of(s);
  return ((t.lines - 1) * s.stride + s.size) * t.patch_stride;
}

// Rows [top, top + rows) and columns [left, left + columns) of one input plane, the borders' zeros included.
struct Patch {
  int64_t top, left, rows, columns, stride;
};

template <class T, class R>
static void unpack(const T* __restrict__ plane, const Patch& patch, const SeparableShape& s, R* __restrict__ to) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t begin = smaller(larger(0, -patch.left), patch.columns);
  const int64_t end = larger(smaller(patch.columns, s.width - patch.left), begin);
  for (int64_t r = 0; r < patch.rows; ++r, to += patch.stride) {
    const int64_t row = patch.top + r;
    const bool inside = row >= 0 && row < s.height;
    const int64_t first = inside ? begin : patch.columns, last = inside ? end : patch.columns;
    for (int64_t k = 0; k < first; ++k) to[k] = 0;
    const T* const from = plane + row * s.width + patch.left;
    int64_t k = first;
    for (; k + kLanes <= last; k += kLanes) store(to + k, load(from + k));
    for (; k < last; ++k) to[k] = to_float(from[k]);
    for (; k < patch.columns; ++k) to[k] = 0;
  }
}

// Every `stride`-th element from p on.
template <int stride>
EVKERNELS_INLINE VecF load_every(const float* p) {
  if constexpr (stride == 1) return load(p);
  VecF result;
  const VecF low = load(p), high = load(p + EVKERNELS_LANES);
#if EVKERNELS_LANES == 16
  result = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif EVKERNELS_LANES == 8
  result = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  result = __builtin_shufflevector(low, high, 0, 2, 4, 6);
#endif
  return result;
}
template <int stride>
EVKERNELS_INLINE double load_every(const double* p) {
  return *p;
}

// The depthwise result of `count` consecutive pixels of one output row, up to a vector more. `known` is the window's
// size where the compiler should know it, else 0.
template <int known, int stride, class V, class R>
static void depthwise_row(const R* __restrict__ rows, int64_t row_stride, const R* __restrict__ w, int64_t given,
                          R bias, R* __restrict__ a, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  const int64_t size = known ? known : given;
  for (int64_t p = 0; p < count; p += lanes) {
    V sum = bias - V{};
#pragma GCC unroll 5
    for (int64_t ky = 0; ky < size; ++ky) {
#pragma GCC unroll 5
      for (int64_t kx = 0; kx < size; ++kx) {
        sum += w[ky * size + kx] * load_every<stride>(rows + ky * row_stride + p * stride + kx);
      }
    }
    store(a + p, sum);
  }
}

template <class V, class R>
EVKERNELS_INLINE void depthwise_row_of(const SeparableShape& s, const R* rows, int64_t row_stride, const R* w, R bias,
                                       R* a, int64_t count) {
  const auto call = [&](auto function) { function(rows, row_stride, w, s.size, bias, a, count); };
  if (s.stride == 1) {
    call(s.size == 3 ? depthwise_row<3, 1, V, R> : s.size == 5 ? depthwise_row<5, 1, V, R> : depthwise_row<0, 1, V, R>);
  } else {
    call(s.size == 3 ? depthwise_row<3, 2, V, R> : s.size == 5 ? depthwise_row<5, 2, V, R> : depthwise_row<0, 2, V, R>);
  }
}

// One tile: its sample, its first pixel and how many it has.
struct PixelRange {
  int64_t sample, first, count;
};

// The depthwise result of a tile, without activation, into a [C, kPitch] and a vector behind it. `unpacked` holds one
// patch.
template <class T, class R>
static PixelRange depthwise_first(const T* __restrict__ x, const Packed<R>& p, R* __restrict__ a,
                                  R* __restrict__ unpacked, const SeparableShape& s, const Tiling& t, int64_t tile) {
  const int64_t sample = tile / t.tiles, place = tile - sample * t.tiles, group = place / t.parts;
  const int64_t line = group * t.lines, column = (place - group * t.parts) * t.columns;
  const int64_t lines = smaller(t.lines, s.out_height - line), columns = smaller(t.columns, s.out_width - column);
  const Patch patch = {line * s.stride - s.padding, column * s.stride - s.padding, (lines - 1) * s.stride + s.size,
                       (columns - 1) * s.stride + s.size, t.patch_stride};
  for (int64_t c = 0; c < s.channels; ++c) {
    unpack(x + (sample * s.channels + c) * s.height * s.width, patch, s, unpacked);
    for (int64_t r = 0; r < lines; ++r) {
      // Vectors reach behind the row; the next row, or the next channel, overwrites what they leave there.
      depthwise_row_of<typename Arithmetic<T>::Type>(s, unpacked + r * s.stride * patch.stride, patch.stride,
                                                     p.depthwise + c * s.size * s.size, p.depthwise_bias[c],
                                                     a + c * kPitch + r * columns, columns);
    }
  }
  return {sample, line * s.out_width + column, lines * columns};
}

// Tiles [begin, end) of at most kPixelsFirst pixels. `buffer` holds a tile, its output and a patch. The result
// before its activation is kept in `pre`, which may be null.
template <class T>
static void separable_conv2d_channels_first(const T* __restrict__ x, Compute<T>* packed, T* __restrict__ y,
                                            T* __restrict__ pre, Compute<T>* buffer, const SeparableShape& s,
                                            int64_t begin, int64_t end) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const Packed<R> p = packed_at<T>(packed, s);
  const int64_t C = s.channels, O = s.outputs, pixels = s.out_height * s.out_width;
  const Tiling t = tiling_of(s);
  R* const output = buffer + (C + 1) * kPitch;
  R* const unpacked = output + kPitch * round_up(O, kStep);
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [sample, first, count] = depthwise_first(x, p, buffer, unpacked, s, t, tile);
    activate_buffer<V>(s.activation, buffer, C * kPitch);
    multiply<Start::kRowBias, V, R>(p.pointwise, C, 1, O, buffer, kPitch, p.pointwise_bias, count, C, output, kPitch);
    const int64_t at = sample * O * pixels + first;
    if (pre) convert_rows<V>((const R*)output, kPitch, pre + at, pixels, O, count);
    activate_rows<V>(s.output_activation, output, kPitch, y + at, pixels, O, count);
  }
}
