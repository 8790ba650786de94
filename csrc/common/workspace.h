// Memory that kernels work in: whole cache lines, which vectors may read and write.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace evkernels {

// Pages of 2 MiB where Linux has them: touching fresh pages of 4 KiB costs more than transforming a 3x3 cell's weights
// into them.
constexpr size_t kHugePage = size_t{1} << 21;

struct DeleteWorkspace {
  std::align_val_t alignment{64};
  void operator()(void* memory) const { ::operator delete(memory, alignment); }
};

template <class R>
using Workspace = std::unique_ptr<R, DeleteWorkspace>;

// Uninitialised.
template <class R>
Workspace<R> workspace(int64_t count) {
  const size_t bytes = count * sizeof(R);
  const std::align_val_t alignment{bytes >= kHugePage ? kHugePage : 64};
  void* const memory = ::operator new(bytes, alignment);
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return Workspace<R>(static_cast<R*>(memory), {alignment});
}

// Zeros: for buffers of which vectors compute more than was written. What memory held before may be subnormal numbers,
// at which Intel's processors take a hundred times as long; a whole call took up to three times as long.
template <class R>
Workspace<R> zeroed_workspace(int64_t count) {
  auto memory = workspace<R>(count);
  std::memset(static_cast<void*>(memory.get()), 0, count * sizeof(R));
  return memory;
}

}  // namespace evkernels
