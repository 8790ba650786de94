// Results of the 3x3 cells.
#pragma once

#include "common/tensor.h"
#include "common/workspace.h"

namespace evkernels {

// Asks for pages of 2 MiB under a fresh tensor, as a workspace has them. The allocator maps large tensors anew in every
// call, and touching 58 MB in pages of 4 KiB took 47 ms instead of 11.
inline void advise_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + t.numel() * t.element_size()) / kPage * kPage;
  if (end >= begin + kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// [frames of x, channels, H, W]; without elements if not needed.
inline Tensor empty_frames(const Tensor& x, ScalarType dtype, int64_t channels, bool needed, MemoryFormat layout) {
  if (!needed) {
    return torch::stable::empty({0}, dtype, std::nullopt, x.device(), std::nullopt, MemoryFormat::Contiguous);
  }
  Tensor frames = torch::stable::empty({x.size(0), channels, x.size(2), x.size(3)}, dtype, std::nullopt, x.device(),
                                       std::nullopt, layout);
  advise_huge_pages(frames);
  return frames;
}

}  // namespace evkernels
