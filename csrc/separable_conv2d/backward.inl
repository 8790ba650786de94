// The pointwise half of the gradient of separable_conv2d, see loops.inl: from the output's gradient to the gradients of
// the depthwise result before its activation, of the pointwise weight and of its bias.
//
// A tile recomputes its depthwise result and, where an activation follows and the forward has not kept it, its output;
// two products follow while all of it is in the cache. Their own loops beat a library's here, twice on large tiles, and
// add up in an order that does not depend on threads: the tiles are dealt to groups by the shape alone, each group adds
// up its tiles, and the host adds up the groups.

// Tiles of one group: enough that adding up the groups costs little, few enough that sums in float stay accurate.
EVKERNELS_INLINE int64_t tiles_per_group(int64_t tiles) { return smaller(larger(4, (tiles + 15) / 16), 32); }

static int64_t separable_conv2d_backward_tiles(const SeparableShape& s, bool channels_last) {
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  return channels_last ? (pixels + kPixelsBackward - 1) / kPixelsBackward : separable_conv2d_tiles(s, false);
}

static int64_t separable_conv2d_groups(const SeparableShape& s, bool channels_last) {
  const int64_t tiles = separable_conv2d_backward_tiles(s, channels_last);
  return (tiles + tiles_per_group(tiles) - 1) / tiles_per_group(tiles);
}

template <Activation kind, class V, class R>
static void gradient_rows(const R* pre, int64_t pre_stride, const R* from, int64_t from_stride, R* to,
                          int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = sizeof(V) / sizeof(R);
  for (int64_t m = 0; m < rows; ++m, pre += pre_stride, from += from_stride, to += to_stride) {
    int64_t k = 0;
    for (; k + lanes <= columns; k += lanes) {
      store(to + k, activation_gradient<kind>((V)load(pre + k), (V)load(from + k)));
    }
    if (k < columns) {
      const V last =
          activation_gradient<kind>((V)load_partial(pre + k, columns - k), (V)load_partial(from + k, columns - k));
      store_partial(to + k, last, columns - k);
    }
  }
}

// to = gradient at `pre` of an activation whose output's gradient is `from`; [rows, columns], each at its own stride.
// `to` may be `from`. A 16-bit `to` is reached by way of `from`, see activate_rows.
template <class V, class R, class From, class T>
EVKERNELS_INLINE void gradient_of(Activation kind, const R* pre, int64_t pre_stride, From* from, int64_t from_stride,
                                  T* to, int64_t to_stride, int64_t rows, int64_t columns) {
  if constexpr (__is_same(T, R)) {
    with_activation(kind, [&](auto constant) __attribute__((always_inline)) {
      gradient_rows<decltype(constant)::value, V, R>(pre, pre_stride, from, from_stride, to, to_stride, rows, columns);
    });
  } else {
    if (kind != Activation::kNone)
      gradient_of<V>(kind, pre, pre_stride, from, from_stride, from, from_stride, rows, columns);
    convert_rows<V>((const R*)from, from_stride, to, to_stride, rows, columns);
  }
}

// Rows in the type of the computation: where they are, or as a copy in `scratch`.
template <class R>
struct WideRows {
  const R* at;
  int64_t stride;
};
template <class V, class T, class R>
EVKERNELS_INLINE WideRows<R> widened(const T* from, int64_t stride, R* scratch, int64_t scratch_stride, int64_t rows,
                                     int64_t columns) {
  if constexpr (__is_same(T, R)) return {from, stride};
  if constexpr (!__is_same(T, R)) {
    convert_rows<V>(from, stride, scratch, scratch_stride, rows, columns);
    return {scratch, scratch_stride};
  }
}

// The buffers of one tile, rows and columns rounded up. channels_last: pixels by channels; NCHW: channels by pixels.
template <class R>
struct TileBuffers {
  R *pre, *a, *d_a;  // of the depthwise result: before and after its activation, and the gradient after
  R *y, *d_y;        // of the output before its activation, and the gradient there, `outer_pitch` between pixels
  R* turned;         // NCHW: a as pixels by channels
  R* unpacked;       // NCHW: a patch
  int64_t outer_pitch, size;
};

template <class T>
static TileBuffers<Compute<T>> tile_buffers(Compute<T>* memory, const SeparableShape& s, bool channels_last) {
  const int64_t pixels = channels_last ? kPixelsBackward : kPitch;
  // A vector behind each buffer, where blocks reach over the end.
  const int64_t inner = pixels * larger(packed_at<T>(nullptr, s).pitch, round_up(s.channels, kStep)) + 16;
  TileBuffers<Compute<T>> b;
  b.outer_pitch = outer_pitch<T>(s);
  const int64_t outer = pixels * larger(b.outer_pitch, round_up(s.outputs, kStep)) + 16;
  b.pre = memory;
  b.a = b.pre + inner;
  b.d_a = b.a + inner;
  b.y = b.d_a + inner;
  b.d_y = b.y + outer;
  b.turned = b.d_y + outer;
  b.unpacked = b.turned + (channels_last ? 0 : inner);
  b.size = b.unpacked + (channels_last ? 0 : separable_conv2d_patch_size(s)) - memory;
  return b;
}

