// Loops of blur_soft_pool2d over contiguous planes, compiled once per instruction set. A plane is read once and its
// blurred rows, two of which a row of outputs needs, stay in the first-level cache.
//
// Five exponentials per output are most of the work; corners of windows are brought side by side first, so that
// vectors run over outputs. The gradient blurs again, which costs less than keeping anything would, and forms that of
// the blurred plane as a whole before it is blurred in turn: the blur is its own transpose.

#include "common/activations.inl"

EVKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
template <class V>
EVKERNELS_INLINE V larger(V a, V b) {
  return select(a > b, a, b);
}

// Elements of the buffers of rows: vectors reach over the end, the blur one element over both.
EVKERNELS_INLINE int64_t row_pitch(int64_t width) { return (width + 2 + 31) / 16 * 16; }

// Elements of memory for each thread, in the type of the computation.
static int64_t soft_pool_memory(const SoftPoolShape& s, bool gradient) {
  return row_pitch(s.width) * (gradient ? s.height + 8 : 8) + 9 * row_pitch(s.out_width);
}

// `to` = one row of the blurred plane: 1, 2, 1 along the columns and along the row. Null rows are zeros.
template <class T>
static void blur_row(const T* above, const T* row, const T* below, Compute<T>* sums, Compute<T>* to, int64_t width) {
  using A = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t left = width - j;
    const auto at = [&](const T* p) __attribute__((always_inline)) {
      return !p ? V{} : left >= kLanes ? (V)load(p + j) : (V)load_partial(p + j, left);
    };
    store(sums + 1 + j, at(above) + at(row) * 2 + at(below));
  }
  sums[0] = sums[width + 1] = 0;
  for (int64_t j = 0; j < width; j += kLanes) {
    const V sum = (V)load(sums + j) + (V)load(sums + j + 1) * 2 + (V)load(sums + j + 2);
    store(to + j, sum * (A)0.0625);
  }
}

// One plane's blurred rows, the last two of which are kept, and the corners of a row of windows.
template <class T>
struct BlurredPlane {
  using A = Compute<T>;
  const SoftPoolShape& s;
  const T* x;
  A *sums, *rows, *corners;
  int64_t held[2] = {-1, -1};

  EVKERNELS_LOOP_BODY BlurredPlane(const SoftPoolShape& shape, const T* plane, A* memory)
      : s(shape), x(plane), sums(memory) {
    rows = sums + 2 * row_pitch(s.width);
    corners = rows + 2 * row_pitch(s.width);
  }

  const A* row(int64_t i) {
    A* const to = rows + i % 2 * row_pitch(s.width);
    if (held[i % 2] == i) return to;
    held[i % 2] = i;
    const T* const at = x + i * s.width;
    blur_row(i > 0 ? at - s.width : nullptr, at, i + 1 < s.height ? at + s.width : nullptr, sums, to, s.width);
    return to;
  }

  // corners[k], k = 2 * row + column in the window, of output row r.
  void go_to(int64_t r) {
    for (int64_t k = 0; k < 4; ++k) {
      const A* const from = row(r * s.stride + k / 2) + k % 2;
      A* const to = corners + k * row_pitch(s.out_width);
      if (s.stride == 2) {
        for (int64_t j = 0; j < s.out_width; ++j) to[j] = from[2 * j];
      } else {
        for (int64_t j = 0; j < s.out_width; ++j) to[j] = from[j * s.stride];
      }
    }
  }
};

// The shares of four values in their mean, which is returned. The largest exponent, if it is above zero, is taken out
// of all, the definition's 1e-6 per value included.
template <class V, class A>
EVKERNELS_INLINE V soft_mean(const V* value, A inverse, V* share) {
  V largest = {};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) largest = larger(V(value[k] * inverse), largest);
  V total = exp(V(-largest)) * (A)4e-6;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    share[k] = exp(V(value[k] * inverse - largest));
    total += share[k];
  }
  const V scale = (A)1 / total;
  V mean = {};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    share[k] *= scale;
    mean += share[k] * value[k];
  }
  return mean;
}

