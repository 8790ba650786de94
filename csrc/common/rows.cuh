// What elementwise kernels on rows share: where the blocks of a row are, and launches with the widest possible access.
//
// A row is `inner` consecutive elements of the state: a sample if contiguous, a pixel if channels_last. Tensors with k
// blocks of channels have rows k times as long. With kPack = 4 every access of float32 data is 16 bytes; 16-bit data
// keep kPack = 4 (8 bytes), because 8 per thread need twice the registers and coalesce worse. Rows whose length is no
// multiple of the pack, or tensors that start unaligned, take kPack = 1.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace evkernels {

constexpr int kRowThreads = 256;

// Elements of one access: 4, or 2 where they would exceed 16 bytes.
template <class T>
constexpr int kRowPack = sizeof(T) == 8 ? 2 : 4;

// The first of this thread's kPack elements.
template <int kPack>
__device__ __forceinline__ int64_t first_element() {
  return (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) * kPack;
}

// Where element `e` of the state is found in block 0 of a tensor with kBlocks blocks. Dividing in 32 bits where the
// sizes allow it saves about 50 instructions.
template <int kBlocks>
__device__ __forceinline__ int64_t block_offset(int64_t e, int64_t inner, int64_t total) {
  const bool narrow = total <= INT32_MAX;
  const int64_t row = narrow ? static_cast<uint32_t>(e) / static_cast<uint32_t>(inner) : e / inner;
  return e + (kBlocks - 1) * row * inner;
}

// Calls launch(pack, grid) with the pack, a compile-time integer, that rows and pointers allow; not for empty tensors.
template <class T, class Launch, class... Pointers>
void launch_on_rows(int64_t inner, int64_t total, const Launch& launch, const Pointers*... pointers) {
  constexpr int kPack = kRowPack<T>;
  if (total == 0) return;
  if (inner % kPack == 0 && can_pack<kPack>(pointers...)) {
    launch(std::integral_constant<int, kPack>{}, grid_dimensions(ceil_div(total, kPack * kRowThreads)));
  } else {
    launch(std::integral_constant<int, 1>{}, grid_dimensions(ceil_div(total, kRowThreads)));
  }
}

}  // namespace evkernels
