// The planes of a window's bins while they are filled. Part of a loop file, see foreach_isa.h.
//
// Where many events lie between the same two bins, a pixel's two values are kept side by side meanwhile: one cache line
// per event instead of two, in the two planes' own memory.

// The bins [first, last) are this caller's to write.
struct Own {
  int64_t first, last;
};
EVKERNELS_INLINE bool owns(Own own, int64_t bin) { return bin >= own.first && bin < own.last; }

template <class R>
EVKERNELS_INLINE void clear_planes(R* window, const VoxelShape& shape, Own own) {
  const int64_t plane = shape.height * shape.width;
  for (int64_t half = 0; half < (shape.is_split ? 2 : 1); ++half)
    __builtin_memset(window + (half * shape.bins + own.first) * plane, 0, (own.last - own.first) * plane * sizeof(R));
}

// Swaps the odd pixels of one plane with the even ones before them of the next. Then a pixel's values of both are side
// by side, those of even pixels in the lower plane and those of odd ones in the upper. The same swap undoes it.
template <class R>
static void swap_pixels(R* __restrict__ lower, R* __restrict__ upper, int64_t pixels) {
  for (int64_t k = 0; k + 1 < pixels; k += 2) {
    const R even[2] = {lower[k], upper[k]}, odd[2] = {lower[k + 1], upper[k + 1]};
    lower[k] = even[0];
    lower[k + 1] = even[1];
    upper[k] = odd[0];
    upper[k + 1] = odd[1];
  }
}

// If the pixels of two bins are swapped, the caller owns these two alone.
template <class R>
struct Planes {
  R* window;
  int64_t pixels;  // of a plane
  int64_t lower;   // of the two bins whose pixels are swapped
  bool is_swapped;

  // Where a pixel's values of the swapped bins are, side by side.
  int64_t pair(int64_t pixel) const { return pixel + (-(pixel & 1) & (pixels - 1)); }

  R& at(int64_t bin, int64_t pixel) const {
    if (is_swapped) return window[lower * pixels + pair(pixel) + bin - lower];
    return window[bin * pixels + pixel];
  }
};