template <class T>
static void soft_pool_forward(const T* x, T* y, const SoftPoolShape& s, Compute<T>* memory, int64_t begin,
                              int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const auto inverse = (Compute<T>)(1 / s.temperature);
  const int64_t pitch = row_pitch(s.out_width);
  for (int64_t plane = begin; plane < end; ++plane) {
    BlurredPlane<T> blurred(s, x + plane * s.height * s.width, memory);
    T* to = y + plane * s.out_height * s.out_width;
    for (int64_t r = 0; r < s.out_height; ++r, to += s.out_width) {
      blurred.go_to(r);
      for (int64_t j = 0; j < s.out_width; j += kLanes) {
        V value[4], share[4];
        for (int k = 0; k < 4; ++k) value[k] = load(blurred.corners + k * pitch + j);
        const V mean = soft_mean<V, Compute<T>>(value, inverse, share);
        if (j + kLanes <= s.out_width) {
          store(to + j, mean);
        } else {
          store_partial(to + j, mean, s.out_width - j);
        }
      }
    }
  }
}

template <class T>
static void soft_pool_backward(const T* d_y, const T* x, T* d_x, const SoftPoolShape& s, Compute<T>* memory,
                               int64_t begin, int64_t end) {
  using A = Compute<T>;
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const auto inverse = (A)(1 / s.temperature);
  const int64_t pitch = row_pitch(s.out_width), row = row_pitch(s.width);
  A* const d_corners = memory + 4 * row + 4 * pitch;
  A* const d_blurred = d_corners + 4 * pitch;
  A* const blurred_again = d_blurred + s.height * row;
  for (int64_t plane = begin; plane < end; ++plane) {
    BlurredPlane<T> blurred(s, x + plane * s.height * s.width, memory);
    const T* d = d_y + plane * s.out_height * s.out_width;
    __builtin_memset(d_blurred, 0, s.height * row * sizeof(A));
    for (int64_t r = 0; r < s.out_height; ++r, d += s.out_width) {
      blurred.go_to(r);
      for (int64_t j = 0; j < s.out_width; j += kLanes) {
        V value[4], share[4];
        for (int k = 0; k < 4; ++k) value[k] = load(blurred.corners + k * pitch + j);
        const V mean = soft_mean<V, Compute<T>>(value, inverse, share);
        const int64_t left = s.out_width - j;
        const V grad = left >= kLanes ? (V)load(d + j) : (V)load_partial(d + j, left);
        for (int k = 0; k < 4; ++k) {
          store(d_corners + k * pitch + j, V(grad * share[k] * ((value[k] - mean) * inverse + (A)1)));
        }
      }
      for (int k = 0; k < 4; ++k) {
        A* const to = d_blurred + (r * s.stride + k / 2) * row + k % 2;
        const A* const from = d_corners + k * pitch;
        if (s.stride == 2) {
          for (int64_t j = 0; j < s.out_width; ++j) to[2 * j] += from[j];
        } else {
          for (int64_t j = 0; j < s.out_width; ++j) to[j * s.stride] += from[j];
        }
      }
    }
    T* to = d_x + plane * s.height * s.width;
    for (int64_t i = 0; i < s.height; ++i, to += s.width) {
      const A* const at = d_blurred + i * row;
      blur_row<A>(i > 0 ? at - row : nullptr, at, i + 1 < s.height ? at + row : nullptr, memory, blurred_again,
                  s.width);
      for (int64_t j = 0; j < s.width; j += kLanes) {
        const int64_t left = s.width - j;
        if (left >= kLanes) {
          store(to + j, (V)load(blurred_again + j));
        } else {
          store_partial(to + j, (V)load(blurred_again + j), left);
        }
      }
    }
  }
}
