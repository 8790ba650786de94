// Convolution of unpacked rows and its sums, the innermost loops of depthwise_conv2d. Compiled once per instruction
// set.
//
// A row is `count` elements: pixels of interleaved channels, flattened, so vectors run over pixels and channels alike.
// The filter repeats with the channels; `period`, the smallest common multiple of the number of channels and the vector
// length, is the distance at which a vector meets the same filter values again. Going through a row in steps of the
// period keeps a 3 x 3 or 5 x 5 filter, or its 9 or 25 sums, in registers.

#include "common/activations.inl"

template <class T>
using Wide = evkernels::Compute<T>;

constexpr int64_t kLargestFilter = 31;
constexpr int64_t kChunk = 32;

template <class A>
struct RowFilter {
  int64_t rows, columns;           // of taps
  const A* row[kLargestFilter];    // unpacked input rows
  int64_t offset[kLargestFilter];  // of the column's tap from an output's position
  const A* weight;                 // [rows * columns][repeated]
  const A* bias;                   // [repeated] or null
  int64_t channels, repeated, period;
};

// to[j] = from[j]; they do not overlap. Here and below the end of a row is a vector that overlaps the one before.
template <class T, class A>
EVKERNELS_INLINE void widen(const T* from, A* to, int64_t count) {
  constexpr int kLanes = Arithmetic<T>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, load(from + j));
  if (j == count) return;
  if (count > kLanes) {
    store(to + count - kLanes, load(from + count - kLanes));
  } else {
    store_partial(to, load_partial(from, count), count);
  }
}

// The first `count` lanes of v, zeros behind.
EVKERNELS_INLINE VecF first_lanes(VecF v, int64_t count) {
  static const int32_t kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  VecI index;
  __builtin_memcpy(&index, kIndex, sizeof index);
  return select(index < (int32_t)count, v, VecF{});
}
EVKERNELS_INLINE double first_lanes(double v, int64_t) { return v; }

template <int kRows, int kColumns, class A>
EVKERNELS_INLINE typename Arithmetic<A>::Type convolve_at(const RowFilter<A>& f, int64_t j) {
  using V = typename Arithmetic<A>::Type;
  const int64_t channel = j % f.channels;
  V sum = f.bias ? load(f.bias + channel) : V{};
  const A* weight = f.weight + channel;
  for (int64_t r = 0; r < (kRows ? kRows : f.rows); ++r) {
    const A* const row = f.row[r] + j;
    for (int64_t c = 0; c < (kColumns ? kColumns : f.columns); ++c, weight += f.repeated) {
      sum += load(row + f.offset[c]) * load(weight);
    }
  }
  return sum;
}

// out[j] = bias + sum over taps of row[r][j + offset[c]] * weight; kRows = 0: sizes known at run time only.
template <int kRows, int kColumns, class A>
static void convolve_row(const RowFilter<A>& f, A* __restrict__ out, int64_t count) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  if constexpr (kRows == 0) {
    for (int64_t j = 0; j + kLanes <= count; j += kLanes) store(out + j, convolve_at<0, 0>(f, j));
  } else {
    const A* row[kRows];
    int64_t offset[kColumns];
    for (int r = 0; r < kRows; ++r) row[r] = f.row[r];
    for (int c = 0; c < kColumns; ++c) offset[c] = f.offset[c];
    // Chunks of kChunk periods: vectors a power of two apart share few sets of the L1 cache and would evict each other.
    const int64_t length = f.period == kLanes ? count : kChunk * f.period;
    const int64_t phases = (count < f.period ? count : f.period) / kLanes;
    for (int64_t chunk = 0; chunk < count; chunk += length)
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int64_t start = chunk + phase * kLanes, channel = phase * kLanes % f.channels;
        const int64_t end = chunk + length < count ? chunk + length : count;
        const V bias = f.bias ? load(f.bias + channel) : V{};
        V weight[kRows * kColumns];
#pragma GCC unroll 25
        for (int tap = 0; tap < kRows * kColumns; ++tap) weight[tap] = load(f.weight + tap * f.repeated + channel);
        for (int64_t j = start; j + kLanes <= end; j += f.period) {
          V sum = bias;
#pragma GCC unroll 5
          for (int r = 0; r < kRows; ++r) {
            const A* const at = row[r] + j;
#pragma GCC unroll 5
            for (int c = 0; c < kColumns; ++c) sum += load(at + offset[c]) * weight[r * kColumns + c];
          }
          store(out + j, sum);
        }
      }
  }
  if (count % kLanes == 0) return;
  if (count > kLanes) {
    store(out + count - kLanes, convolve_at<kRows, kColumns>(f, count - kLanes));
  } else {
    store_partial(out, convolve_at<kRows, kColumns>(f, 0), count);
  }
}

template <class A>
static void convolve(const RowFilter<A>& f, A* out, int64_t count) {
  switch (f.rows <= 5 && f.columns <= 5 ? 10 * f.rows + f.columns : 0) {
    case 33:
      return convolve_row<3, 3>(f, out, count);
    case 55:
      return convolve_row<5, 5>(f, out, count);
    case 11:
      return convolve_row<1, 1>(f, out, count);
    case 12:
      return convolve_row<1, 2>(f, out, count);
    case 21:
      return convolve_row<2, 1>(f, out, count);
    case 22:
      return convolve_row<2, 2>(f, out, count);
    case 23:
      return convolve_row<2, 3>(f, out, count);
    case 32:
      return convolve_row<3, 2>(f, out, count);
    default:
      return convolve_row<0, 0>(f, out, count);
  }
}

