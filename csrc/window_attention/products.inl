// A product of kRows rows in registers, from and to memory. Included by loops.inl files inside each instruction set's
// namespace.

#include "conv_lstm_1x1/product.inl"

// y[m] = sum over k of a[m * a_stride + k * a_step] * b[k * b_stride], or is added to, for kRows rows m of `vectors`
// vectors.
template <int vectors, class A>
EVKERNELS_INLINE void product_block(const A* a, int64_t a_stride, int64_t a_step, const A* b, int64_t b_stride,
                                    int64_t depth, A* y, int64_t y_stride, bool adds) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  V sum[kRows][vectors];
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[m][n] = V{};
  }
  add_product<vectors>(sum, a, a_stride, a_step, b, b_stride, depth);
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      A* const to = y + m * y_stride + n * L;
      store(to, adds ? sum[m][n] + load(to) : sum[m][n]);
    }
  }
}
