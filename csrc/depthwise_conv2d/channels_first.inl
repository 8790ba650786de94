// Loops of depthwise_conv2d over contiguous planes: vectors lie along a row. Compiled once per instruction set.
//
// kBlock output rows are formed together, so that a vector of an input row, loaded at each of the filter's columns,
// serves all of them: unaligned loads, not multiplications, are what a single row would wait for. At stride 2 two
// vectors are split into even and odd columns. At the borders loads are masked and rows outside are left out. The rows
// of a dilated filter, which has stride 1, lie as far apart as it is dilated: then these too share their input rows.
// Rows unpacked with zeros around them, which need no masks, took 1.7 times as long (3 x 3, 64 x 65 x 87). On a Zen 3
// with AVX2, borders read lane by lane took 1.3 to 2.2 times as long in all (stride 1, 80 to 33 columns), and even and
// odd columns brought into order at each load instead of once per vector of outputs 1.2 to 1.5 times (stride 2).

// The lanes inside the image of the vectors that load_tap loads for each of the filter's columns, where those from
// `begin` to `end` are inside for the first one, and no more than `limit`.
template <int kStride, class T>
EVKERNELS_INLINE void find_lanes(int64_t begin, int64_t end, int64_t limit, int64_t columns, int64_t dilation,
                                 Lanes<T>* lanes) {
#pragma GCC unroll 5
  for (int64_t c = 0; c < columns; c += kStride) {
    const int64_t first = begin - c * dilation, last = smaller(end - c * dilation, limit);
    lanes[c] = Lanes<T>(first, last);
    if (kStride == 2) lanes[c + 1] = Lanes<T>(first - Arithmetic<T>::kLanes, last - Arithmetic<T>::kLanes);
  }
}

// at[stride * lane + dilation * c]; kEdge: where that is inside. At stride 2 lanes are in order after in_order.
template <int kStride, bool kEdge, class T>
EVKERNELS_INLINE typename Arithmetic<T>::Type load_tap(const T* at, int64_t c, int64_t dilation,
                                                       const Lanes<T>* lanes) {
  // Odd columns are loaded as those beside the even ones, which the compiler then finds loaded.
  const int64_t first = kStride == 1 ? c : c & ~(int64_t)1;
  typename Arithmetic<T>::Type low, high;
  if constexpr (kEdge) {
    low = load_lanes(at + first * dilation, lanes[first]);
    if constexpr (kStride == 2) high = load_lanes(at + first + Arithmetic<T>::kLanes, lanes[first + 1]);
  } else {
    low = load(at + first * dilation);
    if constexpr (kStride == 2) high = load(at + first + Arithmetic<T>::kLanes);
  }
  if constexpr (kStride == 1) return in_register(low);
  if constexpr (kStride == 2) return in_register(c == first ? even_lanes(low, high) : odd_lanes(low, high));
}

// Is every column that the vector of outputs at j reads inside the row?
template <int kStride, int kLanes, class T>
EVKERNELS_INLINE bool is_inside(const Plane<T>& p, int64_t j) {
  const int64_t left = j * kStride - p.padding;
  return left >= 0 && left + p.span() - 1 + kStride * kLanes <= p.width && j + kLanes <= p.out_width;
}

// What one input row adds to a vector in each of the output rows, at one column of the filter. kSize = 0: the filter's
// size is known at run time only, its values are read where they are needed.
template <int kSize, int kStride, bool kEdge, class T, class V>
EVKERNELS_INLINE void convolve_tap(const Plane<T>& p, const T* at, const Lanes<T>* lanes, int64_t i, int64_t c,
                                   const V* weight, V* sum) {
  const int64_t k = kSize ? kSize : p.k;
  const V x = load_tap<kStride, kEdge>(at, c, kSize ? 1 : p.dilation, lanes);
#pragma GCC unroll 4
  for (int o = 0; o < kBlock; ++o) {
    const int64_t r = i - o * kStride;
    if (r >= 0 && r < k) sum[o] += x * (kSize ? weight[r * k + c] : p.filter[r * k + c] - V{});
  }
}

