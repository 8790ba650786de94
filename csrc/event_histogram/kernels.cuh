// Stacked event histograms on the GPU, in three launches of which the last is nearly empty for sorted times.
//
// `order` reads the times once: which stretches of events are sorted and, taking them for sorted, where each bin
// starts. `tile`: one block per window, bin and strip of rows counts in shared memory and writes every cell of its
// strip once, 16 bytes at a time, so that nothing is cleared before and no atomic goes to global memory. It reads the
// rows y of its bin's events, 32 per thread and round, and x and p of those that lie in its strip. `count` is for
// windows whose times are not sorted, which `tile` has filled with zeros: one thread per event, by compare-and-swap on
// the word around its counter. Every block that has only sorted windows returns at once.
//
// From DRAM come 13 bytes per event (x, y 2, p 1, t 8) and to it goes one per cell, the least where the order of times
// is not known beforehand; docs/gpu.md has the counts. Counting all events by compare-and-swap on the output, after a
// pass that clears it, reads and writes every sector that an event meets once more.
//
// One launch of 32 registers a thread would do for windows that are known to be sorted. `order` and `count`, 1.2 of 9
// to 25 instructions of a warp per event each, are the price of not believing it. `tile` has 64 registers for the rows
// of a round; at 512 threads that is two blocks per multiprocessor, and so many its 79 KiB of shared memory allow.
#pragma once

#include "event_histogram/tile.cuh"

namespace evkernels {

template <int kBits>
__global__ void __launch_bounds__(kEventThreads)
    event_histogram_count_kernel(EventColumns events, EventWindows windows, HistogramShape shape, int64_t count,
                                 HistogramOrder order, uint32_t* out, unsigned long long* dropped) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t window = window_of_event(windows, e);
  if (order.is_sorted[window]) return;
  const int64_t x = load_integer(events.x, events.x_type, e), y = load_integer(events.y, events.y_type, e);
  const int64_t p = load_integer(events.p, events.p_type, e);
  if (x < 0 || x >= shape.width || y < 0 || y >= shape.height || p < -1 || p > 1) {
    atomicAdd(dropped, 1ull);
    return;
  }
  const int bin =
      bin_of_time(load_time(events, e), {order.first[window], order.last[window]}, static_cast<int>(shape.bins));
  const int64_t plane = (2 * window + (p > 0)) * shape.bins + bin;
  increment_saturating<kBits>(out, static_cast<uint64_t>((plane * shape.height + y) * shape.width + x), shape.cutoff);
}

// `bits` of a counter are 8, 16 or 32; `memory` has HistogramOrder::size(...) elements.
inline void launch_event_histogram(const EventColumns& events, const EventWindows& windows, const HistogramShape& shape,
                                   int bits, int64_t count, long long* memory, uint32_t* out, int64_t* dropped,
                                   cudaStream_t stream) {
  const HistogramOrder order = HistogramOrder::in(memory, windows.count, shape.bins, count);
  unsigned long long* const drops = reinterpret_cast<unsigned long long*>(dropped);
  EVKERNELS_LAUNCH(event_histogram_order_kernel, grid_dimensions(1 + count / (kEventThreads * kEventsPerLane)),
                   dim3(kEventThreads), 0, stream, events, windows, count, static_cast<int>(shape.bins), order, drops);
  if (windows.count == 0) return;
  int64_t tiles;
  const HistogramTile tile = histogram_tile(shape, bits, windows.count, count, tiles);
  const auto launch_both = [&](auto* tile_kernel, auto* count_kernel) {
    const int64_t bytes = 2 * tile.span * bits / 8;
    if (bytes > 48 << 10)
      cudaFuncSetAttribute(tile_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    EVKERNELS_LAUNCH(tile_kernel, grid_dimensions(tiles), dim3(kTileThreads), bytes, stream, events, windows, shape,
                     tile, count, order, out, drops);
    if (count == 0) return;
    EVKERNELS_LAUNCH(count_kernel, grid_dimensions(ceil_div(count, kEventThreads)), dim3(kEventThreads), 0, stream,
                     events, windows, shape, count, order, out, drops);
  };
  if (bits == 8) return launch_both(&event_histogram_tile_kernel<8>, &event_histogram_count_kernel<8>);
  if (bits == 16) return launch_both(&event_histogram_tile_kernel<16>, &event_histogram_count_kernel<16>);
  launch_both(&event_histogram_tile_kernel<32>, &event_histogram_count_kernel<32>);
}

}  // namespace evkernels
