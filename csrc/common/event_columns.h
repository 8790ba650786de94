// The events as the kernels see them: pointers to columns of any integer type. No torch headers.
#pragma once

#include <cstdint>

// bool is read as kUInt8.
enum class IntType : int32_t { kInt8, kUInt8, kInt16, kUInt16, kInt32, kUInt32, kInt64, kUInt64 };

struct EventColumns {
  const void* x;  // [E]
  const void* y;  // [E]
  const void* t;  // [E], kInt32 or kInt64
  const void* p;  // [E]
  IntType x_type, y_type, t_type, p_type;
};

// Where the pixels of the sensor lie in the image; without a table they are the image's pixels. A pixel's cell is
// y * width + x of the image, and events of pixels whose cell is outside the image are left out.
struct PixelMap {
  int64_t height, width;  // of the sensor, each below 2^31
  const int32_t* cells;   // [height, width], or null
  const float* places;    // [height, width, 2], x and y in the image between its pixels (voxel_grid only), or null
};
