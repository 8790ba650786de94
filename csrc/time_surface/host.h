// What the CPU and CUDA host functions of time_surface share: the checked sizes and the output's shape.
#pragma once

#include "common/event_host.h"
#include "time_surface/shape.h"

namespace evkernels {

inline SurfaceShape surface_shape(int64_t polarities, int64_t height, int64_t width) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(
      (polarities == 1 || polarities == 2) && height >= 1 && height < kLimit && width >= 1 && width < kLimit,
      "polarities must be 1 or 2, height and width in [1, 2^31)");
  return {polarities, height, width};
}

// Without offsets there is no batch dimension.
inline std::vector<int64_t> surface_sizes(const std::optional<Tensor>& offsets, const SurfaceShape& shape) {
  std::vector<int64_t> sizes{shape.polarities, shape.height, shape.width};
  if (offsets.has_value()) sizes.insert(sizes.begin(), window_count(offsets));
  return sizes;
}

// The surface to go on from, if any, in the kernels' layout.
inline void bring_surface(std::optional<Tensor>& surface, const std::vector<int64_t>& sizes) {
  if (!surface.has_value()) return;
  bool fits = surface->scalar_type() == ScalarType::Long && surface->dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) fits = surface->size(d) == sizes[d];
  STD_TORCH_CHECK(fits, "surface must be int64 and have the shape of the result");
  surface = in_layout(*surface, MemoryFormat::Contiguous);
}

}  // namespace evkernels