template <class T>
static int64_t separable_conv2d_backward_buffer_size(const SeparableShape& s, bool channels_last) {
  return tile_buffers<T>(nullptr, s, channels_last).size;
}

// Elements of a group's sums: the pointwise weight's gradient [outputs rounded up, channels rounded up], the bias's.
template <class T>
static int64_t separable_conv2d_sums_size(const SeparableShape& s) {
  const auto p = packed_at<T>(nullptr, s);
  return p.outputs * p.channels + p.outputs;
}

template <class T>
EVKERNELS_INLINE Compute<T> sum_of(const Compute<T>* __restrict__ values, int64_t count) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  typename Arithmetic<T>::Type sum = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) sum += load(values + k);
  if (k < count) sum += load_partial(values + k, count - k);
  Compute<T> lanes[kLanes], total = 0;
  store(lanes, sum);
  for (int64_t l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

template <class T>
using BackwardCall = SeparableBackward<T, Compute<T>>;

// Pixels [first, first + count) of channels_last: `d_pre`, the gradient at their depthwise result, and what they add to
// `d_weight` and the bias's gradient behind it, unless that is null.
template <class T>
static void backward_tile_last(const BackwardCall<T>& call, Compute<T>* packed, T* __restrict__ d_pre,
                               Compute<T>* d_weight, Compute<T>* memory, const SeparableShape& s, int64_t first,
                               int64_t count) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const Packed<R> p = packed_at<T>(packed, s);
  const TileBuffers<R> b = tile_buffers<T>(memory, s, true);
  const int64_t C = s.channels, O = s.outputs, pitch = b.outer_pitch;
  depthwise_last(call.x, p, b.pre, s, first, count);
  activate_rows<V>(s.activation, b.pre, p.pitch, b.a, p.pitch, count, p.channels);
  WideRows<R> y = {b.y, pitch};
  if (call.pre) {
    y = widened<V>(call.pre + first * O, O, b.y, pitch, count, O);
  } else if (s.output_activation != Activation::kNone) {
    multiply<Start::kColumnBias, V, R>(b.a, p.pitch, 1, count, p.pointwise, 0, p.pointwise_bias, O, C, b.y, pitch);
  }
  const WideRows<R> d_y = widened<V>(call.d_output + first * O, O, b.d_y, pitch, count, O);
  gradient_of<V>(s.output_activation, y.at, y.stride, d_y.at, d_y.stride, b.d_y, pitch, count, O);
  Ahead ahead =
      input_ahead(call.x, s, first + kPixelsBackward, kPixelsBackward, product_steps<V, R>(kPixelsBackward, C, O));
  multiply<Start::kColumnBias, V, R>(b.d_y, pitch, 1, count, call.panels, 0, nullptr, C, O, b.d_a, p.pitch, &ahead);
  if (d_weight) {
    R* const d_bias = d_weight + p.outputs * p.channels;
    multiply<Start::kResult, V, R>(b.d_y, 1, pitch, O, b.a, p.pitch, nullptr, C, count, d_weight, p.channels);
    for (int64_t o = 0; o < O; o += kLanes) {
      V sum = {};
      for (int64_t m = 0; m < count; ++m) sum += load(b.d_y + m * pitch + o);
      store(d_bias + o, load(d_bias + o) + sum);
    }
  }
  gradient_of<V>(s.activation, (const R*)b.pre, p.pitch, b.d_a, p.pitch, d_pre, C, count, C);
}

