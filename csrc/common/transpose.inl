// Transposes a square of as many rows as a vector has lanes, in registers. Included by loops.inl files inside each
// instruction set's namespace; includes nothing itself.

#if EVKERNELS_LANES == 16
#define EVKERNELS_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define EVKERNELS_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif EVKERNELS_LANES == 8
#define EVKERNELS_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define EVKERNELS_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVKERNELS_LOW 0, 4, 1, 5
#define EVKERNELS_HIGH 2, 6, 3, 7
#endif

// Each round interleaves the first half of the rows with the second, which turns the bits of an element's row and
// column by one place; after log2(lanes) rounds rows are columns.
EVKERNELS_INLINE void transpose(VecF (&rows)[EVKERNELS_LANES]) {
  constexpr int kHalf = EVKERNELS_LANES / 2;
#pragma GCC unroll 4
  for (int round = 1; round < EVKERNELS_LANES; round *= 2) {
    VecF turned[EVKERNELS_LANES];
#pragma GCC unroll 8
    for (int k = 0; k < kHalf; ++k) {
      turned[2 * k] = __builtin_shufflevector(rows[k], rows[k + kHalf], EVKERNELS_LOW);
      turned[2 * k + 1] = __builtin_shufflevector(rows[k], rows[k + kHalf], EVKERNELS_HIGH);
    }
#pragma GCC unroll 16
    for (int k = 0; k < EVKERNELS_LANES; ++k) rows[k] = turned[k];
  }
}
EVKERNELS_INLINE void transpose(double (&)[1]) {}
#undef EVKERNELS_LOW
#undef EVKERNELS_HIGH
