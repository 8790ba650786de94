// What kernels.cuh files are written against: launch, dynamic shared memory, grid limits and 16-byte access.
//
// No torch header, and one spelling for two compilers: nvcc, and a plain C++ compiler under EVKERNELS_EMULATE, where
// tests/emulation/cuda_emulation.h runs the same kernels on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(EVKERNELS_EMULATE)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "half.h"

// EVKERNELS_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...). The kernel stands in parentheses.
// Dispatch macros split their body at the commas of <<<>>>: inside one, call a templated function that launches.
#if defined(EVKERNELS_EMULATE)
#define EVKERNELS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulation::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#else
#define EVKERNELS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

// Declares `type* name`, the dynamic shared memory of the block, aligned to 16 bytes.
#if defined(EVKERNELS_EMULATE)
#define EVKERNELS_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::cuda_emulation::Scheduler::instance().shared())
#else
#define EVKERNELS_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char evkernels_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(evkernels_dynamic_shared)
#endif

namespace evkernels {

template <class A, class B>
__host__ __device__ constexpr std::int64_t ceil_div(A count, B per_part) {
  return (static_cast<std::int64_t>(count) + per_part - 1) / per_part;
}

// Grid of 64-bit extents; throws where one is empty or beyond what the hardware takes.
inline dim3 grid_dimensions(std::int64_t x, std::int64_t y = 1, std::int64_t z = 1) {
  if (x < 1 || y < 1 || z < 1 || x > 0x7FFFFFFF || y > 65535 || z > 65535)
    throw std::invalid_argument("CUDA grid must be within (1..2147483647, 1..65535, 1..65535), got (" +
                                std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// Multiprocessors of the current device, for tiles that keep all of them busy.
inline std::int64_t multiprocessor_count() {
#if defined(EVKERNELS_EMULATE)
  return 2;
#else
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 1;
#endif
}

// N values moved by one instruction. Pointers must be aligned to the whole pack.
template <class T, int N>
struct alignas(sizeof(T) * N) Packed {
  static_assert(N > 0 && 16 % (sizeof(T) * N) == 0, "the hardware moves 1, 2, 4, 8 or 16 bytes");
  T values[N];
  __host__ __device__ T& operator[](int i) { return values[i]; }
  __host__ __device__ const T& operator[](int i) const { return values[i]; }
};

// Whether packs of N values can be used on all of these pointers; strides must be multiples of N besides.
template <int N, class... T>
bool can_pack(const T*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % (sizeof(T) * N) == 0) && ...);
}

#if defined(EVKERNELS_EMULATE)

template <int N, class T>
Packed<T, N> load_packed(const T* address) {
  cuda_emulation::check_alignment(address, sizeof(Packed<T, N>), "packed load");
  Packed<T, N> pack;
  std::memcpy(&pack, address, sizeof pack);
  return pack;
}

template <class T, int N>
void store_packed(T* address, const Packed<T, N>& pack) {
  cuda_emulation::check_alignment(address, sizeof pack, "packed store");
  std::memcpy(address, &pack, sizeof pack);
}

#else

template <int Bytes>
struct RawPack;
template <>
struct RawPack<1> {
  using type = unsigned char;
};
template <>
struct RawPack<2> {
  using type = unsigned short;
};
template <>
struct RawPack<4> {
  using type = unsigned;
};
template <>
struct RawPack<8> {
  using type = uint2;
};
template <>
struct RawPack<16> {
  using type = uint4;
};

// From global memory that no thread of this launch writes (read-only cache).
template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_packed(const T* address) {
  using Raw = typename RawPack<sizeof(T) * N>::type;
  const Raw raw = __ldg(reinterpret_cast<const Raw*>(address));
  Packed<T, N> pack;
  memcpy(&pack, &raw, sizeof pack);
  return pack;
}

// To global memory. __stcs, because nvcc 13 may split a plain 16-byte store into four scalar ones, each of which uses a
// quarter of the sectors that it touches.
template <class T, int N>
__device__ __forceinline__ void store_packed(T* address, const Packed<T, N>& pack) {
  using Raw = typename RawPack<sizeof(T) * N>::type;
  Raw raw;
  memcpy(&raw, &pack, sizeof raw);
  __stcs(reinterpret_cast<Raw*>(address), raw);
}

#endif

}  // namespace evkernels
