// Sizes of the maps that a 3x3 convolution with zero padding runs over; plain numbers, for host and loops alike.
//
// Inside the kernels a map is [height][width][channels], which squares of 2x2 pixels cover; where a size is odd, the
// last ones reach out of it.
#pragma once

#include <cstdint>

struct Maps {
  int64_t batch, height, width;

  int64_t pixels() const { return height * width; }
  int64_t rows() const { return batch * height; }
  int64_t square_rows() const { return (height + 1) / 2; }
  int64_t square_columns() const { return (width + 1) / 2; }
  int64_t squares() const { return batch * square_rows() * square_columns(); }
};

// A convolution of one or two inputs, one behind the other in the weight's columns, to `gates` times `channels`.
struct WinogradShape {
  Maps maps;
  int64_t inputs[2];
  int64_t channels;
  int gates;
};
