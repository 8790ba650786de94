// Voxel grids on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Threads share the bins. Of 5 bins two threads take 3 and 2, which is 0.72 and 0.43 of the work of one thread at
// 640x480 and 1e6 evenly spread events: both read the events between their bins. What else was tried there, as times of
// one thread divided by those of the slower of two, where this split has 1.4:
// - Stripes of 16 rows, events chosen block by block: 1.2. All events are read twice, and no planes are paired.
// - The events after the bin that two threads share in a second step, each adding half of the cells: 1.2.
// - First the events between the bins 1 and 2, 3 and 4, ..., then those between 0 and 1, 2 and 3, ...: 1.9, each event
//   is read once and no two threads share a plane. But odd bins are then summed in another order, on one thread too,
//   where cells are less often in cache and planes cannot be paired: that takes 1.05 times as long.

#include <torch/csrc/stable/library.h>

#include "common/event_tasks.h"
#include "voxel_grid/host.h"

#define EVKERNELS_LOOPS "voxel_grid/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

template <class T, class R>
int64_t fill_all(const T* t, const VoxelColumns& columns, const PixelMap& map, const VoxelShape& shape,
                 const std::vector<int64_t>& offsets, R* out) {
  const int64_t window_size = shape.channels() * shape.height * shape.width;
  return fill_windows(offsets, shape.bins, window_size * static_cast<int64_t>(sizeof(R)),
                      [&](int64_t w, int64_t first_bin, int64_t last_bin, bool sorted, int64_t& dropped) {
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