// sums[r * kColumns + c][j % period] += d[j] * row[r][j + offset[c]].
template <int kRows, int kColumns, class A>
static void add_products(const A* const* rows, const int64_t* offsets, const A* __restrict__ d, A* __restrict__ sums,
                         int64_t period, int64_t count) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  const A* row[kRows];
  int64_t offset[kColumns];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (int c = 0; c < kColumns; ++c) offset[c] = offsets[c];
  for (int64_t start = 0; start < period && start < count; start += kLanes) {
    // A row is summed on its own before it joins the rows above: rounding errors grow with the longer of the two.
    V sum[kRows * kColumns] = {};
    int64_t j = start;
    for (; j + kLanes <= count; j += period) {
      const V d_j = load(d + j);
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r) {
        const A* const at = row[r] + j;
#pragma GCC unroll 5
        for (int c = 0; c < kColumns; ++c) sum[r * kColumns + c] += d_j * load(at + offset[c]);
      }
    }
    if (j < count) {
      // Both factors are masked: what lies behind the row may be infinite.
      const V d_j = first_lanes(load(d + j), count - j);
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 5
        for (int c = 0; c < kColumns; ++c) {
          sum[r * kColumns + c] += d_j * first_lanes(load(row[r] + j + offset[c]), count - j);
        }
      }
    }
#pragma GCC unroll 25
    for (int tap = 0; tap < kRows * kColumns; ++tap) {
      A* const total = sums + tap * period + start;
      store(total, load(total) + sum[tap]);
    }
  }
}

// Adds one row's products to sums [rows * columns][period], and the row d itself to `sum_d` [period].
template <class A>
static void accumulate(const RowFilter<A>& f, const A* d, A* sums, A* sum_d, int64_t count) {
  constexpr int kLanes = Arithmetic<A>::kLanes;
  if (f.rows == 3) {
    add_products<3, 3>(f.row, f.offset, d, sums, f.period, count);
  } else if (f.rows == 5) {
    add_products<5, 5>(f.row, f.offset, d, sums, f.period, count);
  } else {
    for (int64_t r = 0; r < f.rows; ++r) {
      int64_t c = 0;
      A* const row_sums = sums + r * f.columns * f.period;
      for (; c + 4 <= f.columns; c += 4) {
        add_products<1, 4>(f.row + r, f.offset + c, d, row_sums + c * f.period, f.period, count);
      }
      for (; c < f.columns; ++c) {
        add_products<1, 1>(f.row + r, f.offset + c, d, row_sums + c * f.period, f.period, count);
      }
    }
  }
  for (int64_t start = 0; start < f.period && start < count; start += kLanes) {
    typename Arithmetic<A>::Type sum = {};
    int64_t j = start;
    for (; j + kLanes <= count; j += f.period) sum += load(d + j);
    if (j < count) sum += first_lanes(load(d + j), count - j);
    store(sum_d + start, load(sum_d + start) + sum);
  }
}

template <Activation kind, class T, class A>
static void activate_row(const A* pre, T* y, int64_t count) {
  constexpr int kLanes = Arithmetic<T>::kLanes;
  for (int64_t j = 0; j + kLanes <= count; j += kLanes) store(y + j, activate<kind>(load(pre + j)));
  if (count % kLanes == 0) return;
  if (count > kLanes) {
    store(y + count - kLanes, activate<kind>(load(pre + count - kLanes)));
  } else {
    store_partial(y, activate<kind>(load(pre)), count);
  }
}

// y = activation(pre), rounded; pre has room for a vector beyond its end and does not overlap y.
template <class T, class A>
static void activate_row(Activation kind, const A* pre, T* y, int64_t count) {
  switch (kind) {
    case Activation::kNone:
      return activate_row<Activation::kNone>(pre, y, count);
    case Activation::kRelu:
      return activate_row<Activation::kRelu>(pre, y, count);
    case Activation::kSilu:
      return activate_row<Activation::kSilu>(pre, y, count);
    case Activation::kGelu:
      return activate_row<Activation::kGelu>(pre, y, count);
  }
}

template <Activation kind, class A>
static void activation_gradient_row(const A* pre, A* d, int64_t count) {
  for (int64_t j = 0; j < count; j += Arithmetic<A>::kLanes) {
    store(d + j, activation_gradient<kind>(load(pre + j), load(d + j)));
  }
}

// d *= activation'(pre), in place; both have room for a vector beyond their end.
template <class A>
static void activation_gradient_row(Activation kind, const A* pre, A* d, int64_t count) {
  if (kind == Activation::kRelu) activation_gradient_row<Activation::kRelu>(pre, d, count);
  if (kind == Activation::kSilu) activation_gradient_row<Activation::kSilu>(pre, d, count);
  if (kind == Activation::kGelu) activation_gradient_row<Activation::kGelu>(pre, d, count);
}