// A tile of NCHW likewise; `d_pre` is the whole gradient.
template <class T>
static void backward_tile_first(const BackwardCall<T>& call, Compute<T>* packed, T* __restrict__ d_pre,
                                Compute<T>* d_weight, Compute<T>* memory, const SeparableShape& s, int64_t tile) {
  using R = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  const Packed<R> p = packed_at<T>(packed, s);
  const TileBuffers<R> b = tile_buffers<T>(memory, s, false);
  const int64_t C = s.channels, O = s.outputs, pixels = s.out_height * s.out_width;
  R* const d_bias = d_weight + p.outputs * p.channels;
  const auto [sample, first, count] = depthwise_first(call.x, p, b.pre, b.unpacked, s, tiling_of(s), tile);
  activate_rows<V>(s.activation, b.pre, kPitch, b.a, kPitch, C, kPitch);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t k = 0; k < count; ++k) b.turned[k * p.channels + c] = b.a[c * kPitch + k];
  }
  const int64_t at = sample * O * pixels + first;
  WideRows<R> y = {b.y, kPitch};
  if (call.pre) {
    y = widened<V>(call.pre + at, pixels, b.y, kPitch, O, count);
  } else if (s.output_activation != Activation::kNone) {
    multiply<Start::kRowBias, V, R>(p.pointwise, C, 1, O, b.a, kPitch, p.pointwise_bias, count, C, b.y, kPitch);
  }
  const WideRows<R> d_y = widened<V>(call.d_output + at, pixels, b.d_y, kPitch, O, count);
  gradient_of<V>(s.output_activation, y.at, y.stride, d_y.at, d_y.stride, b.d_y, kPitch, O, count);
  multiply<Start::kRowBias, V, R>(p.pointwise, 1, C, C, b.d_y, kPitch, nullptr, count, O, b.d_a, kPitch);
  multiply<Start::kResult, V, R>(b.d_y, kPitch, 1, O, b.turned, p.channels, nullptr, C, count, d_weight, p.channels);
  for (int64_t o = 0; o < O; ++o) d_bias[o] += sum_of<T>(b.d_y + o * kPitch, count);
  gradient_of<V>(s.activation, (const R*)b.pre, kPitch, b.d_a, kPitch, d_pre + sample * C * pixels + first, pixels, C,
                 count);
}

// Groups [begin, end) of tiles; `sums` holds separable_conv2d_sums_size elements per group, zeros at first.
template <class T>
static void separable_conv2d_backward_groups(const BackwardCall<T>& call, Compute<T>* packed, T* d_pre,
                                             Compute<T>* sums, Compute<T>* memory, const SeparableShape& s,
                                             bool channels_last, int64_t begin, int64_t end) {
  const int64_t tiles = separable_conv2d_backward_tiles(s, channels_last), per_group = tiles_per_group(tiles);
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  for (int64_t group = begin; group < end; ++group) {
    Compute<T>* const d_weight = sums + group * separable_conv2d_sums_size<T>(s);
    for (int64_t tile = group * per_group; tile < smaller((group + 1) * per_group, tiles); ++tile) {
      if (channels_last) {
        const int64_t first = tile * kPixelsBackward, count = smaller(kPixelsBackward, pixels - first);
        backward_tile_last(call, packed, d_pre + first * s.channels, d_weight, memory, s, first, count);
      } else {
        backward_tile_first(call, packed, d_pre, d_weight, memory, s, tile);
      }
    }
  }
}

// Pixels [first, last) of channels_last; `d_pre` begins with the first one's. Sums as for one tile.
template <class T>
static void separable_conv2d_backward_pixels(const BackwardCall<T>& call, Compute<T>* packed, T* d_pre,
                                             Compute<T>* d_weight, Compute<T>* memory, const SeparableShape& s,
                                             int64_t first, int64_t last) {
  for (int64_t count; first < last; first += count, d_pre += count * s.channels) {
    count = smaller(kPixelsBackward, last - first);
    backward_tile_last(call, packed, d_pre, d_weight, memory, s, first, count);
  }
}

// to = the sums of `groups` rows of `count` elements that lie `size` apart, in their order.
template <class T>
static __attribute__((noinline)) void add_groups(const Compute<T>* __restrict__ sums, int64_t size, int64_t groups,
                                                 int64_t count, T* __restrict__ to) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = 0; first < count; first += kBlock) {
    double total[kBlock] = {};
    const int64_t block = smaller(kBlock, count - first);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t k = 0; k < block; ++k) total[k] += sums[g * size + first + k];
    }
    for (int64_t k = 0; k < block; ++k) to[first + k] = from_float<T>((Compute<T>)total[k]);
  }
}

// Adds up the groups' sums. d_weight [O, C] or d_bias [O] may be null.
template <class T>
static void separable_conv2d_reduce(const Compute<T>* __restrict__ sums, int64_t groups, T* __restrict__ d_weight,
                                    T* __restrict__ d_bias, const SeparableShape& s) {
  const auto p = packed_at<T>(nullptr, s);
  const int64_t size = separable_conv2d_sums_size<T>(s);
  for (int64_t o = 0; d_weight && o < s.outputs; ++o) {
    add_groups(sums + o * p.channels, size, groups, s.channels, d_weight + o * s.channels);
  }
  if (d_bias) add_groups(sums + p.outputs * p.channels, size, groups, s.outputs, d_bias);
}
