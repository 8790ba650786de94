// Tiles of pixels for conv_lstm_1x1, see loops.inl: from a frame in either layout and any dtype to rows
// [pixel][channel] of the type of the computation, and back. NCHW is transposed in registers, a square of `lanes` at a
// time.

#include "common/transpose.inl"

EVKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EVKERNELS_INLINE int64_t round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

// The value that storing as T and loading gives.
template <class T, class V>
EVKERNELS_INLINE V rounded(V value) {
  if constexpr (sizeof(T) == 2) {
    T stored[Arithmetic<T>::kLanes];
    store(stored, value);
    return load(stored);
  }
  return value;
}

template <class T, class V>
EVKERNELS_INLINE void store_columns(T* to, V value, int64_t count) {
  if (count >= Arithmetic<T>::kLanes) {
    store(to, value);
  } else {
    store_partial(to, value, count);
  }
}
template <class T>
EVKERNELS_INLINE typename Arithmetic<T>::Type load_columns(const T* from, int64_t count) {
  return count >= Arithmetic<T>::kLanes ? load(from) : load_partial(from, count);
}

// `count` pixels from `first` on of one frame of `channels`.
struct Tile {
  int64_t pixels, first, count;
  bool channels_last;
};

// Whole vectors are written: `to` has rows of a multiple of the lanes and room for kTile of them.
template <class T, class R>
static void load_tile(const T* __restrict__ frame, int64_t channels, const Tile& tile, R* __restrict__ to,
                      int64_t stride) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  if (tile.channels_last) {
    const T* from = frame + tile.first * channels;
    for (int64_t p = 0; p < tile.count; ++p, from += channels, to += stride) {
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) store(to + c, load(from + c));
      if (c < channels) store(to + c, load_partial(from + c, channels - c));
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    for (int64_t p = 0; p < tile.count; p += kLanes) {
      typename Arithmetic<T>::Type rows[kLanes];
      const T* const from = frame + c * tile.pixels + tile.first + p;
      if (tile.count - p >= kLanes && channels - c >= kLanes) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes; ++k) rows[k] = load(from + k * tile.pixels);
      } else {
        const int64_t count = smaller(kLanes, tile.count - p);
        for (int64_t k = 0; k < kLanes; ++k) {
          rows[k] = load_partial(from + k * tile.pixels, c + k < channels ? count : 0);
        }
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) store(to + (p + k) * stride + c, rows[k]);
    }
  }
}

template <class T, class R>
static void store_tile(T* __restrict__ frame, int64_t channels, const Tile& tile, const R* __restrict__ from,
                       int64_t stride) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  if (tile.channels_last) {
    T* to = frame + tile.first * channels;
    for (int64_t p = 0; p < tile.count; ++p, from += stride, to += channels) {
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) store(to + c, load(from + c));
      if (c < channels) store_partial(to + c, load(from + c), channels - c);
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    for (int64_t p = 0; p < tile.count; p += kLanes) {
      typename Arithmetic<T>::Type rows[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) rows[k] = load(from + (p + k) * stride + c);
      transpose(rows);
      T* const to = frame + c * tile.pixels + tile.first + p;
      if (tile.count - p >= kLanes && channels - c >= kLanes) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < kLanes; ++k) store(to + k * tile.pixels, rows[k]);
      } else {
        const int64_t count = smaller(kLanes, tile.count - p);
        for (int64_t k = 0; k < smaller(kLanes, channels - c); ++k) store_partial(to + k * tile.pixels, rows[k], count);
      }
    }
  }
}

template <class R>
static void zero_rows(R* rows, int64_t stride, int64_t columns, int64_t count) {
  for (int64_t p = 0; p < count; ++p) __builtin_memset(rows + p * stride, 0, columns * sizeof(R));
}
