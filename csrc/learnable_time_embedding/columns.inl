// Blocks of timestamps as rows, the values of one timestamp side by side, and as columns: for every value a row of
// kTimes numbers. Included by loops.inl files.

#include "common/transpose.inl"

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
