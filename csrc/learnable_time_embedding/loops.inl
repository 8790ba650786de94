// Blocks of timestamps, forward and backward. Compiled once per instruction set by common/foreach_isa.h.
//
// Vectors run over timestamps, so that sines, bases and layer norm need no horizontal step; only the gradients of the
// weights, sums over timestamps, take vectors of outputs.

#include "common/gate_math.inl"
#include "learnable_time_embedding/columns.inl"
#include "learnable_time_embedding/features.inl"
#include "learnable_time_embedding/products.inl"

// Memory of a task: arguments [dim], features [rows], outputs and what rounding took from them [dim + padding].
template <class A>
struct TimeBlock {
  A *times, *arguments, *features, *y, *lost;
  static int64_t size(const TimeEmbeddingShape& s) { return kTimes * (1 + s.dim() + s.rows() + 2 * (s.dim() + kPad)); }
  TimeBlock(A* memory, const TimeEmbeddingShape& s)
      : times(memory),
        arguments(times + kTimes),
        features(arguments + s.dim() * kTimes),
        y(features + s.rows() * kTimes),
        lost(y + (s.dim() + kPad) * kTimes) {}
};

// One of the two parts: `count` features from the `first` of all on, each of `per_feature` rows.
template <class A>
struct Part {
  bool is_spline;
  int64_t first, count, per_feature;
  const A* weight;  // [row][padded(count)]
  A* features;
  int32_t* lists;  // of rows, one for each run of features, `room` apart
  int32_t* ends;   // for each feature, the end of its rows in the list of its run

  int64_t room() const { return blocks_of(kRun * per_feature, kRows) * kRows; }
  int32_t* list(int64_t feature) const { return lists + feature / kRun * room(); }
};

template <class A>
struct Parts {
  Part<A> part[2];
  Parts(const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s, A* features, int32_t* lists) {
    const int64_t f = s.fourier;
    part[0] = {false, 0, f, 2 * s.harmonics, p.weight, features, lists + s.dim(), lists};
    A* const spline = features + s.fourier_rows() * kTimes;
    part[1] = {true, f, s.spline, s.bases + 1, p.weight + s.fourier_weights(), spline, nullptr, lists + f};
    part[1].lists = part[0].lists + blocks_of(f, kRun) * part[0].room();
  }
};

// The features of a run from `first` on, of its part, and the list of their rows, filled up to whole tiles; returns its
// length.
template <class A>
static int64_t features_of_run(const Part<A>& part, int64_t first, const TimeEmbeddingParameters<A>& p,
                               const TimeEmbeddingShape& s, const TimeBlock<A>& block) {
  using V = typename Arithmetic<A>::Type;
  int32_t *const list = part.list(first), *end = list;
  for (int64_t i = first; i < first + kRun && i < part.count; ++i) {
    const A rate = p.rate[part.first + i], shift = p.shift[part.first + i];
    const int64_t row = i * part.per_feature;
    A* const rows = part.features + row * kTimes;
    if (part.is_spline) {
      A* const argument = block.arguments + (part.first + i) * kTimes;
      for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes)
        store(argument + n, multiply_add(load(block.times + n), V{} + rate, V{} + shift));
      end = spline_features(argument, rows, s.bases, row, end);
    } else {
      sines(block.times, rate, shift, rows, rows + kTimes);
      harmonics(rows, s.harmonics);
      for (int64_t m = 0; m < part.per_feature; ++m) *end++ = (int32_t)(row + m);
    }
    part.ends[i] = (int32_t)(end - list);
  }
  const int64_t count = end - list;
  while ((end - list) % kRows) *end++ = (int32_t)(part.count * part.per_feature);
  return count;
}

