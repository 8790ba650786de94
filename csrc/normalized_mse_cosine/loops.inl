// Loops of normalized_mse_cosine, compiled once per instruction set. Lengths first, then what is made of the unit rows,
// while a row is in the cache.

#include "common/activations.inl"
#include "common/rows.inl"
#include "common/unit_rows.inl"

template <class T, class A>
static void normalized_mse_cosine_sums(const T* a, const T* b, A* squares, A* cosines, int64_t size, int64_t begin,
                                       int64_t end) {
  using V = typename Arithmetic<T>::Type;
  for (int64_t i = begin; i < end; ++i) {
    const T *const x = a + i * size, *const y = b + i * size;
    const A x_factor = inverse_length(x, size), y_factor = inverse_length(y, size);
    squares[i] = sum_over_row<T>(size, [&](auto at, int64_t e) EVKERNELS_LOOP_BODY {
      const V difference = at.read(x + e) * x_factor - at.read(y + e) * y_factor;
      return difference * difference;
    });
    cosines[i] = sum_over_row<T>(size, [&](auto at, int64_t e) EVKERNELS_LOOP_BODY {
      return (at.read(x + e) * x_factor) * (at.read(y + e) * y_factor);
    });
  }
}

// d_mse and d_cosine are the gradients of an element's square and of a row's cosine. Orthogonal to p, the gradient at p
// is (d_cosine - d_mse) * (q - cosine * p).
template <class T, class A>
static void normalized_mse_cosine_gradients(const T* a, const T* b, T* d_a, T* d_b, A d_mse, A d_cosine, int64_t size,
                                            int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const T *const x = a + i * size, *const y = b + i * size;
    T *const d_x = d_a + i * size, *const d_y = d_b + i * size;
    const A x_factor = inverse_length(x, size), y_factor = inverse_length(y, size);
    const A cosine = sum_over_row<T>(size, [&](auto at, int64_t e) EVKERNELS_LOOP_BODY {
      return (at.read(x + e) * x_factor) * (at.read(y + e) * y_factor);
    });
    // A row that is too short was divided by a constant: nothing is taken away along it.
    const A other = d_cosine - d_mse;
    const A along_x = x_factor * (A)kSmallestLength < 1 ? other * cosine : -d_mse;
    const A along_y = y_factor * (A)kSmallestLength < 1 ? other * cosine : -d_mse;
    for_each_vector<kLanes>(size, 0, size, [&](auto at, int64_t, int64_t e) EVKERNELS_LOOP_BODY {
      const V p = at.read(x + e) * x_factor, q = at.read(y + e) * y_factor;
      at.write(d_x + e, (q * other - p * along_x) * x_factor);
      at.write(d_y + e, (p * other - q * along_y) * y_factor);
    });
  }
}
