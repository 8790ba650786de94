// Sizes of one depthwise-separable convolution; plain numbers, for host and loops alike.
#pragma once

#include <cstdint>

#include "common/activation.h"

struct SeparableShape {
  int64_t batch, channels, outputs;
  int64_t height, width, out_height, out_width;
  int64_t size, stride, padding;  // of the depthwise window
  Activation activation, output_activation;
};

// The arrays that all tiles of one backward pass share. `pre` is the output before its activation, or null; `panels`,
// the pointwise weight for the product with `d_output`, is for channels_last.
template <class T, class R>
struct SeparableBackward {
  const T *d_output, *x, *pre;
  const R* panels;
};
