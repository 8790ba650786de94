// Maps of whole vectors of channels, see maps.h: frames themselves where they are such, else copies.

#include "conv_lstm_1x1/tiles.inl"

// Channels in whole vectors.
template <class R>
static int64_t whole_vectors(int64_t channels) {
  return round_up(channels, Arithmetic<R>::kLanes);
}

// Whether frames of T can be read and written as maps: 16 bits become floats first.
template <class T>
static bool are_maps(int64_t channels, bool channels_last) {
  return sizeof(T) > 2 && channels_last && channels % Arithmetic<T>::kLanes == 0;
}

// Elements of all maps, and as many more as a vector of pixels may be read beyond the end.
template <class R>
static int64_t maps_size(int64_t stride, const Maps& m) {
  return (m.batch * m.pixels() + Arithmetic<R>::kLanes) * stride;
}

// Rows [begin, end) of all maps, batch * height in all. Of channels that fill no vector the rest becomes zero.
template <class T, class R>
static void load_rows(const T* frames, int64_t channels, bool channels_last, R* maps, int64_t stride, const Maps& m,
                      int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  // Whole squares of pixels and vectors of channels are written.
  const int64_t squares = channels_last ? m.width : m.width / kLanes * kLanes, whole = stride < kLanes ? 0 : squares;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / m.height, first = (row - sample * m.height) * m.width;
    const T* const frame = frames + sample * channels * m.pixels();
    R* const to = maps + row * m.width * stride;
    load_tile(frame, channels, Tile{m.pixels(), first, whole, channels_last}, to, stride);
    // What must not be written beyond goes by way of one.
    for (int64_t p = whole; p < m.width; p += kLanes) {
      const int64_t pixels = smaller(kLanes, m.width - p);
      for (int64_t c = 0; c < channels; c += kLanes) {
        R square[kLanes * kLanes] = {};
        load_tile(frame + c * m.pixels(), smaller(kLanes, channels - c),
                  Tile{m.pixels(), first + p, pixels, channels_last}, square, kLanes);
        for (int64_t k = 0; k < pixels; ++k) {
          store_columns(to + (p + k) * stride + c, load(square + k * kLanes), stride - c);
        }
      }
    }
  }
}

template <class T, class R>
static void store_rows(const R* maps, int64_t stride, T* frames, int64_t channels, bool channels_last, const Maps& m,
                       int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / m.height;
    const Tile tile = {m.pixels(), (row - sample * m.height) * m.width, m.width, channels_last};
    store_tile(frames + sample * channels * m.pixels(), channels, tile, maps + row * m.width * stride, stride);
  }
}

// Zeros in the rows [begin, end) of the samples that restart.
template <class R>
static void restart_rows(const bool* reset, R* maps, int64_t stride, const Maps& m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (reset[row / m.height]) __builtin_memset(maps + row * m.width * stride, 0, m.width * stride * sizeof(R));
  }
}
