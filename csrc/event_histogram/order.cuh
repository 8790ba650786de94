// What event_histogram finds out about the order of its events: which stretches are sorted, and where each bin starts.
#pragma once

#include "common/device_math.cuh"
#include "common/event_windows.cuh"

namespace evkernels {
namespace device_math {
#include "event_histogram/math.inl"
}  // namespace device_math

// Events in the stretches that a warp of `order` looks at.
constexpr int kHistogramStretch = 32 * kEventsPerLane;
// What `order` and `tile` find out, as one array of 64-bit integers.
struct HistogramOrder {
  long long* begins;     // [B, bins + 1] the first event of each bin, and the end of the window
  long long* first;      // [B] of unsorted windows
  long long* last;       // [B]
  long long* is_sorted;  // [B]
  long long* stretches;  // [3, S] first and last time, and whether sorted
  int64_t stretch_count;

  static int64_t size(int64_t windows, int64_t bins, int64_t events) {
    return windows * (bins + 4) + 3 * ceil_div(events, kHistogramStretch);
  }
  static HistogramOrder in(long long* memory, int64_t windows, int64_t bins, int64_t events) {
    long long* const rest = memory + windows * (bins + 1);
    return {memory, rest, rest + windows, rest + 2 * windows, rest + 3 * windows, ceil_div(events, kHistogramStretch)};
  }
};

// Where a window lies, within [0, count] whatever `offsets` holds.
struct EventRange {
  int64_t begin, end;
};
__device__ __forceinline__ EventRange range_of_window(const EventWindows& windows, int64_t window, int64_t count) {
  if (!windows.offsets) return {0, count};
  const int64_t begin = windows.offsets[window], end = windows.offsets[window + 1];
  return {begin < 0 ? 0 : begin < count ? begin : count, end < 0 ? 0 : end < count ? end : count};
}
// The same for the window of event e, which is inside of it even where `offsets` is no partition.
__device__ __forceinline__ EventRange range_of_window(const EventWindows& windows, int64_t window, int64_t count,
                                                      int64_t e) {
  const EventRange range = range_of_window(windows, window, count);
  return {range.begin < e ? range.begin : e, range.end > e ? range.end : e + 1};
}

__device__ __forceinline__ long long load_time(const EventColumns& events, int64_t e) {
  return events.t_type == IntType::kInt32 ? static_cast<const int32_t*>(events.t)[e]
                                          : static_cast<const int64_t*>(events.t)[e];
}

struct WindowTimes {
  long long first, last;
};
__device__ __forceinline__ WindowTimes times_if_sorted(const EventColumns& events, const EventRange& range) {
  return {load_time(events, range.begin), load_time(events, range.end - 1)};
}

__device__ __forceinline__ int bin_of_time(long long t, const WindowTimes& times, int bins) {
  const int64_t difference = wrapping_difference(times.last, times.first);
  return device_math::event_bin(wrapping_difference(t, times.first),
                                static_cast<float>(difference > 1 ? difference : 1), static_cast<float>(bins));
}

static __global__ void __launch_bounds__(kEventThreads)
    event_histogram_order_kernel(EventColumns events, EventWindows windows, int64_t count, int bins,
                                 HistogramOrder order, unsigned long long* dropped) {
  const int64_t stretch = (static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (stretch == 0 && lane == 0) *dropped = 0;
  if (stretch >= order.stretch_count) return;
  const int64_t from = stretch * kHistogramStretch;
  const int64_t until = from + kHistogramStretch < count ? from + kHistogramStretch : count;
  const int64_t window = window_of_event(windows, from);
  const bool is_one_window = window == window_of_event(windows, until - 1);
  const EventRange range = range_of_window(windows, window, count, from);
  bool sorted = true, has_border = true;
  long long first = INT64_MAX, last = INT64_MIN;
  if (is_one_window) {
#pragma unroll
    for (int k = 0; k < kEventsPerLane; ++k) {
      const int64_t e = from + lane + 32 * k;
      if (e >= until) break;
      const long long t = load_time(events, e);
      first = t < first ? t : first;
      last = t > last ? t : last;
      if (e > range.begin) sorted &= load_time(events, e - 1) <= t;
    }
    const WindowTimes times = times_if_sorted(events, range);
    has_border =
        from == range.begin || until == range.end ||
        bin_of_time(load_time(events, from - 1), times, bins) != bin_of_time(load_time(events, until - 1), times, bins);
  }
#pragma unroll 1
  for (int64_t e = has_border ? from + lane : until; e < until; e += 32) {
    const int64_t own_window = window_of_event(windows, e);
    const EventRange own = range_of_window(windows, own_window, count, e);
    const WindowTimes times = times_if_sorted(events, own);
    // Over more than 63 bits the bins of sorted times are not sorted.
    sorted &= wrapping_difference(times.last, times.first) >= 0;
    const long long t = load_time(events, e);
    int before = -1;
    if (e > own.begin) {
      const long long t_before = load_time(events, e - 1);
      sorted &= t_before <= t;
      before = bin_of_time(t_before, times, bins);
    }
    const int bin = bin_of_time(t, times, bins);
    long long* const begins = order.begins + own_window * (bins + 1);
    for (int b = before + 1; b <= bin; ++b) begins[b] = e;
    if (e == own.end - 1) {
      for (int b = bin + 1; b <= bins; ++b) begins[b] = own.end;
    }
  }
  reduce_times(first, last);
  sorted = __all_sync(0xffffffffu, sorted);
  if (lane == 0) {
    order.stretches[stretch] = first;
    order.stretches[order.stretch_count + stretch] = last;
    order.stretches[2 * order.stretch_count + stretch] = sorted;
  }
}

}  // namespace evkernels
