// Time surfaces on CUDA tensors: tensors to pointers, stream, registration. The kernels are in kernels.cuh.

#include "common/cuda_host.h"
#include "time_surface/host.h"
#include "time_surface/kernels.cuh"

namespace evkernels {
namespace {

std::tuple<Tensor, Tensor> time_surface(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                        std::optional<Tensor> surface, int64_t polarities, int64_t height,
                                        int64_t width) {
  const EventColumns events = event_columns(x, y, t, p);
  const SurfaceShape shape = surface_shape(polarities, height, width);
  const std::vector<int64_t> sizes = surface_sizes(offsets, shape);
  const auto device = x.device();
  const DeviceScope scope(x);
  bring_surface(surface, sizes);
  if (offsets.has_value()) offsets = in_layout(*offsets, MemoryFormat::Contiguous);
  Tensor result = torch::stable::empty(sizes, ScalarType::Long, std::nullopt, device);
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, device);
  const EventWindows windows{data<int64_t>(offsets), window_count(offsets), nullptr, nullptr};
  launch_time_surface(events, windows, shape, x.numel(), data<int64_t>(surface), mutable_data<int64_t>(result),
                      mutable_data<int64_t>(dropped), scope.stream());
  EVKERNELS_CHECK_LAUNCH();
  return {result, dropped};
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) { m.impl("time_surface", TORCH_BOX(&evkernels::time_surface)); }
