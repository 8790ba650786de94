// Stacked event histograms on CUDA tensors: tensors to pointers, stream, registration. The kernels are in kernels.cuh.

#include "common/cuda_host.h"
#include "event_histogram/host.h"
#include "event_histogram/kernels.cuh"

namespace evkernels {
namespace {

std::tuple<Tensor, Tensor> event_histogram(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                           int64_t bins, int64_t height, int64_t width, int64_t cutoff, int64_t bits) {
  const EventColumns events = event_columns(x, y, t, p);
  const HistogramShape shape = histogram_shape(bins, height, width, cutoff, bits);
  const std::vector<int64_t> sizes = histogram_sizes(offsets, shape);
  const int64_t count = window_count(offsets);
  const auto device = x.device();
  const DeviceScope scope(x);
  if (offsets.has_value()) offsets = in_layout(*offsets, MemoryFormat::Contiguous);
  // The kernels write whole words, so the memory is rounded up to them.
  const int64_t cells = count * 2 * bins * height * width;
  const int64_t per_word = 128 / bits;
  Tensor out = torch::stable::empty({ceil_div(cells, per_word) * per_word}, counter_dtype(bits), std::nullopt, device);
  Tensor order =
      torch::stable::empty({HistogramOrder::size(count, bins, x.numel())}, ScalarType::Long, std::nullopt, device);
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, device);
  const EventWindows windows{data<int64_t>(offsets), count, nullptr, nullptr};
  launch_event_histogram(events, windows, shape, static_cast<int>(bits), x.numel(),
                         reinterpret_cast<long long*>(mutable_data<int64_t>(order)), mutable_data<uint32_t>(out),
                         mutable_data<int64_t>(dropped), scope.stream());
  EVKERNELS_CHECK_LAUNCH();
  return {torch::stable::view(torch::stable::narrow(out, 0, 0, cells), sizes), dropped};
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) { m.impl("event_histogram", TORCH_BOX(&evkernels::event_histogram)); }
