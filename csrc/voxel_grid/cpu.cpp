// Voxel grids on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Threads share windows, and of small ones the bins. A large one that is sorted by time is filled in two steps: first
// from the events before bin 0 and between the bins 1 and 2, 3 and 4, ..., then from those between 0 and 1, 2 and 3,
// .... In each step every event is read once and no two threads share a plane: of 5 bins at 640x480 and 1e6 evenly
// spread events two threads take 1/1.9 of the time of one. What else was tried there:
// - Bins shared as of small windows: 1/1.4, because two threads read the events between their bins. On one thread it
//   takes 0.95 of the time, where planes are more often in cache.
// - Stripes of 16 rows, events chosen block by block: 1/1.2. All events are read twice, and no planes are paired.
// - The events after the bin that two threads share in a second step, each adding half of the cells: 1/1.2.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "common/event_tasks.h"
#include "voxel_grid/host.h"

#define EVKERNELS_LOOPS "voxel_grid/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// What is worth sharing between threads: events plus eighths of a byte to clear, eight tasks of fill_windows.
constexpr int64_t kLarge = 1 << 17;

// The bins of one parity's intervals for each of so many threads: thread k has [result[k], result[k + 1]). The events
// between the bins b and b + 1 are the work of both, one half each.
std::vector<int64_t> share_bins(const std::vector<int64_t>& starts, int64_t parity, int64_t pixels, int64_t threads) {
  const int64_t bins = static_cast<int64_t>(starts.size()) - 2;
  std::vector<int64_t> work(bins + 1, 0);  // of the bins before
  for (int64_t bin = 0; bin < bins; ++bin) {
    const int64_t interval = bin - (bin + parity) % 2;
    work[bin + 1] = work[bin] + starts[interval + 2] - starts[interval + 1] + pixels / 4;
  }
  std::vector<int64_t> first(threads + 1, bins);
  for (int64_t thread = 0, bin = 0; thread < threads; ++thread) {
    while (bin < bins && (work[bin] + work[bin + 1]) * threads < 2 * thread * work[bins]) ++bin;
    first[thread] = bin;
  }
  return first;
}

