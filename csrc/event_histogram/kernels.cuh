// Stacked event histograms on the GPU, in three launches: clear, first and last time of every window, count.
//
// One thread counts one event, by compare-and-swap on the 32-bit word around its byte of the output: bytes saturate
// without spilling into their neighbours, and no wider counters have to be cleared, converted and moved; prototypes
// modelled at a fifth of the time of int32 atomics. One block per rows and time bin with its tile in shared memory
// modelled another 1.2 to 1.4 times faster at 1280 x 720, but needs to know that the times are sorted.
// Columns keep their integer types; the switch on the type is the same for all threads.
#pragma once

#include "common/device.cuh"
#include "common/device_math.cuh"
#include "event_histogram/columns.h"

namespace evkernels {
namespace device_math {
#include "event_histogram/math.inl"
}  // namespace device_math

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

// `words` is the number of 16-byte words of the output.
__global__ void __launch_bounds__(kEventThreads)
    event_histogram_clear_kernel(EventWindows windows, uint32_t* __restrict__ out, int64_t words,
                                 unsigned long long* dropped) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (k < words) store_packed(out + 4 * k, Packed<uint32_t, 4>{});
  if (k < windows.count) {
    windows.first[k] = INT64_MAX;
    windows.last[k] = INT64_MIN;
  }
  if (k == 0) *dropped = 0;
}

// A warp reduces 32 * kEventsPerLane consecutive events to two atomics, or, where windows meet, uses two per event.
__global__ void __launch_bounds__(kEventThreads)
    event_histogram_times_kernel(EventColumns events, EventWindows windows, int64_t count) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t begin = warp * 32 * kEventsPerLane;
  if (begin >= count) return;
  const int64_t end = begin + 32 * kEventsPerLane < count ? begin + 32 * kEventsPerLane : count;
  const int64_t window = window_of_event(windows, begin);
  if (window != window_of_event(windows, end - 1)) {
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
  for (int distance = 16; distance > 0; distance /= 2) {
    const long long other_first = __shfl_xor_sync(0xffffffffu, first, distance);
    const long long other_last = __shfl_xor_sync(0xffffffffu, last, distance);
    first = other_first < first ? other_first : first;
    last = other_last > last ? other_last : last;
  }
  if (lane == 0) {
    atomicMin(windows.first + window, first);
    atomicMax(windows.last + window, last);
  }
}

__device__ __forceinline__ void increment_saturating(uint32_t* out, int64_t cell, uint32_t cutoff) {
  uint32_t* const word = out + cell / 4;
  const int shift = 8 * static_cast<int>(cell % 4);
  // Counters only grow, so a stale value costs one more round and nothing else.
  uint32_t seen = *word;
  while ((seen >> shift & 255u) < cutoff) {
    const uint32_t before = atomicCAS(word, seen, seen + (1u << shift));
    if (before == seen) return;
    seen = before;
  }
}

__global__ void __launch_bounds__(kEventThreads)
    event_histogram_count_kernel(EventColumns events, EventWindows windows, HistogramShape shape, int64_t count,
                                 uint32_t* out, unsigned long long* dropped) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t x = load_integer(events.x, events.x_type, e), y = load_integer(events.y, events.y_type, e);
  const int64_t p = load_integer(events.p, events.p_type, e);
  if (x < 0 || x >= shape.width || y < 0 || y >= shape.height || p < -1 || p > 1) {
    atomicAdd(dropped, 1ull);
    return;
  }
  const int64_t window = window_of_event(windows, e);
  const int64_t t0 = windows.first[window];
  const int64_t difference = device_math::wrapping_difference(windows.last[window], t0);
  const int64_t since = device_math::wrapping_difference(load_integer(events.t, events.t_type, e), t0);
  const int bin = device_math::event_bin(since, static_cast<float>(difference > 1 ? difference : 1),
                                         static_cast<float>(shape.bins));
  const int64_t plane = (2 * window + (p > 0)) * shape.bins + bin;
  increment_saturating(out, (plane * shape.height + y) * shape.width + x, shape.cutoff);
}

// `out` has room for whole 16-byte words.
inline void launch_event_histogram(const EventColumns& events, const EventWindows& windows, const HistogramShape& shape,
                                   int64_t count, uint32_t* out, int64_t* dropped, cudaStream_t stream) {
  const int64_t words = ceil_div(windows.count * 2 * shape.bins * shape.height * shape.width, 16);
  const int64_t clear_threads = words > windows.count ? words : windows.count;
  unsigned long long* const drops = reinterpret_cast<unsigned long long*>(dropped);
  EVKERNELS_LAUNCH(event_histogram_clear_kernel, grid_dimensions(ceil_div(clear_threads + 1, kEventThreads)),
                   dim3(kEventThreads), 0, stream, windows, out, words, drops);
  if (count == 0 || windows.count == 0) return;
  EVKERNELS_LAUNCH(event_histogram_times_kernel, grid_dimensions(ceil_div(count, kEventThreads * kEventsPerLane)),
                   dim3(kEventThreads), 0, stream, events, windows, count);
  EVKERNELS_LAUNCH(event_histogram_count_kernel, grid_dimensions(ceil_div(count, kEventThreads)), dim3(kEventThreads),
                   0, stream, events, windows, shape, count, out, drops);
}

}  // namespace evkernels
