// Stacked event histograms on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Threads share the bins of all windows, and the rows of a large window of one bin where windows are fewer than
// threads: on two busy cores of a Zen 3 two threads are 1.3 to 2.5 times as fast as one there (`python -m benchmarks
// threads event_histogram`). An image for each thread and the sum of them gained nothing.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "common/event_rows.h"
#include "common/event_tasks.h"
#include "event_histogram/host.h"

#define EVKERNELS_LOOPS "event_histogram/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Counts the events [begin, end) of a window of one bin; returns how many were dropped.
template <class C>
int64_t fill_shared(const EventColumns& events, const PixelMap& map, const HistogramShape& shape, int64_t begin,
                    int64_t end, C* window) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), kMostRowThreads);
  const int64_t row_work = shape.width * static_cast<int64_t>(sizeof(C)) / 32;
  const std::vector<int64_t> borders = share_rows(events, shape.height, begin, end, row_work, threads);
  std::vector<int64_t> dropped(threads, 0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    if (borders[first] == borders[last]) return;
    dropped[first] = EVKERNELS_CALL(fill_rows, events, map, shape, begin, end, borders[first], borders[last], window);
  });
  return std::accumulate(dropped.begin(), dropped.end(), int64_t{0});
}

template <class T, class C>
int64_t fill(const T* t, const EventColumns& events, const PixelMap& map, const HistogramShape& shape,
             const std::vector<int64_t>& offsets, C* out) {
  const int64_t window_size = 2 * shape.bins * shape.height * shape.width;
  const int64_t windows = static_cast<int64_t>(offsets.size()) - 1;
  int64_t dropped_by_shared = 0;
  std::vector<uint8_t> is_filled(windows, 0);
  if (shape.bins == 1 && windows < torch::stable::get_num_threads() && has_sensor_rows(events, map)) {
    for (int64_t w = 0; w < windows; ++w) {
      is_filled[w] = offsets[w + 1] - offsets[w] >= kSharedWindow;
      if (!is_filled[w]) continue;
      dropped_by_shared += fill_shared(events, map, shape, offsets[w], offsets[w + 1], out + w * window_size);
    }
  }
  return dropped_by_shared +
         fill_windows(offsets, shape.bins, window_size,
                      [&](int64_t w, int64_t first_bin, int64_t last_bin, bool sorted, int64_t& dropped) {
                        if (is_filled[w]) return true;
                        C* const window = out + w * window_size;
                        if (sorted)
                          return EVKERNELS_CALL(fill_sorted, t, events, map, shape, offsets[w], offsets[w + 1],
                                                first_bin, last_bin, window,
                                                w + 1 < windows ? window + window_size : nullptr, dropped);
                        EVKERNELS_CALL(fill_unsorted, t, events, map, shape, offsets[w], offsets[w + 1], first_bin,
                                       last_bin, window, dropped);
                        return true;
                      });
}

// Fills the counters, of whichever type, and returns how many events were dropped.
Tensor fill_counters(const EventColumns& events, const PixelMap& map, const HistogramShape& shape,
                     const std::vector<int64_t>& windows, Tensor& counters) {
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, counters.device());
  const auto fill_by_counter = [&](auto time, auto counter) {
    using T = typename decltype(time)::type;
    using C = typename decltype(counter)::type;
    return fill(static_cast<const T*>(events.t), events, map, shape, windows, mutable_data<C>(counters));
  };
  const auto fill_by_time = [&](auto time) {
    switch (counters.scalar_type()) {
      case ScalarType::Byte:
        return fill_by_counter(time, Type<uint8_t>{});
      case ScalarType::Short:
        return fill_by_counter(time, Type<int16_t>{});
      case ScalarType::Int:
        return fill_by_counter(time, Type<int32_t>{});
      default:
        return fill_by_counter(time, Type<float>{});
    }
  };
  *mutable_data<int64_t>(dropped) =
      events.t_type == IntType::kInt64 ? fill_by_time(Type<int64_t>{}) : fill_by_time(Type<int32_t>{});
  return dropped;
}

std::tuple<Tensor, Tensor> event_histogram(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                           int64_t bins, int64_t height, int64_t width, int64_t cutoff, int64_t bits) {
  const EventColumns events = event_columns(x, y, t, p);
  const HistogramShape shape = histogram_shape(bins, height, width, cutoff, bits);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  Tensor histogram =
      torch::stable::empty(histogram_sizes(offsets, shape), counter_dtype(bits), std::nullopt, x.device());
  const PixelMap map{height, width, nullptr, nullptr};
  return {histogram, fill_counters(events, map, shape, windows, histogram)};
}

// The same into a tensor of the caller, through a map of pixels.
Tensor event_histogram_into(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                            std::optional<Tensor> pixels, Tensor out, int64_t bins, int64_t cutoff) {
  const EventColumns events = event_columns(x, y, t, p);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  check_out(out, offsets, window_count(offsets));
  const int64_t height = out.size(-2), width = out.size(-1);
  const HistogramShape shape = histogram_shape(bins, height, width, cutoff, counter_bits(out.scalar_type()));
  STD_TORCH_CHECK(out.size(-3) == 2 * bins, "out must have 2 * bins channels");
  return fill_counters(events, pixel_map(pixels, height, width), shape, windows, out);
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("event_histogram", TORCH_BOX(&evkernels::event_histogram));
  m.impl("event_histogram_into", TORCH_BOX(&evkernels::event_histogram_into));
}
