// The part of CUDA C++ that the package's kernels use, as plain C++: included by csrc/common/device.cuh instead of
// cuda_runtime.h when a kernel is built with -DEVKERNELS_EMULATE. scheduler.h runs the threads.
//
// Nothing here allocates memory or waits for the device, and launches must go to the current stream: host code that
// compiles against it and runs can be captured into a CUDA graph.
//
// It is as strict as the hardware or stricter: overloads that CUDA lacks are missing, wrong launches, barriers and
// alignments throw std::runtime_error with kernel, block and thread (a launch error is thrown at once instead of being
// kept for cudaGetLastError).
//
// Static `__shared__` variables become `static`: one copy, as one block runs at a time. They keep what the block before
// left there (zeros at first), as there is no portable way to find and poison them; dynamic shared memory is filled
// with 0xFF before each block. The compiler does not see the 48 KiB limit of static shared memory: nvcc checks it.
#pragma once

#include <bit>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

inline constexpr int warpSize = 32;

// --- host interface -------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

namespace cuda_emulation {

// Dynamic shared memory granted to a kernel by cudaFuncSetAttribute.
inline std::size_t& shared_limit(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, std::size_t> limits;
  const std::lock_guard<std::mutex> lock(mutex);
  return limits.try_emplace(kernel, kDefaultSharedBytes).first->second;
}

// The stream that launches must go to: inside a DeviceScope the one it hands out, which is not the null stream, as the
// current stream of torch need not be.
inline cudaStream_t& current_stream() {
  static thread_local cudaStream_t stream = nullptr;
  return stream;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  if (stream != current_stream())
    throw std::runtime_error(std::string("kernel ") + name + ": launched on another stream than the current one");
  static_assert((!std::is_reference_v<Parameters> && ...), "kernel parameters are passed by value");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied to the device");
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  const auto invoke = [](const void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.first, call.second);
  };
  Scheduler::instance().launch(name, grid, block, shared_bytes, shared_limit(reinterpret_cast<const void*>(kernel)),
                               invoke, &call);
}

inline void check_alignment(const volatile void* pointer, std::size_t bytes, const char* access) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0)
    Scheduler::instance().fail(std::string(access) + " of " + std::to_string(bytes) + " bytes at a misaligned address");
}

}  // namespace cuda_emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (!kernel || value < 0) return cudaErrorInvalidValue;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)
    return value <= 100 ? cudaSuccess : cudaErrorInvalidValue;
  if (static_cast<std::size_t>(value) > cuda_emulation::kMaxSharedBytes) return cudaErrorInvalidValue;
  cuda_emulation::shared_limit(reinterpret_cast<const void*>(kernel)) =
      std::max(static_cast<std::size_t>(value), cuda_emulation::kDefaultSharedBytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  if ((!memory && bytes) || stream != cuda_emulation::current_stream()) return cudaErrorInvalidValue;
  if (bytes) std::memset(memory, value, bytes);
  return cudaSuccess;
}

// --- barriers and warps ---------------------------------------------------------------------------------------------

