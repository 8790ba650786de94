// Blocks of timestamps, forward and backward. Compiled once per instruction set by common/foreach_isa.h.
//
// Vectors run over timestamps, so that sines, bases and layer norm need no horizontal step; only the gradients of the
// weights, sums over timestamps, take vectors of outputs.

#include "common/transpose.inl"
#include "learnable_time_embedding/features.inl"
#include "learnable_time_embedding/products.inl"

// Memory of a task: arguments [dim], features [rows], outputs [dim + padding].
template <class A>
struct TimeBlock {
  A *times, *arguments, *features, *y;
  static int64_t size(const TimeEmbeddingShape& s) { return kTimes * (1 + s.dim() + s.rows() + s.dim() + kPad); }
  TimeBlock(A* memory, const TimeEmbeddingShape& s)
      : times(memory),
        arguments(times + kTimes),
        features(arguments + s.dim() * kTimes),
        y(features + s.rows() * kTimes) {}
};

// `width` columns, rows of kTimes numbers, from the first `count` rows of `width` numbers; zeros for the other times.
// Squares are transposed in registers: element by element this took a fifth of the time of either direction.
template <class T, class A>
static void columns_of(const T* rows, int64_t count, int64_t width, A* columns) {
  constexpr int L = Arithmetic<T>::kLanes;
  for (int64_t n = 0; n < kTimes; n += L) {
    for (int64_t o = 0; o < width; o += L) {
      typename Arithmetic<T>::Type square[L];
      for (int64_t k = 0; k < L; ++k) {
        const T* const from = rows + (n + k) * width + o;
        square[k] = n + k >= count   ? typename Arithmetic<T>::Type{}
                    : o + L <= width ? load(from)
                                     : load_partial(from, width - o);
      }
      transpose(square);
      for (int64_t k = 0; k < L && o + k < width; ++k) store(columns + (o + k) * kTimes + n, square[k]);
    }
  }
}

// The way back: the first `count` rows, `stride` numbers apart. Reads whole vectors of columns.
template <class T, class A>
static void rows_of(const A* columns, int64_t count, int64_t width, int64_t stride, T* rows) {
  constexpr int L = Arithmetic<T>::kLanes;
  for (int64_t n = 0; n < count; n += L) {
    for (int64_t o = 0; o < width; o += L) {
      typename Arithmetic<T>::Type square[L];
      for (int64_t k = 0; k < L; ++k) square[k] = load(columns + (o + k) * kTimes + n);
      transpose(square);
      for (int64_t k = 0; k < L && n + k < count; ++k) {
        T* const to = rows + (n + k) * stride + o;
        if (o + L <= width) {
          store(to, square[k]);
        } else {
          store_partial(to, square[k], width - o);
        }
      }
    }
  }
}

// The features and the sum of both parts' mixing products, before the norm, of `count` timestamps from t on. Times
// beyond them are 0.
template <class T, class A>
static void embed_block(const T* t, int64_t count, const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s,
                        const TimeBlock<A>& block) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  for (int64_t n = 0; n < kTimes; ++n) block.times[n] = n < count ? to_float(t[n]) : A(0);
  for (int64_t i = 0; i < s.dim(); ++i) {
    if (i < s.fourier) {
      A* const rows = block.features + 2 * s.harmonics * i * kTimes;
      sines(block.times, p.rate[i], p.shift[i], rows, rows + kTimes);
      harmonics(rows, s.harmonics);
    } else {
      A* const argument = block.arguments + i * kTimes;
      for (int64_t n = 0; n < kTimes; n += L)
        store(argument + n, multiply_add(load(block.times + n), V{} + p.rate[i], V{} + p.shift[i]));
      A* const rows = block.features + (s.fourier_rows() + (s.bases + 1) * (i - s.fourier)) * kTimes;
      spline_features(argument, rows, s.bases);
    }
  }
  mix(block.features, 2 * s.harmonics * s.fourier, p.weight, p.bias, s.fourier, block.y);
  mix<A>(block.features + s.fourier_rows() * kTimes, (s.bases + 1) * s.spline, p.weight + s.fourier_weights(), nullptr,
         s.spline, block.y + s.fourier * kTimes);
}

EVKERNELS_INLINE VecF square_root(VecF x) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  return (VecF)_mm512_maskz_sqrt_ps((__mmask16)0xffff, (__m512)x);
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
  return (VecF)_mm256_sqrt_ps((__m256)x);
