// Memory of the 3x3 cells: for vectors, and for results.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <new>

#include "common/tensor.h"

namespace evkernels {

// Pages of 2 MiB where Linux has them: touching fresh pages of 4 KiB costs more than transforming the weights into
// them.
constexpr size_t kHugePage = size_t{1} << 21;

template <class R>
struct DeleteVectors {
  std::align_val_t alignment;
  void operator()(R* memory) const { ::operator delete(memory, alignment); }
};

// Uninitialised memory for vectors, each on one cache line.
template <class R>
std::unique_ptr<R, DeleteVectors<R>> workspace(int64_t count) {
  const size_t bytes = count * sizeof(R);
  const std::align_val_t alignment{bytes >= kHugePage ? kHugePage : 64};
  void* const memory = ::operator new(bytes, alignment);
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return std::unique_ptr<R, DeleteVectors<R>>(static_cast<R*>(memory), {alignment});
}

// [frames of x, channels, H, W]; without elements if not needed.
inline Tensor empty_frames(const Tensor& x, ScalarType dtype, int64_t channels, bool needed, MemoryFormat layout) {
  if (!needed) {
    return torch::stable::empty({0}, dtype, std::nullopt, x.device(), std::nullopt, MemoryFormat::Contiguous);
  }
  return torch::stable::empty({x.size(0), channels, x.size(2), x.size(3)}, dtype, std::nullopt, x.device(),
                              std::nullopt, layout);
}

}  // namespace evkernels
