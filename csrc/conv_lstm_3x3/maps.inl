// Maps with a border of zeros, see maps.h: from frames in either layout and any dtype, and back.

#include "conv_lstm_1x1/tiles.inl"

// Channels in whole vectors.
template <class R>
static int64_t whole_vectors(int64_t channels) {
  return round_up(channels, Arithmetic<R>::kLanes);
}

template <class R>
EVKERNELS_INLINE R* map_row(R* maps, int64_t stride, const Maps& m, int64_t row) {
  const int64_t sample = row / m.height, y = row - sample * m.height;
  return maps + (sample * m.padded_pixels() + (y + 1) * m.padded_width() + 1) * stride;
}

// Elements of all maps, and as many more as a vector of pixels may be read beyond a row's end.
template <class R>
static int64_t maps_size(int64_t stride, const Maps& m) {
  return (m.batch * m.padded_pixels() + Arithmetic<R>::kLanes) * stride;
}

template <class R>
static void zero_borders(R* maps, int64_t stride, const Maps& m) {
  const int64_t height = m.padded_height(), width = m.padded_width();
  for (int64_t row = 0; row < m.batch * height; ++row, maps += width * stride) {
    const int64_t y = row % height;
    if (y == 0 || y > m.height) {
      __builtin_memset(maps, 0, width * stride * sizeof(R));
    } else {
      __builtin_memset(maps, 0, stride * sizeof(R));
      __builtin_memset(maps + (m.width + 1) * stride, 0, (width - m.width - 1) * stride * sizeof(R));
    }
  }
}

// Rows [begin, end) of all maps, batch * height in all. Whole vectors are written: what is behind the channels becomes
// zero, and where `stride` is half a vector, as much behind the last pixel.
template <class T, class R>
static void load_rows(const T* frames, int64_t channels, bool channels_last, R* maps, int64_t stride, const Maps& m,
                      int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t whole = channels_last ? m.width : m.width / kLanes * kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / m.height, first = (row - sample * m.height) * m.width;
    const T* const frame = frames + sample * channels * m.pixels();
    R* const to = map_row(maps, stride, m, row);
    load_tile(frame, channels, Tile{m.pixels(), first, whole, channels_last}, to, stride);
    if (whole == m.width) continue;
    // The last columns by way of a square, because whole squares of pixels and channels are written.
    const Tile rest = {m.pixels(), first + whole, m.width - whole, false};
    for (int64_t c = 0; c < channels; c += kLanes) {
      R square[kLanes * kLanes];
      load_tile(frame + c * m.pixels(), smaller(kLanes, channels - c), rest, square, kLanes);
      for (int64_t p = 0; p < rest.count; ++p) store(to + (whole + p) * stride + c, load(square + p * kLanes));
    }
  }
}

template <class T, class R>
static void store_rows(const R* maps, int64_t stride, T* frames, int64_t channels, bool channels_last, const Maps& m,
                       int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / m.height;
    const Tile tile = {m.pixels(), (row - sample * m.height) * m.width, m.width, channels_last};
    store_tile(frames + sample * channels * m.pixels(), channels, tile, map_row(maps, stride, m, row), stride);
  }
}

// Zeros in the rows [begin, end) of the samples that restart.
template <class R>
static void restart_rows(const bool* reset, R* maps, int64_t stride, const Maps& m, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (reset[row / m.height]) __builtin_memset(map_row(maps, stride, m, row), 0, m.width * stride * sizeof(R));
  }
}
