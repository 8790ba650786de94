// Sizes of one blurred soft pooling; plain numbers, for host and loops alike.
#pragma once

#include <cstdint>

struct SoftPoolShape {
  int64_t planes, height, width, out_height, out_width;
  int64_t stride;  // of the 2 x 2 window
  double temperature;
};