// Fills a large window that is sorted by time: first from the events between bin 0 and its predecessor, 1 and 2, 3 and
// 4, ..., then from those between 0 and 1, 2 and 3, .... Returns false, with the window in any state, if it is not
// sorted.
template <class T, class R>
bool fill_large(const T* t, const VoxelColumns& columns, const PixelMap& map, const VoxelShape& shape, int64_t begin,
                int64_t end, R* window, int64_t& dropped) {
  std::vector<int64_t> starts(shape.bins + 2);
  if (!EVKERNELS_CALL(find_intervals, t, shape, begin, end, starts.data())) return false;
  std::atomic<bool> is_sorted{true};
  std::atomic<int64_t> outside{0};
  // Adds the intervals of one parity to the bins [bin, last).
  const auto fill_bins = [&](int64_t bin, int64_t last, int64_t parity) {
    while (bin < last) {
      const int64_t interval = bin - (bin + parity) % 2;
      const int64_t stop = std::min(last, interval + 2);
      int64_t own = 0;
      if (!EVKERNELS_CALL(fill_interval, t, columns, map, shape, begin, end, starts[interval + 1], starts[interval + 2],
                          bin, stop, parity == 1, window, own))
        is_sorted = false;
      outside += own;
      bin = stop;
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1) {
    // The same bits, from planes that are more often in cache.
    for (int64_t bin = 0; bin <= shape.bins + 1; bin += 2) {
      fill_bins(std::max<int64_t>(bin - 1, 0), std::min(bin + 1, shape.bins), 1);
      fill_bins(std::max<int64_t>(bin - 2, 0), std::min(bin, shape.bins), 0);
    }
  } else {
    for (const int64_t parity : {1, 0}) {
      const std::vector<int64_t> first = share_bins(starts, parity, shape.height * shape.width, threads);
      torch::stable::parallel_for(0, threads, 1,
                                  [&](int64_t begin, int64_t end) { fill_bins(first[begin], first[end], parity); });
    }
  }
  if (is_sorted) dropped += outside;
  return is_sorted;
}

template <class T, class R>
int64_t fill_all(const T* t, const VoxelColumns& columns, const PixelMap& map, const VoxelShape& shape,
                 const std::vector<int64_t>& offsets, R* out) {
  const int64_t window_size = shape.channels() * shape.height * shape.width;
  const int64_t bytes = window_size * static_cast<int64_t>(sizeof(R));
  const int64_t windows = static_cast<int64_t>(offsets.size()) - 1;
  enum State : uint8_t { kSmall, kFilled, kUnsorted };
  std::vector<uint8_t> state(windows, kSmall);
  int64_t dropped_by_large = 0;
  for (int64_t w = 0; w < windows; ++w) {
    if (offsets[w + 1] - offsets[w] + bytes / 8 < kLarge) continue;
    const bool is_filled =
        fill_large(t, columns, map, shape, offsets[w], offsets[w + 1], out + w * window_size, dropped_by_large);
    state[w] = is_filled ? kFilled : kUnsorted;
  }
  return dropped_by_large +
         fill_windows(offsets, shape.bins, bytes,
                      [&](int64_t w, int64_t first_bin, int64_t last_bin, bool sorted, int64_t& dropped) {
                        if (sorted && state[w] != kSmall) return state[w] == kFilled;
                        return EVKERNELS_CALL(fill, t, columns, map, shape, offsets[w], offsets[w + 1], first_bin,
                                              last_bin, sorted, out + w * window_size, dropped);
                      });
}

// The grid goes into `grid`; returns how many events were dropped.
Tensor fill_grid(const VoxelColumns& columns, const PixelMap& map, const VoxelShape& shape,
                 const std::vector<int64_t>& windows, const std::optional<Tensor>& weight, Tensor& grid) {
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, grid.device());
  dispatch_grid(weight, [&](auto value) {
    dispatch_time(columns, [&](auto time) {
      using R = typename decltype(value)::type;
      using T = typename decltype(time)::type;
      const T* const t = static_cast<const T*>(columns.events.t);
      *mutable_data<int64_t>(dropped) = fill_all(t, columns, map, shape, windows, mutable_data<R>(grid));
    });
  });
  return dropped;
}

std::tuple<Tensor, Tensor> voxel_grid(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> weight,
                                      std::optional<Tensor> offsets, int64_t bins, int64_t height, int64_t width,
                                      std::string convention, bool) {
  const VoxelColumns columns = voxel_columns(x, y, t, p, weight);
  const VoxelShape shape = voxel_shape(bins, height, width, convention);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  Tensor grid = torch::stable::empty(voxel_sizes(offsets, shape), grid_type(weight), std::nullopt, x.device());
  const PixelMap map{height, width, nullptr, nullptr};
  return {grid, fill_grid(columns, map, shape, windows, weight, grid)};
}

// The same into a tensor of the caller, through a map of pixels.
Tensor voxel_grid_into(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> weight,
                       std::optional<Tensor> offsets, std::optional<Tensor> pixels, Tensor out, int64_t bins,
                       std::string convention, bool) {
  const VoxelColumns columns = voxel_columns(x, y, t, p, weight);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  check_out(out, offsets, window_count(offsets));
  const VoxelShape shape = voxel_shape(bins, out.size(-2), out.size(-1), convention);
  STD_TORCH_CHECK(out.size(-3) == shape.channels() && out.scalar_type() == grid_type(weight),
                  "out must have the grid's channels and the dtype of weight, or float32");
  STD_TORCH_CHECK(!pixels.has_value() || columns.xy_type == RealType::kNone, "pixel_map needs integer x and y");
  const PixelMap map = pixel_map(pixels, shape.height, shape.width, convention == "dsec");
  return fill_grid(columns, map, shape, windows, weight, out);
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("voxel_grid", TORCH_BOX(&evkernels::voxel_grid));
  m.impl("voxel_grid_into", TORCH_BOX(&evkernels::voxel_grid_into));
}
