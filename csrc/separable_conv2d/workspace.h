// Memory for the loops of the separable convolutions: whole cache lines, which vectors may read and write.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace evkernels {

constexpr std::align_val_t kCacheLine{64};

template <class R>
struct Delete {
  void operator()(R* memory) const { ::operator delete(memory, kCacheLine); }
};

// Uninitialised.
template <class R>
std::unique_ptr<R, Delete<R>> workspace(int64_t count) {
  return std::unique_ptr<R, Delete<R>>(static_cast<R*>(::operator new(count * sizeof(R), kCacheLine)));
}

// Zeros: for buffers of which vectors compute more than was written. What memory held before may be subnormal numbers,
// at which Intel's processors take a hundred times as long; a whole call took up to three times as long.
template <class R>
std::unique_ptr<R, Delete<R>> zeroed_workspace(int64_t count) {
  auto memory = workspace<R>(count);
  std::memset(static_cast<void*>(memory.get()), 0, count * sizeof(R));
  return memory;
}

}  // namespace evkernels