#else
  for (int k = 0; k < EVKERNELS_LANES; ++k) x[k] = __builtin_sqrtf(x[k]);
  return x;
#endif
}
EVKERNELS_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Normalises the rows of y in place, column by column; writes 1 / deviation of each column unless `inverse` is null.
template <class A>
static void normalise(A* y, int64_t dim, A eps, A* inverse) {
  using V = typename Arithmetic<A>::Type;
  for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
    V sum = {}, squares = {};
    for (int64_t o = 0; o < dim; ++o) sum = sum + load(y + o * kTimes + n);
    const V mean = sum * (A(1) / dim);
    for (int64_t o = 0; o < dim; ++o) {
      const V centred = load(y + o * kTimes + n) - mean;
      squares = multiply_add(centred, centred, squares);
    }
    const V factor = A(1) / square_root(squares * (A(1) / dim) + eps);
    for (int64_t o = 0; o < dim; ++o) store(y + o * kTimes + n, (load(y + o * kTimes + n) - mean) * factor);
    if (inverse) store(inverse + n, factor);
  }
}

// Timestamps begin to end - 1, `begin` at the start of a block.
template <class T, class A>
static void time_embedding_forward(const T* t, T* embedding, const TimeEmbeddingParameters<A>& p,
                                   const TimeEmbeddingShape& s, int64_t begin, int64_t end, A* memory) {
  using V = typename Arithmetic<A>::Type;
  const TimeBlock<A> block(memory, s);
  const int64_t dim = s.dim();
  for (; begin < end; begin += kTimes) {
    const int64_t count = end - begin < kTimes ? end - begin : kTimes;
    embed_block(t + begin, count, p, s, block);
    if (p.norm_weight) normalise<A>(block.y, dim, s.eps, nullptr);
    for (int64_t o = 0; o < dim; ++o) {
      for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
        V y = load(block.y + o * kTimes + n);
        if (p.norm_weight) y = multiply_add(y, V{} + p.norm_weight[o], V{} + p.norm_bias[o]);
        if (p.scale) y = y * p.scale[o];
        store(block.y + o * kTimes + n, y);
      }
    }
    rows_of(block.y, count, dim, dim, embedding + begin * dim);
  }
}

// Memory of a backward task beyond TimeBlock: gradients of outputs, of features and of arguments, gradients of outputs
// by timestamp, 1 / deviation, sums by lane.
template <class A>
struct TimeBlockGradients {
  A *d_y, *d_features, *d_argument, *by_time, *inverse, *lane_sums;
  static int64_t size(const TimeEmbeddingShape& s) {
    return kTimes * (s.dim() + kPad + s.rows() + 1 + s.dim() + 2 * kPad + 1 + 6 * s.dim());
  }
  TimeBlockGradients(A* memory, const TimeEmbeddingShape& s)
      : d_y(memory),
        d_features(d_y + (s.dim() + kPad) * kTimes),
        d_argument(d_features + s.rows() * kTimes),
        by_time(d_argument + kTimes),
        inverse(by_time + (s.dim() + 2 * kPad) * kTimes),
        lane_sums(inverse + kTimes) {}
};

template <class V, class A>
EVKERNELS_INLINE void add_to(A* to, V value) {
  store(to, load(to) + value);
}

// From the gradients of the outputs to those of the mixing products, in place, through scale and norm.
template <class A>
static void norm_backward(const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s, A* y,
                          const TimeBlockGradients<A>& g) {
  using V = typename Arithmetic<A>::Type;
  const int64_t dim = s.dim(), sum_size = dim * kTimes;
  if (p.norm_weight) normalise<A>(y, dim, s.eps, g.inverse);
  for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
    V sum = {}, product = {};
    for (int64_t o = 0; o < dim; ++o) {
      const int64_t at = o * kTimes + n;
      V d = load(g.d_y + at);
      const V normed = load(y + at);
      A* const sums = g.lane_sums + at;
      if (p.scale) {
        const V before = p.norm_weight ? multiply_add(normed, V{} + p.norm_weight[o], V{} + p.norm_bias[o]) : normed;
        add_to(sums + kScaleSum * sum_size, d * before);
        d = d * p.scale[o];
      }
      if (p.norm_weight) {
        add_to(sums + kNormWeightSum * sum_size, d * normed);
        add_to(sums + kNormBiasSum * sum_size, d);
        d = d * p.norm_weight[o];
        sum = sum + d;
        product = multiply_add(d, normed, product);
      }
      store(g.d_y + at, d);
    }
    if (!p.norm_weight) continue;
    const V mean = sum * (A(1) / dim), slope = product * (A(1) / dim), inverse = load(g.inverse + n);
    for (int64_t o = 0; o < dim; ++o) {
      const int64_t at = o * kTimes + n;
      store(g.d_y + at, (load(g.d_y + at) - mean - load(y + at) * slope) * inverse);
    }
  }
}