inline void __syncthreads(const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  cuda_emulation::Scheduler::instance().block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  return cuda_emulation::Scheduler::instance().block_barrier("__syncthreads_count", predicate != 0, site).first;
}
inline int __syncthreads_or(int predicate, const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  return cuda_emulation::Scheduler::instance().block_barrier("__syncthreads_or", predicate != 0, site).first > 0;
}
inline int __syncthreads_and(int predicate, const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  const auto [count, all] =
      cuda_emulation::Scheduler::instance().block_barrier("__syncthreads_and", predicate != 0, site);
  return count == all;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  cuda_emulation::Scheduler::instance().warp_operation("__syncwarp", mask, 0, -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  return static_cast<unsigned>(
      cuda_emulation::Scheduler::instance().warp_operation("__ballot_sync", mask, predicate != 0, -1, site));
}
inline int __any_sync(unsigned mask, int predicate,
                      const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  return cuda_emulation::Scheduler::instance().warp_operation("__any_sync", mask, predicate != 0, -1, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  return cuda_emulation::Scheduler::instance().warp_operation("__all_sync", mask, predicate == 0, -1, site) == 0;
}

namespace cuda_emulation {

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source_lane, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Scheduler::instance().warp_operation(operation, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Lane `position` of the caller's segment of `width` lanes, or the caller itself where that lies outside the segment.
inline int lane_in_segment(int position, int width) {
  if (width < 1 || width > kWarpSize || !std::has_single_bit(static_cast<unsigned>(width)))
    Scheduler::instance().fail("shuffle width must be a power of two up to 32, got " + std::to_string(width));
  const int lane = Scheduler::instance().current_lane();
  return position < 0 || position >= width ? lane : (lane & -width) + position;
}

inline int position_in_segment(int width) { return Scheduler::instance().current_lane() & (width - 1); }

}  // namespace cuda_emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  const int lane = cuda_emulation::lane_in_segment(source & (width - 1), width);
  return cuda_emulation::shuffle("__shfl_sync", mask, value, lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  const int position = cuda_emulation::position_in_segment(width) - static_cast<int>(delta);
  return cuda_emulation::shuffle("__shfl_up_sync", mask, value, cuda_emulation::lane_in_segment(position, width), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  const int position = cuda_emulation::position_in_segment(width) + static_cast<int>(delta);
  const int lane = cuda_emulation::lane_in_segment(position, width);
  return cuda_emulation::shuffle("__shfl_down_sync", mask, value, lane, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const cuda_emulation::Site& site = cuda_emulation::Site::current()) {
  // Unlike the others, xor may read from segments below its own.
  const int lane = cuda_emulation::Scheduler::instance().current_lane(), partner = lane ^ lane_mask;
  const int end = cuda_emulation::lane_in_segment(0, width) + width;
  return cuda_emulation::shuffle("__shfl_xor_sync", mask, value, partner >= 0 && partner < end ? partner : lane, site);
}

namespace cuda_emulation {

// mma.m16n8k16 of 16-bit numbers: every lane lays down its fragments, then sums up its own four results from them.
// csrc/common/tensor_core.cuh says which lane holds what.
template <class ToFloat>
void multiply_matrices(float (&sum)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                       const ToFloat& to_float, const Site& site = Site::current()) {
  static std::uint32_t fragments[kMaxThreads / kWarpSize][kWarpSize][6];
  Scheduler& scheduler = Scheduler::instance();
  auto& of_lanes = fragments[scheduler.current_warp()];
  const int lane = scheduler.current_lane();
  std::copy_n(a, 4, of_lanes[lane]);
  std::copy_n(b, 2, of_lanes[lane] + 4);
  scheduler.warp_operation(kProduct, 0xFFFFFFFFu, 0, -1, site);
  const auto value = [&](int row_or_column, int k, int word) {
    const std::uint32_t bits = of_lanes[row_or_column % 8 * 4 + k % 8 / 2][word];
    return static_cast<double>(to_float(static_cast<std::uint16_t>(bits >> k % 2 * 16)));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; ++k) total += value(row, k, row / 8 + k / 8 * 2) * value(column, k, 4 + k / 8);
    sum[i] = static_cast<float>(total);
  }
  // Nobody may lay down the next product's fragments before all have read these.
  scheduler.warp_operation(kProduct, 0xFFFFFFFFu, 0, -1, site);
}

}  // namespace cuda_emulation

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { cuda_emulation::Scheduler::instance().fail("__trap"); }

// --- atomics: the types that CUDA has, no others --------------------------------------------------------------------

namespace cuda_emulation {

template <class T, class... Allowed>
inline constexpr bool kIsOneOf = (std::is_same_v<T, Allowed> || ...);

template <class T, class Update>
T atomic(T* address, Update update) {
  check_alignment(address, sizeof(T), "atomic access");
  Scheduler::instance().maybe_yield();
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cuda_emulation

#define EVKERNELS_EMULATED_ATOMIC(name, expression, ...)                                                    \
  template <class T>                                                                                        \
  T name(T* address, std::type_identity_t<T> value) {                                                       \
    static_assert(cuda_emulation::kIsOneOf<T, __VA_ARGS__>, #name " does not exist in CUDA for this type"); \
    return cuda_emulation::atomic(address, [value](T old) { return static_cast<T>(expression); });          \
  }
EVKERNELS_EMULATED_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
EVKERNELS_EMULATED_ATOMIC(atomicSub, old - value, int, unsigned)
EVKERNELS_EMULATED_ATOMIC(atomicExch, ((void)old, value), int, unsigned, unsigned long long, float)
EVKERNELS_EMULATED_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, long long, unsigned long long)
EVKERNELS_EMULATED_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, long long, unsigned long long)
EVKERNELS_EMULATED_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
EVKERNELS_EMULATED_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
EVKERNELS_EMULATED_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
#undef EVKERNELS_EMULATED_ATOMIC

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(cuda_emulation::kIsOneOf<T, int, unsigned, unsigned long long, unsigned short>,
                "atomicCAS does not exist in CUDA for this type");
  return cuda_emulation::atomic(address, [=](T old) { return old == expected ? value : old; });
}

// --- memory, bits and arithmetic ------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  cuda_emulation::check_alignment(address, alignof(T), "load");
  return *address;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  cuda_emulation::check_alignment(address, alignof(T), "store");
  *address = value;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline int __ffs(int bits) { return bits ? std::countr_zero(static_cast<unsigned>(bits)) + 1 : 0; }
inline int __ffsll(long long bits) { return bits ? std::countr_zero(static_cast<unsigned long long>(bits)) + 1 : 0; }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

// Rounded one by one, never contracted to a fused multiply-add.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

// As in CUDA: of a number and a NaN, the number.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
