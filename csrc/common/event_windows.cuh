// Windows of events on the GPU: which one an event belongs to, and the first and last time of each.
// Columns keep their integer types; the switch on the type is the same for all threads.
#pragma once

#include "common/device.cuh"
#include "common/event_columns.h"

namespace evkernels {

constexpr int kEventThreads = 256;
constexpr int kEventsPerLane =
    8;  // Of the pass over t: divides the number of atomics on a window's first and last time.

// The windows of a batch. Null offsets mean one window of all events.
struct EventWindows {
  const int64_t* offsets;  // [B + 1]
  int64_t count;           // B
  long long* first;        // [B]
  long long* last;         // [B]
};

__device__ __forceinline__ int64_t load_integer(const void* column, IntType type, int64_t e) {
  switch (type) {
    case IntType::kInt8:
      return static_cast<const int8_t*>(column)[e];
    case IntType::kUInt8:
      return static_cast<const uint8_t*>(column)[e];
    case IntType::kInt16:
      return static_cast<const int16_t*>(column)[e];
    case IntType::kUInt16:
      return static_cast<const uint16_t*>(column)[e];
    case IntType::kInt32:
      return static_cast<const int32_t*>(column)[e];
    case IntType::kUInt32:
      return static_cast<const uint32_t*>(column)[e];
    default:
      // Beyond 2^63 an unsigned value reads as negative: out of range as well.
      return static_cast<const int64_t*>(column)[e];
  }
}

// The last window that starts at or before event e; within [0, count) whatever `offsets` holds.
__device__ __forceinline__ int64_t window_of_event(const EventWindows& windows, int64_t e) {
  int64_t low = 0, high = windows.count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (windows.offsets[middle] <= e ? low : high) = middle;
  }
  return low;
}

// a - b that wraps instead of overflowing.
__device__ __forceinline__ int64_t wrapping_difference(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}

// The smallest first and the largest last time of a warp's lanes, all of which take part.
__device__ __forceinline__ void reduce_times(long long& first, long long& last) {
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) {
    const long long other_first = __shfl_xor_sync(0xffffffffu, first, distance);
    const long long other_last = __shfl_xor_sync(0xffffffffu, last, distance);
    first = other_first < first ? other_first : first;
    last = other_last > last ? other_last : last;
  }
}

// A warp reduces 32 * kEventsPerLane consecutive events to two atomics, or, where windows meet, uses two per event.
static __global__ void __launch_bounds__(kEventThreads)
    event_times_kernel(EventColumns events, EventWindows windows, int64_t count) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t begin = warp * 32 * kEventsPerLane;
  if (begin >= count) return;
  const int64_t end = begin + 32 * kEventsPerLane < count ? begin + 32 * kEventsPerLane : count;
  const int64_t window = window_of_event(windows, begin);
  if (window != window_of_event(windows, end - 1)) {
    // nvcc 13 makes 200 copies of this loop's body for sm_100.
#pragma unroll 1
    for (int64_t e = begin + lane; e < end; e += 32) {
      const long long t = load_integer(events.t, events.t_type, e);
      const int64_t own = window_of_event(windows, e);
      atomicMin(windows.first + own, t);
      atomicMax(windows.last + own, t);
    }
    return;
  }
  long long first = INT64_MAX, last = INT64_MIN;
  for (int64_t e = begin + lane; e < end; e += 32) {
    const long long t = load_integer(events.t, events.t_type, e);
    first = t < first ? t : first;
    last = t > last ? t : last;
  }
  reduce_times(first, last);
  if (lane == 0) {
    atomicMin(windows.first + window, first);
    atomicMax(windows.last + window, last);
  }
}

// Fills windows.first and windows.last, which must hold INT64_MAX and INT64_MIN before.
inline void launch_event_times(const EventColumns& events, const EventWindows& windows, int64_t count,
                               cudaStream_t stream) {
  EVKERNELS_LAUNCH(event_times_kernel, grid_dimensions(ceil_div(count, kEventThreads * kEventsPerLane)),
                   dim3(kEventThreads), 0, stream, events, windows, count);
}

}  // namespace evkernels
