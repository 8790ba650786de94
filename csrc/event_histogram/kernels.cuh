// Stacked event histograms on the GPU, in three launches: clear, first and last time of every window, count.
//
// One thread counts one event, by compare-and-swap on the 32-bit word around its counter of the output: bytes saturate
// without spilling into their neighbours, and no wider counters have to be cleared, converted and moved; prototypes
// modelled at a fifth of the time of int32 atomics. One block per rows and time bin with its tile in shared memory
// modelled another 1.2 to 1.4 times faster at 1280 x 720, but needs to know that the times are sorted.
#pragma once

#include "common/device_math.cuh"
#include "common/event_windows.cuh"
#include "event_histogram/columns.h"

namespace evkernels {
namespace device_math {
#include "event_histogram/math.inl"
}  // namespace device_math

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

template <int kBits>
__device__ __forceinline__ void increment_saturating(uint32_t* out, int64_t cell, uint32_t cutoff) {
  constexpr int kCounters = 32 / kBits;  // in a word
  constexpr uint32_t kMask = 0xffffffffu >> (32 - kBits);
  uint32_t* const word = out + cell / kCounters;
  const int shift = kBits * static_cast<int>(cell % kCounters);
  // Counters only grow, so a stale value costs one more round and nothing else.
  uint32_t seen = *word;
  while ((seen >> shift & kMask) < cutoff) {
    const uint32_t before = atomicCAS(word, seen, seen + (1u << shift));
    if (before == seen) return;
    seen = before;
  }
}

template <int kBits>
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
  const int64_t difference = wrapping_difference(windows.last[window], t0);
  const int64_t since = wrapping_difference(load_integer(events.t, events.t_type, e), t0);
  const int bin = device_math::event_bin(since, static_cast<float>(difference > 1 ? difference : 1),
                                         static_cast<float>(shape.bins));
  const int64_t plane = (2 * window + (p > 0)) * shape.bins + bin;
  increment_saturating<kBits>(out, (plane * shape.height + y) * shape.width + x, shape.cutoff);
}

// `bits` of a counter are 8, 16 or 32; `out` has room for whole 16-byte words.
inline void launch_event_histogram(const EventColumns& events, const EventWindows& windows, const HistogramShape& shape,
                                   int bits, int64_t count, uint32_t* out, int64_t* dropped, cudaStream_t stream) {
  const int64_t words = ceil_div(windows.count * 2 * shape.bins * shape.height * shape.width, 128 / bits);
  const int64_t clear_threads = words > windows.count ? words : windows.count;
  unsigned long long* const drops = reinterpret_cast<unsigned long long*>(dropped);
  EVKERNELS_LAUNCH(event_histogram_clear_kernel, grid_dimensions(ceil_div(clear_threads + 1, kEventThreads)),
                   dim3(kEventThreads), 0, stream, windows, out, words, drops);
  if (count == 0 || windows.count == 0) return;
  launch_event_times(events, windows, count, stream);
  const auto launch_count = [&](auto* kernel) {
    EVKERNELS_LAUNCH(kernel, grid_dimensions(ceil_div(count, kEventThreads)), dim3(kEventThreads), 0, stream, events,
                     windows, shape, count, out, drops);
  };
  if (bits == 8) return launch_count(&event_histogram_count_kernel<8>);
  if (bits == 16) return launch_count(&event_histogram_count_kernel<16>);
  launch_count(&event_histogram_count_kernel<32>);
}

}  // namespace evkernels
