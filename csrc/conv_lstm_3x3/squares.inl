// Squares of 2x2 pixels on maps, see maps.h: where they are, their pixels and those around them.

// The place of a square on the maps, going from one to the next without a division.
struct SquarePlace {
  int64_t sample, top, left;

  EVKERNELS_LOOP_BODY SquarePlace(const Maps& m, int64_t square) {
    const int64_t row = square / m.square_columns();
    sample = row / m.square_rows();
    top = 2 * (row - sample * m.square_rows());
    left = 2 * (square - row * m.square_columns());
  }
  EVKERNELS_LOOP_BODY void advance(const Maps& m) {
    left += 2;
    if (left < m.width) return;
    left = 0;
    top += 2;
    if (top < m.height) return;
    top = 0;
    ++sample;
  }
  // Of the pixel `y` below and `x` right of the square's first, among all.
  EVKERNELS_LOOP_BODY int64_t pixel(const Maps& m, int64_t y, int64_t x) const {
    return (sample * m.height + top + y) * m.width + left + x;
  }
  // Whether all pixels around the square are on the map.
  EVKERNELS_LOOP_BODY bool is_surrounded(const Maps& m) const {
    return top > 0 && left > 0 && top + 2 < m.height && left + 2 < m.width;
  }
};

// The pixels of `size` x `size` places that begin `before` rows and columns before the square, zeros where these are
// off the map.
template <int size, class T>
EVKERNELS_INLINE void pixels_around(const T* maps, int64_t stride, const T* zeros, const Maps& m,
                                    const SquarePlace& square, int64_t before, const T* (&pixels)[size * size]) {
  for (int64_t k = 0; k < size * size; ++k) {
    const int64_t y = k / size - before, x = k % size - before;
    const bool inside =
        square.top + y >= 0 && square.top + y < m.height && square.left + x >= 0 && square.left + x < m.width;
    pixels[k] = inside ? maps + square.pixel(m, y, x) * stride : zeros;
  }
}

// The pixels of a square among all; the first stands in for those outside of the map.
struct SquarePixels {
  int64_t pixel[4];
  bool inside[4];

  EVKERNELS_LOOP_BODY SquarePixels(const SquarePlace& place, const Maps& m) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      inside[k] = place.top + k / 2 < m.height && place.left + k % 2 < m.width;
      pixel[k] = place.pixel(m, inside[k] ? k / 2 : 0, inside[k] ? k % 2 : 0);
    }
  }
};

template <class V>
using SquareOf = Interleaved<V, 4>;

template <class R>
EVKERNELS_INLINE auto load_square(const R* maps, int64_t stride, const SquarePixels& pixels) {
  SquareOf<typename Arithmetic<R>::Type> result;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) result.v[k] = load(maps + pixels.pixel[k] * stride);
  return result;
}

// Asks for what will be read kPixelsAhead further on: four rows of maps that are read and 16 places that are written at
// once are too much for a processor to foresee.
template <class T>
EVKERNELS_INLINE void prefetch_line(const T* from, int64_t elements) {
  for (int64_t at = 0; at < elements; at += 64 / int64_t{sizeof(T)}) __builtin_prefetch(from + at);
}
constexpr int64_t kPixelsAhead = 16;