// Gradients of one chunk of timestamps, `begin` at the start of a block: d_t, and the chunk's part of all sums.
template <class T, class A>
static void time_embedding_backward(const T* t, const T* d_embedding, T* d_t, A* sums,
                                    const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s, int64_t begin,
                                    int64_t end, A* memory) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const TimeBlock<A> block(memory, s);
  const TimeBlockGradients<A> g(memory + TimeBlock<A>::size(s), s);
  const int64_t dim = s.dim(), sum_size = dim * kTimes, widths[2] = {padded(s.fourier), padded(s.spline)};
  for (int64_t k = 0; k < 6 * sum_size; ++k) g.lane_sums[k] = 0;
  for (int64_t k = 0; k < s.weights(); ++k) sums[k] = 0;
  for (; begin < end; begin += kTimes) {
    const int64_t count = end - begin < kTimes ? end - begin : kTimes;
    embed_block(t + begin, count, p, s, block);
    columns_of(d_embedding + begin * dim, count, dim, g.d_y);
    norm_backward(p, s, block.y, g);

    A* const by_time[2] = {g.by_time, g.by_time + widths[0] * kTimes};
    rows_of(g.d_y, kTimes, s.fourier, widths[0], by_time[0]);
    rows_of(g.d_y + s.fourier * kTimes, kTimes, s.spline, widths[1], by_time[1]);
    const A* const weight[2] = {p.weight, p.weight + s.fourier_weights()};
    A* const features[2] = {block.features, block.features + s.fourier_rows() * kTimes};
    A* const d_features[2] = {g.d_features, g.d_features + s.fourier_rows() * kTimes};
    A* const d_weight[2] = {sums, sums + s.fourier_weights()};
    for (int part = 0; part < 2; ++part) {
      const int64_t outputs = part ? s.spline : s.fourier, rows = part ? s.spline_rows() : s.fourier_rows();
      mix_backward(g.d_y + (part ? s.fourier * kTimes : 0), outputs, weight[part], rows, d_features[part]);
      add_weight_gradient(features[part], rows, by_time[part], outputs, d_weight[part]);
    }

    V d_times[kTimes / L];
    for (int64_t k = 0; k < kTimes / L; ++k) d_times[k] = V{};
    for (int64_t i = 0; i < dim; ++i) {
      const int64_t row =
          (i < s.fourier ? 2 * s.harmonics * i : s.fourier_rows() + (s.bases + 1) * (i - s.fourier)) * kTimes;
      if (i < s.fourier) {
        harmonics_backward(block.features + row, g.d_features + row, g.d_argument, s.harmonics);
      } else {
        spline_backward(block.arguments + i * kTimes, block.features + row, g.d_features + row, g.d_argument, s.bases);
      }
      for (int64_t k = 0; k < kTimes / L; ++k) {
        const V d = load(g.d_argument + k * L);
        A* const lane_sums = g.lane_sums + i * kTimes + k * L;
        add_to(lane_sums + kRateSum * sum_size, d * load(block.times + k * L));
        add_to(lane_sums + kShiftSum * sum_size, d);
        add_to(lane_sums + kBiasSum * sum_size, load(g.d_y + i * kTimes + k * L));
        d_times[k] = multiply_add(d, V{} + p.rate[i], d_times[k]);
      }
    }
    for (int64_t k = 0; k < kTimes / L; ++k) store(g.d_argument + k * L, d_times[k]);
    for (int64_t n = 0; n < count; ++n) d_t[begin + n] = from_float<T>(g.d_argument[n]);
  }
  for (int64_t k = 0; k < 6 * dim; ++k) {
    double sum = 0;
    for (int64_t n = 0; n < kTimes; ++n) sum += g.lane_sums[k * kTimes + n];
    sums[s.weights() + k] = sum;
  }
}

template <class A>
static int64_t time_embedding_memory(const TimeEmbeddingShape& s, bool backward) {
  return TimeBlock<A>::size(s) + (backward ? TimeBlockGradients<A>::size(s) : 0);
}
