// Voxel grids on CUDA tensors: tensors to pointers, stream, registration. The kernels are in kernels.cuh.

#include "common/cuda_host.h"
#include "voxel_grid/host.h"
#include "voxel_grid/kernels.cuh"

namespace evkernels {
namespace {

std::tuple<Tensor, Tensor> voxel_grid(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> weight,
                                      std::optional<Tensor> offsets, int64_t bins, int64_t height, int64_t width,
                                      std::string convention, bool deterministic) {
  const VoxelColumns columns = voxel_columns(x, y, t, p, weight);
  const VoxelShape shape = voxel_shape(bins, height, width, convention);
  const int64_t count = window_count(offsets);
  const auto device = x.device();
  const DeviceScope scope(x);
  if (offsets.has_value()) offsets = in_layout(*offsets, MemoryFormat::Contiguous);
  Tensor grid = torch::stable::empty(voxel_sizes(offsets, shape), grid_type(weight), std::nullopt, device);
  Tensor times = torch::stable::empty({2 * count}, ScalarType::Long, std::nullopt, device);
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, device);
  long long* const first = reinterpret_cast<long long*>(mutable_data<int64_t>(times));
  const EventWindows windows{data<int64_t>(offsets), count, first, first + count};
  if (deterministic && !weight.has_value()) {
    Tensor memory = torch::stable::empty({grid.numel()}, ScalarType::Long, std::nullopt, device);
    unsigned long long* const sums = reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(memory));
    launch_voxel_grid<float>(columns, windows, shape, x.numel(), sums, mutable_data<int64_t>(dropped), scope.stream());
    launch_voxel_grid_convert(sums, mutable_data<float>(grid), grid.numel(), scope.stream());
  } else {
    dispatch_grid(weight, [&](auto value) {
      using R = typename decltype(value)::type;
      launch_voxel_grid<R>(columns, windows, shape, x.numel(), mutable_data<R>(grid), mutable_data<int64_t>(dropped),
                           scope.stream());
    });
  }
  EVKERNELS_CHECK_LAUNCH();
  return {grid, dropped};
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) { m.impl("voxel_grid", TORCH_BOX(&evkernels::voxel_grid)); }