template <int kSize, int kStride, bool kEdge, class T, class V>
EVKERNELS_INLINE void convolve_vector(const Plane<T>& p, const T* const* row, int64_t left, const V* weight, V* sum) {
  Lanes<T> lanes[kSize ? kSize + 1 : kLargestFilter + 1];
  if (kEdge) {
    const int64_t end = p.width - left;
    find_lanes<kStride>(-left, end, end, kSize ? kSize : p.k, kSize ? 1 : p.dilation, lanes);
  }
  if constexpr (kSize == 0) {
    for (int64_t i = 0; i < (kBlock - 1) * kStride + p.k; ++i) {
      if (!row[i]) continue;
      for (int64_t c = 0; c < p.k; ++c) {
        convolve_tap<kSize, kStride, kEdge>(p, row[i] + left, lanes, i, c, weight, sum);
      }
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < (kBlock - 1) * kStride + kSize; ++i) {
      if (!row[i]) continue;
#pragma GCC unroll 5
      for (int c = 0; c < kSize; ++c) {
        convolve_tap<kSize, kStride, kEdge>(p, row[i] + left, lanes, i, c, weight, sum);
      }
    }
  }
}

template <int kStride, class V>
EVKERNELS_INLINE void put_in_order(V* sum) {
  if (kStride == 1) return;
#pragma GCC unroll 4
  for (int o = 0; o < kBlock; ++o) sum[o] = in_order(sum[o]);
}

// Output rows [first, last); `out` is where the first one goes.
template <int kSize, int kStride, class T>
static void convolve_contiguous(const Plane<T>& p, T* out, int64_t first, int64_t last) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const V bias = (p.bias ? *p.bias : T{}) - V{};
  V weight[kSize ? kSize * kSize : 1];
#pragma GCC unroll 25
  for (int tap = 0; tap < kSize * kSize; ++tap) weight[tap] = in_register(p.filter[tap] - V{});
  const int64_t apart = kSize ? 1 : p.dilation, pitch = apart * p.out_width, next = (kBlock - 1) * apart + 1;
  for (int64_t block = first; block < last; block += (block - first) % (kBlock * apart) < apart - 1 ? 1 : next) {
    T* const to = out + (block - first) * p.out_width;
    const int rows = (int)smaller(kBlock, (last - block + apart - 1) / apart);
    const T* row[(kBlock - 1) * kStride + (kSize ? kSize : kLargestFilter)];
    for (int64_t i = 0; i < (kBlock - 1) * kStride + p.k; ++i) {
      const int64_t y = block * kStride - p.padding + i * apart;
      row[i] = i < (rows - 1) * kStride + p.k && y >= 0 && y < p.height ? p.x + y * p.width : nullptr;
    }
    for (int64_t j = 0; j < p.out_width; j += kLanes) {
      const int64_t left = j * kStride - p.padding;
      V sum[kBlock] = {bias, bias, bias, bias};
      if (is_inside<kStride, kLanes>(p, j)) {
        convolve_vector<kSize, kStride, false>(p, row, left, weight, sum);
        put_in_order<kStride>(sum);
#pragma GCC unroll 4
        for (int o = 0; o < kBlock; ++o) {
          if (o < rows) store(to + o * pitch + j, sum[o]);
        }
      } else {
        convolve_vector<kSize, kStride, true>(p, row, left, weight, sum);
        put_in_order<kStride>(sum);
#pragma GCC unroll 4
        for (int o = 0; o < kBlock; ++o) {
          if (o < rows) store_lanes(to + o * pitch + j, sum[o], Lanes<T>(0, p.out_width - j));
        }
      }
    }
  }
}

