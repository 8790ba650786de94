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
  int64_t k, stride, padding;

  // Output rows in one partial sum of the gradient of the weights. Set by the shape alone, never by the number of
  // threads, so that sums are always formed in the same order: about 64 Ki elements, and so many that adding up the
  // k * k partial sums themselves stays cheap.
  int64_t rows_per_sum() const {
    const int64_t by_size = 65536 / (out_width * channels), by_taps = 4 * k * k / out_width;
    const int64_t rows = 1 + (by_size > by_taps ? by_size : by_taps);
    return rows < out_height ? rows : out_height;
  }
  int64_t sums_per_plane() const { return (out_height + rows_per_sum() - 1) / rows_per_sum(); }

  // Taps in one direction that reach an input pixel, at most.
  int64_t reach() const { return (k + stride - 1) / stride; }

  // Unpacked input rows are split by the remainders of row and column at stride s into s * s groups of `pitch` elements
  // per row; unpacked rows of the output's gradient are not split.
  int64_t input_pitch() const {
    return (larger((width + padding + stride - 1) / stride, out_width + (k - 1) / stride) + 1) * channels;
  }
  int64_t gradient_pitch() const {
    return (larger(out_width, (width - 1 + padding) / stride + 1) + reach()) * channels;
  }

  // Rows that are unpacked and convolved as one: few enough that they stay in the cache (L1 if contiguous), and where
  // single rows are long already, so many that unpacking the k - 1 rows that bands share costs little.
  int64_t band(int64_t pitch, int64_t limit) const {
    const int64_t small = 8192 / (pitch * stride * stride), shared = 65536 / (pitch * stride * stride);
    const int64_t wanted = larger(larger(small, shared < 4 * k ? shared : 4 * k), 1);
    return wanted < limit ? wanted : limit;
  }
  int64_t output_band() const { return band(input_pitch(), out_height); }
  int64_t input_band() const { return band(gradient_pitch(), height); }
  int64_t input_group_rows() const { return output_band() + (k - 1) / stride + 1; }
  int64_t gradient_rows() const { return input_band() / stride + reach() + 2; }

  int64_t plain_row() const { return (larger(width, out_width) + 1) * channels + 16; }
  // Filter values repeated along the channels so that a vector can start at any channel.
  int64_t repeated() const { return channels + 16; }
  // Distance at which vectors of any length meet the same channels again.
  int64_t longest_period() const {
    int64_t period = channels;
    while (period % 16 != 0) period += channels;
    return period;
  }

  // Elements of memory that each loop function needs; unpacked rows have room for a vector behind them.
  int64_t filter_memory() const { return channels * k * k + (k * k + 1) * repeated() + 16; }
  int64_t unpacked_input() const { return stride * stride * input_group_rows() * input_pitch() + k * channels + 16; }
  int64_t unpacked_gradient() const { return gradient_rows() * gradient_pitch() + k * channels + 16; }
  int64_t forward_memory() const {
    return filter_memory() + unpacked_input() + plain_row() + output_band() * input_pitch() + 16;
  }
  int64_t sums_memory() const { return forward_memory() + plain_row() + (k * k + 1) * longest_period(); }
  int64_t input_memory() const {
    return filter_memory() + unpacked_gradient() + stride * (input_band() * gradient_pitch() + 16) + plain_row();
  }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};
