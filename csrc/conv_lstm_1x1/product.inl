// The products of conv_lstm_1x1, see loops.inl: a block of kRows by up to four vectors in registers, and what its
// factors are.
//
// Factors are numbers of the type of the computation or, where EVKERNELS_BF16_DOT is defined (AVX-512 with its bfloat16
// extension) and the data is bfloat16, pairs of them that one instruction multiplies and adds up in float32: exact
// products, two at a time, from half the memory. Both factors of a product must be defined then, also in what pads a
// pair, and the channels must be even.

constexpr int kRows = EVKERNELS_LANES == 16 ? 6 : 3;

// How values of T are stored in tiles and packed weights, and how many of them make a factor.
template <class T>
struct Factors {
  using Stored = Compute<T>;
  using Type = Compute<T>;
  static constexpr int64_t kPer = 1;
};
#if defined(EVKERNELS_BF16_DOT)
struct Pair {
  int32_t bits;
};
template <>
struct Factors<BFloat16> {
  using Stored = BFloat16;
  using Type = Pair;
  static constexpr int64_t kPer = 2;
};
#endif
template <class T>
using Stored = typename Factors<T>::Stored;

// sum[m][n] += sum over k of a[m * a_stride + k * a_step] * b[k * b_stride + n * lanes].
template <int vectors, class V, class R>
EVKERNELS_INLINE void add_product(V (&sum)[kRows][vectors], const R* __restrict__ a, int64_t a_stride, int64_t a_step,
                                  const R* __restrict__ b, int64_t b_stride, int64_t depth) {
  constexpr int kLanes = sizeof(V) / sizeof(R);
  for (int64_t k = 0; k < depth; ++k) {
    V column[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) column[n] = load(b + k * b_stride + n * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const V row = a[m * a_stride + k * a_step] - V{};
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[m][n] = multiply_add(row, column[n], sum[m][n]);
    }
  }
}

// One vector of factors for sums over pixels: the values at `from`, with kPer = 2 interleaved with those of the next
// row.
template <class R>
EVKERNELS_INLINE void store_factors(R* to, const R* from, int64_t) {
  store(to, load(from));
}

#if defined(EVKERNELS_BF16_DOT)
template <int vectors>
EVKERNELS_INLINE void add_product(VecF (&sum)[kRows][vectors], const Pair* __restrict__ a, int64_t a_stride,
                                  int64_t a_step, const Pair* __restrict__ b, int64_t b_stride, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    __m512i column[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) column[n] = _mm512_loadu_si512(b + k * b_stride + n * EVKERNELS_LANES);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      int32_t bits;
      __builtin_memcpy(&bits, a + m * a_stride + k * a_step, sizeof bits);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(bits);
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) {
        sum[m][n] = (VecF)_mm512_dpbf16_ps((__m512)sum[m][n], row, (__m512bh)column[n]);
      }
    }
  }
}

EVKERNELS_INLINE void store_factors(Pair* to, const BFloat16* from, int64_t stride) {
  VecU16 low, high;
  __builtin_memcpy(&low, from, sizeof low);
  __builtin_memcpy(&high, from + stride, sizeof high);
  const VecI pairs = __builtin_convertvector(low, VecI) | __builtin_convertvector(high, VecI) << 16;
  __builtin_memcpy(to, &pairs, sizeof pairs);
}
#endif
