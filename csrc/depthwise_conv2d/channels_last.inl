// Loops of depthwise_conv2d over planes of interleaved channels: a vector is `lanes` channels of one pixel. Compiled
// once per instruction set.
//
// Four pixels of two rows are formed together: they share the loads of the filter and, where their windows overlap, of
// the input, and are eight independent chains of sums, as many as hide the latency of a multiply-add. One row at a
// time, with the input loaded for each product, took 1.5 to 1.8 times as long. Vectors of channels are the inner loop,
// so memory is read in order. Taps outside of the image are left out; at the right border a block of pixels overlaps
// the one before. The two rows of a dilated filter, which has stride 1, lie as far apart as it is dilated.

// The input rows inside the image that one output row meets, and the filter's rows they meet.
template <class T>
struct TapRows {
  int64_t count = 0, tap[kLargestFilter];
  const T* row[kLargestFilter];

  // Row r of `taps` is `first` + r * step.
  TapRows(const Plane<T>& p, int64_t first, int64_t step, int64_t taps) {
    for (int64_t r = 0; r < taps; ++r) {
      const int64_t y = first + r * step;
      if (y < 0 || y >= p.height) continue;
      tap[count] = r;
      row[count++] = p.x + y * p.width * p.channels;
    }
  }
};

// Outputs [begin, end) of a row have all the columns that the filter spans inside the image.
struct Interior {
  int64_t begin, end;

  Interior(int64_t width, int64_t out_width, int64_t span, int64_t stride, int64_t padding) {
    const int64_t room = width - span + padding;
    begin = padding < 0 ? 0 : smaller((padding + stride - 1) / stride, out_width);
    end = larger(begin, room < 0 ? 0 : smaller(room / stride + 1, out_width));
  }
};