// The gradient of the input at stride 2: rows [first, last) of `out`, from p.x, the gradient at the output. In
// coordinates that count the padding, input pixel (2 y + a, 2 x + b) meets output pixel (y - t, x - h) at tap
// (2 t + a, 2 h + b): each vector of the gradient serves the four (a, b), whose sums lie interleaved.
template <int kSize, bool kEdge, class T, class V>
EVKERNELS_INLINE void transposed_taps(const Plane<T>& p, const T* at, const Lanes<T>* lanes, int64_t t, int64_t h,
                                      const V* weight, V (*sum)[2]) {
  const int64_t k = kSize ? kSize : p.k;
  V d;
  if constexpr (kEdge) d = load_lanes(at - h, lanes[h]);
  if constexpr (!kEdge) d = load(at - h);
  d = in_register(d);
#pragma GCC unroll 2
  for (int a = 0; a < 2; ++a) {
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      const int64_t r = 2 * t + a, c = 2 * h + b;
      if (r < k && c < k) sum[a][b] += d * (kSize ? weight[r * k + c] : p.filter[r * k + c] - V{});
    }
  }
}
template <int kSize, bool kEdge, class T, class V>
EVKERNELS_INLINE void transposed_vector(const Plane<T>& p, const T* const* row, int64_t x, const V* weight,
                                        V (*sum)[2]) {
  Lanes<T> lanes[(kLargestFilter + 1) / 2];
  if (kEdge) {
#pragma GCC unroll 3
    for (int64_t h = 0; h < ((kSize ? kSize : p.k) + 1) / 2; ++h) lanes[h] = Lanes<T>(h - x, p.width - x + h);
  }
  if constexpr (kSize == 0) {
    for (int64_t t = 0; t < (p.k + 1) / 2; ++t) {
      if (!row[t]) continue;
      for (int64_t h = 0; h < (p.k + 1) / 2; ++h)
        transposed_taps<kSize, kEdge>(p, row[t] + x, lanes, t, h, weight, sum);
    }
  } else {
#pragma GCC unroll 3
    for (int t = 0; t < (kSize + 1) / 2; ++t) {
      if (!row[t]) continue;
#pragma GCC unroll 3
      for (int h = 0; h < (kSize + 1) / 2; ++h) transposed_taps<kSize, kEdge>(p, row[t] + x, lanes, t, h, weight, sum);
    }
  }
}
template <int kSize, class T>
static void transposed_contiguous(const Plane<T>& p, T* out, int64_t first, int64_t last) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t reach = (p.k + 1) / 2;
  V weight[kSize ? kSize * kSize : 1];
#pragma GCC unroll 25
  for (int tap = 0; tap < kSize * kSize; ++tap) weight[tap] = in_register(p.filter[tap] - V{});
  for (int64_t y = (first + p.padding) / 2; 2 * y < last + p.padding; ++y) {
    const T* row[(kLargestFilter + 1) / 2];
    for (int64_t t = 0; t < reach; ++t) row[t] = y - t >= 0 && y - t < p.height ? p.x + (y - t) * p.width : nullptr;
    for (int64_t x = p.padding / 2; 2 * x < p.out_width + p.padding; x += kLanes) {
      const int64_t to = 2 * x - p.padding;
      const bool inside = x >= reach - 1 && x + kLanes <= p.width && to >= 0 && to + 2 * kLanes <= p.out_width;
      V sum[2][2] = {};
      if (inside) {
        transposed_vector<kSize, false>(p, row, x, weight, sum);
      } else {
        transposed_vector<kSize, true>(p, row, x, weight, sum);
      }
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a) {
        const int64_t out_row = 2 * y + a - p.padding;
        if (out_row < first || out_row >= last) continue;
        T* const at = out + (out_row - first) * p.out_width + to;
        const V low = interleaved_low(sum[a][0], sum[a][1]), high = interleaved_high(sum[a][0], sum[a][1]);
        if (inside) {
          store(at, low);
          store(at + kLanes, high);
        } else {
          store_lanes(at, low, Lanes<T>(-to, p.out_width - to));
          store_lanes(at + kLanes, high, Lanes<T>(-to - kLanes, p.out_width - to - kLanes));
        }
      }
    }
  }
}

