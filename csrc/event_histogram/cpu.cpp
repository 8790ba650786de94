// Stacked event histograms on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Threads share the (window, bin) pairs, so no two write the same byte and the result does not depend on their number.
// Every window is first taken to be sorted; those found not to be are filled again by the loop for any order.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "event_histogram/host.h"

#define EVKERNELS_LOOPS "event_histogram/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Work per task, in events plus eighths of a byte to clear: about 30 us, well above the cost of waking a thread.
constexpr int64_t kGrain = 16384;

// One (window, bin) pair: written by one thread only.
struct Task {
  int64_t dropped = 0;
  bool is_unsorted = false;
};

template <class T>
int64_t fill(const T* t, const EventColumns& events, const HistogramShape& shape, const std::vector<int64_t>& offsets,
             uint8_t* out) {
  const int64_t windows = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t window_size = 2 * shape.bins * shape.height * shape.width;
  std::vector<Task> tasks(windows * shape.bins);
  std::vector<uint8_t> is_unsorted(windows, 0);
  const int64_t work = offsets.back() + windows * window_size / 8;
  const int64_t grain = std::max<int64_t>(1, kGrain * static_cast<int64_t>(tasks.size()) / std::max<int64_t>(work, 1));

  // Calls f(window, first bin, last bin, first task) for the parts of windows that a range of tasks covers.
  const auto for_each_window = [&](int64_t begin, int64_t end, const auto& f) {
    while (begin < end) {
      const int64_t window = begin / shape.bins;
      const int64_t stop = std::min(end, (window + 1) * shape.bins);
      f(window, begin - window * shape.bins, stop - window * shape.bins, tasks[begin]);
      begin = stop;
    }
  };
  torch::stable::parallel_for(0, tasks.size(), grain, [&](int64_t begin, int64_t end) {
    for_each_window(begin, end, [&](int64_t w, int64_t first_bin, int64_t last_bin, Task& task) {
      task.is_unsorted = !EVKERNELS_CALL(fill_sorted, t, events, shape, offsets[w], offsets[w + 1], first_bin, last_bin,
                                         out + w * window_size, task.dropped);
    });
  });
  bool any_unsorted = false;
  for (size_t k = 0; k < tasks.size(); ++k) any_unsorted |= is_unsorted[k / shape.bins] |= tasks[k].is_unsorted;
  if (any_unsorted) {
    for (size_t k = 0; k < tasks.size(); ++k) {
      if (is_unsorted[k / shape.bins]) tasks[k].dropped = 0;
    }
    torch::stable::parallel_for(0, tasks.size(), grain, [&](int64_t begin, int64_t end) {
      for_each_window(begin, end, [&](int64_t w, int64_t first_bin, int64_t last_bin, Task& task) {
        if (!is_unsorted[w]) return;
        EVKERNELS_CALL(fill_unsorted, t, events, shape, offsets[w], offsets[w + 1], first_bin, last_bin,
                       out + w * window_size, task.dropped);
      });
    });
  }
  int64_t dropped = 0;
  for (const Task& task : tasks) dropped += task.dropped;
  return dropped;
}

std::tuple<Tensor, Tensor> event_histogram(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                           int64_t bins, int64_t height, int64_t width, int64_t cutoff) {
  const EventColumns events = event_columns(x, y, t, p);
  const HistogramShape shape = histogram_shape(bins, height, width, cutoff);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  Tensor histogram = torch::stable::empty(histogram_sizes(offsets, shape), ScalarType::Byte, std::nullopt, x.device());
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, x.device());
  const auto fill_by_time = [&](auto time) {
    using T = typename decltype(time)::type;
    return fill(data<T>(t), events, shape, windows, mutable_data<uint8_t>(histogram));
  };
  *mutable_data<int64_t>(dropped) =
      events.t_type == IntType::kInt64 ? fill_by_time(Type<int64_t>{}) : fill_by_time(Type<int32_t>{});
  return {histogram, dropped};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) { m.impl("event_histogram", TORCH_BOX(&evkernels::event_histogram)); }