// kPixels outputs from column `left` on of two rows, the second of which may be null; kEdge: at the filter's columns
// [begin, end) only.
template <int kPixels, int kSize, int kStride, bool kEdge, class T>
EVKERNELS_INLINE void convolve_pixels(const Plane<T>& p, const T* const* row, int64_t left, int64_t begin, int64_t end,
                                      T* const* to) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t C = p.channels, k = kSize ? kSize : p.k, vectors = channel_vectors<T>(C);
  const int64_t dilation = kSize ? 1 : p.dilation;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t channel = first_channel<T>(v, C);
    const V bias = p.bias ? load(p.bias + v * kLanes) : V{};
    const T* const filter = p.filter + v * k * k * kLanes;
    V sum[2][kPixels];
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
#pragma GCC unroll 8
      for (int q = 0; q < kPixels; ++q) sum[o][q] = bias;
    }
    if constexpr (kSize == 0 || kEdge) {
      for (int64_t i = 0; i < k + kStride; ++i) {
        if (!row[i]) continue;
        const T* const at = row[i] + left * C + channel;
        for (int64_t c = begin; c < end; ++c) {
#pragma GCC unroll 8
          for (int q = 0; q < kPixels; ++q) {
            const V x = load(at + (q * kStride + c * dilation) * C);
            if (i < k) sum[0][q] += x * load(filter + (i * k + c) * kLanes);
            if (i >= kStride) sum[1][q] += x * load(filter + ((i - kStride) * k + c) * kLanes);
          }
        }
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kSize + kStride; ++i) {
        if (!row[i]) continue;
        const T* const at = row[i] + left * C + channel;
#pragma GCC unroll 16
        for (int j = 0; j < (kPixels - 1) * kStride + kSize; ++j) {
          const V x = in_register(load(at + j * C));
#pragma GCC unroll 2
          for (int o = 0; o < 2; ++o) {
            const int r = i - o * kStride;
#pragma GCC unroll 8
            for (int q = 0; q < kPixels; ++q) {
              const int c = j - q * kStride;
              if (r >= 0 && r < kSize && c >= 0 && c < kSize) {
                sum[o][q] += x * load(filter + (r * kSize + c) * kLanes);
              }
            }
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; ++o) {
      if (!to[o]) continue;
#pragma GCC unroll 8
      for (int q = 0; q < kPixels; ++q) store(to[o] + q * C + channel, sum[o][q]);
    }
  }
}

// Output rows [first, last); `out` is where the first one goes.
template <int kSize, int kStride, class T>
static void convolve_interleaved(const Plane<T>& p, T* out, int64_t first, int64_t last) {
  constexpr int kPixels = 4;
  const Interior interior(p.width, p.out_width, p.span(), kStride, p.padding);
  const int64_t count = p.out_width * p.channels, apart = kSize ? 1 : p.dilation;
  for (int64_t block = first; block < last; block += (block - first) % (2 * apart) < apart - 1 ? 1 : apart + 1) {
    T* const upper = out + (block - first) * count;
    const bool both = block + apart < last;
    const T* row[kLargestFilter + kStride];
    for (int64_t i = 0; i < p.k + kStride; ++i) {
      const int64_t y = block * kStride - p.padding + i * apart;
      row[i] = y >= 0 && y < p.height && (both || i < p.k) ? p.x + y * p.width * p.channels : nullptr;
    }
    for (int64_t j = 0; j < p.out_width;) {
      const bool inside = j >= interior.begin && j < interior.end && interior.end - interior.begin >= kPixels;
      if (inside) j = smaller(j, interior.end - kPixels);
      const int64_t left = j * kStride - p.padding;
      T* const to[2] = {upper + j * p.channels, both ? upper + apart * count + j * p.channels : nullptr};
      if (inside) {
        convolve_pixels<kPixels, kSize, kStride, false>(p, row, left, 0, p.k, to);
        j += kPixels;
      } else {
        const int64_t begin = larger(0, apart - 1 - left) / apart,
                      end = smaller(p.k, (p.width - left + apart - 1) / apart);
        convolve_pixels<1, kSize, kStride, true>(p, row, left, begin, end, to);
        ++j;
      }
    }
  }
}

// The gradient of the input at stride 2, as in channels_first.inl: kPairs times two input columns from 2 x on (padding
// counted) of the two rows `to`, null outside of what is wanted. kEdge: of columns outside nothing is read or written.
template <int kPairs, int kSize, bool kEdge, class T>
EVKERNELS_INLINE void transposed_pairs(const Plane<T>& p, const TapRows<T>& rows, int64_t x, T* const* to) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  const int64_t C = p.channels, k = kSize ? kSize : p.k, vectors = channel_vectors<T>(C);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t channel = first_channel<T>(v, C);
    V sum[2][2 * kPairs] = {};
    for (int64_t n = 0; n < rows.count; ++n) {
      const int64_t t = rows.tap[n];
      const T* const at = rows.row[n] + x * C + channel;
      const T* const weight = p.filter + (v * k + 2 * t) * k * kLanes;
      const auto add = [&](int64_t h) __attribute__((always_inline)) {
        if (kEdge && (x - h < 0 || x - h >= p.width)) return;
#pragma GCC unroll 2
        for (int a = 0; a < 2; ++a) {
          if (2 * t + a >= k) continue;
#pragma GCC unroll 2
          for (int b = 0; b < 2; ++b) {
            if (2 * h + b >= k) continue;
            const V w = load(weight + (a * k + 2 * h + b) * kLanes);
#pragma GCC unroll 4
            for (int j = 0; j < kPairs; ++j) sum[a][2 * j + b] += load(at + (j - h) * C) * w;
          }
        }
      };
      if constexpr (kSize == 0) {
        for (int64_t h = 0; h < (k + 1) / 2; ++h) add(h);
      } else {
#pragma GCC unroll 3
        for (int h = 0; h < (kSize + 1) / 2; ++h) add(h);
      }
    }
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a) {
      if (!to[a]) continue;
#pragma GCC unroll 8
      for (int j = 0; j < 2 * kPairs; ++j) {
        const int64_t column = 2 * x + j - p.padding;
        if (!kEdge || (column >= 0 && column < p.out_width)) store(to[a] + column * C + channel, sum[a][j]);
      }
    }
  }
}
template <int kSize, class T>
static void transposed_interleaved(const Plane<T>& p, T* out, int64_t first, int64_t last) {
  constexpr int kPairs = 2;
  const int64_t reach = (p.k + 1) / 2, row = p.out_width * p.channels;
  const int64_t begin = larger(reach - 1, (p.padding + 1) / 2), end = smaller(p.width, (p.out_width + p.padding) / 2);
  for (int64_t y = (first + p.padding) / 2; 2 * y < last + p.padding; ++y) {
    const TapRows<T> rows(p, y, -1, reach);
    T* to[2];
    for (int a = 0; a < 2; ++a) {
      const int64_t out_row = 2 * y + a - p.padding;
      to[a] = out_row >= first && out_row < last ? out + (out_row - first) * row : nullptr;
    }
    for (int64_t x = p.padding / 2; 2 * x < p.out_width + p.padding;) {
      if (x >= begin && x < end && end - begin >= kPairs) {
        const int64_t start = smaller(x, end - kPairs);
        transposed_pairs<kPairs, kSize, false>(p, rows, start, to);
        x = start + kPairs;
      } else {
        transposed_pairs<1, kSize, true>(p, rows, x, to);
        ++x;
      }
    }
  }
}

// The gradient of the weights: adds the products of kPixels outputs of kRows rows with the input at the filter's kTaps
// columns and rows, of which [begin, end) and those not null are inside. An input in a register serves all of them. One
// row at a time, for which an input comes three times from the second-level cache instead of twice, took 1.1 times as
// long where all fits there; from memory it is as fast.
template <int kRows, int kPixels, int kTaps, int kStride, bool kEdge, class T, class V>
EVKERNELS_INLINE void multiply_pixels(const T* const* row, const T* d, int64_t pitch, int64_t offset, int64_t channels,
                                      int64_t begin, int64_t end, V* sum, V* sum_d) {
  V gradient[kRows][kPixels], total_d = {};
#pragma GCC unroll 2
  for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 4
    for (int j = 0; j < kPixels; ++j) {
      gradient[o][j] = load(d + o * pitch + j * channels);
      total_d += gradient[o][j];
    }
  }
  *sum_d += total_d;
