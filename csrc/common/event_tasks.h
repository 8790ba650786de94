// Threads over windows of events and their time bins, on the CPU.
//
// Threads share the (window, bin) pairs, so no two write the same cell and the result does not depend on their number.
// Every window is first taken to be sorted; those found not to be are filled again in any order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace evkernels {

// Calls fill(window, first bin, last bin, is sorted, dropped) until every window's bins are filled, and returns the sum
// of what the calls add to `dropped`. With `is sorted` a call returns false if it meets a time smaller than its
// predecessor; its window is then filled again. Window w is the events offsets[w] to offsets[w + 1].
template <class Fill>
int64_t fill_windows(const std::vector<int64_t>& offsets, int64_t bins, int64_t bytes_per_window, const Fill& fill) {
  // Work per task, in events plus eighths of a byte to clear: about 30 us, well above the cost of waking a thread.
  constexpr int64_t kGrain = 16384;
  // One (window, bin) pair: written by one thread only.
  struct Task {
    int64_t dropped = 0;
    bool is_unsorted = false;
  };
  const int64_t windows = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<Task> tasks(windows * bins);
  std::vector<uint8_t> is_unsorted(windows, 0);
  const int64_t work = offsets.back() + windows * bytes_per_window / 8;
  const int64_t grain = std::max<int64_t>(1, kGrain * static_cast<int64_t>(tasks.size()) / std::max<int64_t>(work, 1));

  // Calls f(window, first bin, last bin, first task) for the parts of windows that a range of tasks covers.
  const auto for_each_window = [&](int64_t begin, int64_t end, const auto& f) {
    while (begin < end) {
      const int64_t window = begin / bins;
      const int64_t stop = std::min(end, (window + 1) * bins);
      f(window, begin - window * bins, stop - window * bins, tasks[begin]);
      begin = stop;
    }
  };
  torch::stable::parallel_for(0, tasks.size(), grain, [&](int64_t begin, int64_t end) {
    for_each_window(begin, end, [&](int64_t w, int64_t first_bin, int64_t last_bin, Task& task) {
      task.is_unsorted = !fill(w, first_bin, last_bin, true, task.dropped);
    });
  });
  bool any_unsorted = false;
  for (size_t k = 0; k < tasks.size(); ++k) any_unsorted |= is_unsorted[k / bins] |= tasks[k].is_unsorted;
  if (any_unsorted) {
    for (size_t k = 0; k < tasks.size(); ++k) {
      if (is_unsorted[k / bins]) tasks[k].dropped = 0;
    }
    torch::stable::parallel_for(0, tasks.size(), grain, [&](int64_t begin, int64_t end) {
      for_each_window(begin, end, [&](int64_t w, int64_t first_bin, int64_t last_bin, Task& task) {
        if (is_unsorted[w]) fill(w, first_bin, last_bin, false, task.dropped);
      });
    });
  }
  int64_t dropped = 0;
  for (const Task& task : tasks) dropped += task.dropped;
  return dropped;
}

}  // namespace evkernels
