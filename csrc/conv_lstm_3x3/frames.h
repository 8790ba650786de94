// Results of the 3x3 cells.
#pragma once

#include "common/tensor.h"

namespace evkernels {

// [frames of x, channels, H, W]; without elements if not needed.
inline Tensor empty_frames(const Tensor& x, ScalarType dtype, int64_t channels, bool needed, MemoryFormat layout) {
  if (!needed) {
    return torch::stable::empty({0}, dtype, std::nullopt, x.device(), std::nullopt, MemoryFormat::Contiguous);
  }
  return torch::stable::empty({x.size(0), channels, x.size(2), x.size(3)}, dtype, std::nullopt, x.device(),
                              std::nullopt, layout);
}

}  // namespace evkernels