#pragma GCC unroll 5
  for (int i = 0; i < (kRows - 1) * kStride + kTaps; ++i) {
    if (!row[i]) continue;
    const T* const at = row[i] + offset;
#pragma GCC unroll 9
    for (int column = 0; column < (kPixels - 1) * kStride + kTaps; ++column) {
      if (kEdge && (column < begin || column >= end)) continue;
      const V x = in_register(load(at + column * channels));
#pragma GCC unroll 2
      for (int o = 0; o < kRows; ++o) {
#pragma GCC unroll 4
        for (int j = 0; j < kPixels; ++j) {
          const int r = i - o * kStride, c = column - j * kStride;
          if (r >= 0 && r < kTaps && c >= 0 && c < kTaps) sum[r * kTaps + c] += gradient[o][j] * x;
        }
      }
    }
  }
}

// The products of kRows output rows at the filter's rows and columns from `top` and `left_tap` on, in pixels, added to
// sums [vector of channels][k * k + 1][lanes], which begin at the first of these taps; where that is the filter's,
// those of d alone too.
template <int kTaps, int kStride, int kRows, class T>
EVKERNELS_INLINE void multiply_rows_of(const Plane<T>& p, const T* d, int64_t first, int64_t top, int64_t left_tap,
                                       T* sums) {
  using V = typename Arithmetic<T>::Type;
  // Products of one input, and registers, where there are only 16 of them.
  constexpr int kLanes = Arithmetic<T>::kLanes, kPixels = kTaps == 5 || (kRows == 2 && kLanes < 16) ? 2 : 4;
  constexpr int kInputs = (kRows - 1) * kStride + kTaps;
  const int64_t C = p.channels, taps = p.k * p.k, pitch = p.out_width * C;
  const Interior interior(p.width, p.out_width, kTaps, kStride, p.padding - left_tap);
  const T* row[kInputs];
  for (int i = 0; i < kInputs; ++i) {
    const int64_t y = first * kStride - p.padding + top + i;
    row[i] = y >= 0 && y < p.height ? p.x + y * p.width * C : nullptr;
  }
  for (int64_t v = 0; v < channel_vectors<T>(C); ++v, sums += (taps + 1) * kLanes) {
    const int64_t channel = first_channel<T>(v, C);
    // Rows are summed on their own before they join those above: rounding errors grow with the longer of the two.
    V sum[kTaps * kTaps] = {}, sum_d = {};
    for (int64_t j = 0; j < p.out_width;) {
      const int64_t left = j * kStride - p.padding + left_tap, offset = left * C + channel;
      const T* const at = d + j * C + channel;
      if (j >= interior.begin && j + kPixels <= interior.end) {
        multiply_pixels<kRows, kPixels, kTaps, kStride, false>(row, at, pitch, offset, C, 0, kTaps, sum, &sum_d);
        j += kPixels;
      } else {
        multiply_pixels<kRows, 1, kTaps, kStride, true>(row, at, pitch, offset, C, -left, p.width - left, sum, &sum_d);
        ++j;
      }
    }
#pragma GCC unroll 5
    for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 5
      for (int c = 0; c < kTaps; ++c) {
        T* const total = sums + (r * p.k + c) * kLanes;
        store(total, load(total) + sum[r * kTaps + c]);
      }
    }
    if (top + left_tap == 0) store(sums + taps * kLanes, load(sums + taps * kLanes) + sum_d);
  }
}

// Adds the products of output rows [first, last), the first of which is at d.
template <int kSize, int kStride, class T>
static void multiply_interleaved(const Plane<T>& p, const T* d, T* sums, int64_t first, int64_t last) {
  constexpr int kLanes = Arithmetic<T>::kLanes, kRows = kSize == 3 ? 2 : 1;
  if constexpr (kSize == 0) {
    for (; first < last; ++first, d += p.out_width * p.channels) {
      for (int64_t tap = 0; tap < p.k * p.k; ++tap) {
        const int64_t r = tap / p.k, c = tap % p.k;
        multiply_rows_of<1, kStride, 1>(p, d, first, r * p.dilation, c * p.dilation, sums + tap * kLanes);
      }
    }
  } else {
    for (; first + kRows <= last; first += kRows, d += kRows * p.out_width * p.channels) {
      multiply_rows_of<kSize, kStride, kRows>(p, d, first, 0, 0, sums);
    }
    for (; first < last; ++first, d += p.out_width * p.channels) {
      multiply_rows_of<kSize, kStride, 1>(p, d, first, 0, 0, sums);
    }
  }
}