// The features and the sum of both parts' mixing products, before the norm, of `count` timestamps from t on. Times
// beyond them are 0.
template <class T, class A>
static void embed_block(const T* t, int64_t count, const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s,
                        const TimeBlock<A>& block, const Parts<A>& parts) {
  using V = typename Arithmetic<A>::Type;
  for (int64_t n = 0; n < kTimes; ++n) block.times[n] = n < count ? to_float(t[n]) : A(0);
  for (int64_t o = 0; o < s.dim() + kPad; ++o) {
    const V start = V{} + (o < s.fourier ? p.bias[o] : A(0));
    for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
      store(block.y + o * kTimes + n, start);
      store(block.lost + o * kTimes + n, V{});
    }
  }
  for (const Part<A>& part : parts.part) {
    const int64_t y = part.first * kTimes;
    for (int64_t i = 0; i < part.count; i += kRun) {
      const int64_t rows = features_of_run(part, i, p, s, block);
      add_products(part.features, part.list(i), rows, part.weight, part.count, block.y + y, block.lost + y);
    }
    // What the Fourier part's padding wrote where the splines' outputs begin.
    if (part.is_spline) continue;
    for (int64_t k = s.fourier * kTimes; k < (s.fourier + kPad) * kTimes; ++k) block.y[k] = block.lost[k] = 0;
  }
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
                                   const TimeEmbeddingShape& s, int64_t begin, int64_t end, A* memory, int32_t* lists) {
  using V = typename Arithmetic<A>::Type;
  const TimeBlock<A> block(memory, s);
  const Parts<A> parts(p, s, block.features, lists);
  const int64_t dim = s.dim();
  for (; begin < end; begin += kTimes) {
    const int64_t count = end - begin < kTimes ? end - begin : kTimes;
    embed_block(t + begin, count, p, s, block, parts);
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

// Memory of a backward task beyond TimeBlock: gradients of outputs, of a run's rows and of an argument, gradients of
// outputs by timestamp, 1 / deviation, sums by lane.
template <class A>
struct TimeBlockGradients {
  A *d_y, *d_rows, *d_argument, *by_time, *inverse, *lane_sums;
  static int64_t most_rows(const TimeEmbeddingShape& s) {
    const int64_t fourier = 2 * s.harmonics, spline = s.bases + 1;
    return kRun * (fourier > spline ? fourier : spline) + kRows;
  }
  static int64_t size(const TimeEmbeddingShape& s) {
    return kTimes * (s.dim() + kPad + most_rows(s) + 1 + s.dim() + 2 * kPad + 1 + 6 * s.dim());
  }
  TimeBlockGradients(A* memory, const TimeEmbeddingShape& s)
      : d_y(memory),
        d_rows(d_y + (s.dim() + kPad) * kTimes),
        d_argument(d_rows + most_rows(s) * kTimes),
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

// The gradients of a part's parameters but its bias, added to the sums, and of the times, added to d_times, from those
// of its outputs.
template <class A>
static void part_backward(const Part<A>& part, const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s,
                          const TimeBlock<A>& block, const TimeBlockGradients<A>& g, const A* by_time, A* d_weight,
                          typename Arithmetic<A>::Type* d_times) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const int64_t sum_size = s.dim() * kTimes;
  for (int64_t i = 0; i < part.count; ++i) {
    const int32_t* const list = part.list(i);
    if (i % kRun == 0) {
      const int64_t rows = part.ends[i + kRun <= part.count ? i + kRun - 1 : part.count - 1];
      row_gradients(g.d_y + part.first * kTimes, part.count, part.weight, list, rows, g.d_rows);
      add_weight_gradients(part.features, list, rows, by_time, part.count, d_weight);
    }
    const int64_t begin = i % kRun ? part.ends[i - 1] : 0;
    const A *const rows = part.features + list[begin] * kTimes, *const d_rows = g.d_rows + begin * kTimes;
    const int64_t feature = part.first + i;
    if (part.is_spline) {
      spline_backward(block.arguments + feature * kTimes, rows, list + begin, part.ends[i] - begin, d_rows,
                      g.d_argument, s.bases);
    } else {
      harmonics_backward(rows, d_rows, g.d_argument, s.harmonics);
    }
    for (int64_t k = 0; k < kTimes / L; ++k) {
      const V d = load(g.d_argument + k * L);
      A* const lane_sums = g.lane_sums + feature * kTimes + k * L;
      add_to(lane_sums + kRateSum * sum_size, d * load(block.times + k * L));
      add_to(lane_sums + kShiftSum * sum_size, d);
      add_to(lane_sums + kBiasSum * sum_size, load(g.d_y + feature * kTimes + k * L));
      d_times[k] = multiply_add(d, V{} + p.rate[feature], d_times[k]);
    }
  }
}

// Gradients of one chunk of timestamps, `begin` at the start of a block: d_t, and the chunk's part of all sums.
template <class T, class A>
static void time_embedding_backward(const T* t, const T* d_embedding, T* d_t, A* sums,
                                    const TimeEmbeddingParameters<A>& p, const TimeEmbeddingShape& s, int64_t begin,
                                    int64_t end, A* memory, int32_t* lists) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const TimeBlock<A> block(memory, s);
  const TimeBlockGradients<A> g(memory + TimeBlock<A>::size(s), s);
  const Parts<A> parts(p, s, block.features, lists);
  const int64_t dim = s.dim();
  for (int64_t k = 0; k < 6 * dim * kTimes; ++k) g.lane_sums[k] = 0;
  for (int64_t k = 0; k < s.weights(); ++k) sums[k] = 0;
  for (; begin < end; begin += kTimes) {
    const int64_t count = end - begin < kTimes ? end - begin : kTimes;
    embed_block(t + begin, count, p, s, block, parts);
    columns_of(d_embedding + begin * dim, count, dim, g.d_y);
    norm_backward(p, s, block.y, g);

    V d_times[kTimes / L] = {};
    A *by_time = g.by_time, *d_weight = sums;
    for (const Part<A>& part : parts.part) {
      const int64_t width = padded(part.count);
      rows_of(g.d_y + part.first * kTimes, kTimes, part.count, width, by_time);
      part_backward(part, p, s, block, g, by_time, d_weight, d_times);
      by_time += width * kTimes;
      d_weight += s.fourier_weights();
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
