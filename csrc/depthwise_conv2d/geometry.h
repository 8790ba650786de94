// Sizes of one depthwise convolution as the CPU loops see it, in pixels.
//
// A plane is one channel of one sample if contiguous, a whole sample if channels_last; `channels` counts those
// interleaved in its pixels, 1 or C.
#pragma once

#include <cstdint>

struct DepthwiseGeometry {
  int64_t planes, channels, filters;  // the filter of a contiguous plane is plane % filters
  int64_t height, width;              // of the input
  int64_t out_height, out_width;      // of the output
  int64_t k, stride, padding, dilation;

  // Rows and columns of the image that the filter spans.
  int64_t span() const { return (k - 1) * dilation + 1; }

  // Output rows in one partial sum of the gradient of the weights. Set by the shape alone, never by the number of
  // threads, so that sums are always formed in the same order: about 64 Ki elements, and so many that adding up the
  // k * k partial sums themselves stays cheap.
  int64_t rows_per_sum() const {
    const int64_t by_size = 65536 / (out_width * channels), by_taps = 4 * k * k / out_width;
    const int64_t rows = 1 + (by_size > by_taps ? by_size : by_taps);
    return rows < out_height ? rows : out_height;
  }
  int64_t sums_per_plane() const { return (out_height + rows_per_sum() - 1) / rows_per_sum(); }

  // Rows of the gradient at the pre-activation that the input rows beside a sum need, above its own and with them.
  int64_t rows_above_sum() const { return (span() - 1) / stride; }
  int64_t rows_before_sum() const { return rows_per_sum() + rows_above_sum(); }
  // The input row that the top of the filter meets at an output row: where the backward pass splits the input.
  int64_t input_row(int64_t out_row) const {
    const int64_t row = out_row * stride - padding;
    return row < 0 ? 0 : row < height ? row : height;
  }

  // Rows of `count` elements that pass from one loop to the next by way of the L1 cache. A multiple of four, as many as
  // are convolved together. Twice as many where rows are widened, as those that the filter reaches beyond them are
  // widened again.
  int64_t rows_at_once(int64_t count, bool widened) const { return (widened ? 8 : 4) * larger(1, 1024 / count); }
  // Channels filled up to vectors of any length.
  int64_t padded_channels() const { return channels == 1 ? 1 : (channels + 15) / 16 * 16; }

  // Elements of memory that each loop function needs; `widened`: for rows of a 16-bit type, on their way in and out.
  int64_t forward_memory(bool widened) const {
    const int64_t count = out_width * channels;
    return (k * k + 1) * padded_channels() + (widened ? rows_at_once(count, true) * count + window_memory() : 0);
  }
  int64_t backward_memory(bool widened) const {
    return (2 * k * k + 1) * padded_channels() + (k * k + 1) * larger(padded_channels(), 16) +
           rows_before_sum() * out_width * channels +
           (widened ? larger(rows_at_once(width * channels, true) * width * channels, window_memory()) : 0);
  }

 private:
  // The input rows that as many output rows meet as pass at once.
  int64_t window_memory() const {
    return (rows_at_once(out_width * channels, true) * stride + span() - 1) * width * channels;
  }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};