// The gradient of the weights: products of kRows output rows of the gradient d with the input at the filter's rows
// and columns from `top` and `left_tap` on, added to sums [kTaps * kTaps][lanes] at a distance of `pitch`.
template <int kTaps, int kStride, int kRows, bool kEdge, class T, class V>
EVKERNELS_INLINE void multiply_vector(const Plane<T>& p, const T* const* row, const T* d, int64_t j, int64_t left,
                                      V* sum, V* sum_d) {
  Lanes<T> lanes[kTaps + 1], rest;
  if (kEdge) {
    // Both factors are masked: what lies behind the outputs may be infinite.
    rest = Lanes<T>(0, p.out_width - j);
    find_lanes<kStride>(-left, p.width - left, kStride * (p.out_width - j), kTaps, 1, lanes);
  }
  V gradient[kRows];
#pragma GCC unroll 4
  for (int o = 0; o < kRows; ++o) {
    if constexpr (kEdge) gradient[o] = load_lanes(d + o * p.out_width + j, rest);
    if constexpr (!kEdge) gradient[o] = load(d + o * p.out_width + j);
    if (kStride == 2) gradient[o] = in_order(gradient[o]);
    *sum_d += gradient[o];
  }
#pragma GCC unroll 16
  for (int i = 0; i < (kRows - 1) * kStride + kTaps; ++i) {
    if (!row[i]) continue;
#pragma GCC unroll 5
    for (int c = 0; c < kTaps; ++c) {
      const V x = load_tap<kStride, kEdge>(row[i] + left, c, 1, lanes);
#pragma GCC unroll 4
      for (int o = 0; o < kRows; ++o) {
        const int r = i - o * kStride;
        if (r >= 0 && r < kTaps) sum[r * kTaps + c] += gradient[o] * x;
      }
    }
  }
}

template <int kTaps, int kStride, int kRows, class T>
EVKERNELS_INLINE void multiply_rows(const Plane<T>& p, const T* d, int64_t first, int64_t top, int64_t left_tap,
                                    T* sums, T* sum_d) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes, kInputs = (kRows - 1) * kStride + kTaps;
  const T* row[kInputs];
  for (int i = 0; i < kInputs; ++i) {
    const int64_t y = first * kStride - p.padding + top + i;
    row[i] = y >= 0 && y < p.height ? p.x + y * p.width : nullptr;
  }
  V sum[kTaps * kTaps] = {}, total_d = {};
  for (int64_t j = 0; j < p.out_width; j += kLanes) {
    const int64_t left = j * kStride - p.padding + left_tap;
    if (is_inside<kStride, kLanes>(p, j)) {
      multiply_vector<kTaps, kStride, kRows, false>(p, row, d, j, left, sum, &total_d);
    } else {
      multiply_vector<kTaps, kStride, kRows, true>(p, row, d, j, left, sum, &total_d);
    }
  }
  // These rows are summed on their own before they join those above: rounding errors grow with the longer of the two.
#pragma GCC unroll 5
  for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 5
    for (int c = 0; c < kTaps; ++c) {
      T* const total = sums + (r * p.k + c) * kLanes;
      store(total, load(total) + sum[r * kTaps + c]);
    }
  }
  if (sum_d) store(sum_d, load(sum_d) + total_d);
}

// Adds the products of output rows [first, last), the first of which is at d, to sums [k * k + 1][lanes].
template <int kSize, int kStride, class T>
static void multiply_contiguous(const Plane<T>& p, const T* d, T* sums, int64_t first, int64_t last) {
  constexpr int kLanes = Arithmetic<T>::kLanes, kRows = kSize == 3 ? 4 : kSize == 5 ? 2 : 1;
  T* const sum_d = sums + p.k * p.k * kLanes;
  if constexpr (kSize == 0) {
    for (; first < last; ++first, d += p.out_width) {
      for (int64_t tap = 0; tap < p.k * p.k; ++tap) {
        multiply_rows<1, kStride, 1>(p, d, first, tap / p.k * p.dilation, tap % p.k * p.dilation, sums + tap * kLanes,
                                     tap ? nullptr : sum_d);
      }
    }
  } else {
    for (; first + kRows <= last; first += kRows, d += kRows * p.out_width) {
      multiply_rows<kSize, kStride, kRows>(p, d, first, 0, 0, sums, sum_d);
    }
    for (; first < last; ++first, d += p.out_width) {
      multiply_rows<kSize, kStride, 1>(p, d, first, 0, 0, sums, sum_d);
    }
  }
}
