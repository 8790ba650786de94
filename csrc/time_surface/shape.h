// Sizes of a time surface. No torch headers.
#pragma once

#include <cstdint>

struct SurfaceShape {
  int64_t polarities;     // 1 or 2
  int64_t height, width;  // each below 2^31
};

// On a surface of last times: no event came.
constexpr int64_t kNever = INT64_MIN;
