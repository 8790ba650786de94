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
