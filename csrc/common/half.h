// Storage types for float16 and bfloat16 and their conversions, for host, device and CPU kernels alike.
//
// Exact bit arithmetic without branches, so that loops over them vectorise; intrinsics on the device. Everything is
// always_inline and nothing comes from std::, because these functions are compiled inside regions for several
// instruction sets: an out-of-line copy made in one of them could be chosen by the linker for all.
// Rounding is to nearest even; NaN stays NaN (its payload is not kept); subnormals are exact on both sides.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EVKERNELS_INLINE static __host__ __device__ __forceinline__
#else
#define EVKERNELS_INLINE static inline __attribute__((always_inline))
#endif

namespace evkernels {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// The type in which values stored as T are computed: double for double, float otherwise.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

namespace half_detail {

EVKERNELS_INLINE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

EVKERNELS_INLINE float float_of(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

EVKERNELS_INLINE float float_of_half(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7FFFu;
  const std::uint32_t sign = (half & 0x8000u) << 16;
  // Moving the exponent bias from 15 to 127 adds 112; infinity and NaN need another 112 to reach 255.
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const std::uint32_t finite_or_not = magnitude >= 0x7C00u ? normal + (112u << 23) : normal;
  const std::uint32_t subnormal = bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400u ? subnormal : finite_or_not));
}

EVKERNELS_INLINE std::uint16_t half_of_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Half an ulp of the result, less one where the kept part is even; a carry runs into the exponent as it should.
  const std::uint32_t rounded = ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const std::uint32_t finite = rounded > 0x7C00u ? 0x7C00u : rounded;
  // An ulp in [0.5, 1) is 2^-24, the unit of subnormal halves, so that the addition does the rounding.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  const std::uint32_t number = magnitude < 0x38800000u ? subnormal : finite;
  return static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | (magnitude > 0x7F800000u ? 0x7E00u : number));
}

EVKERNELS_INLINE std::uint16_t bfloat16_of_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? ((bits >> 16) & 0x8000u) | 0x7FC0u : rounded);
}

}  // namespace half_detail

EVKERNELS_INLINE float to_float(float value) { return value; }
EVKERNELS_INLINE double to_float(double value) { return value; }
EVKERNELS_INLINE float to_float(BFloat16 value) {
  return half_detail::float_of(static_cast<std::uint32_t>(value.bits) << 16);
}
EVKERNELS_INLINE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return half_detail::float_of_half(value.bits);
#endif
}

// from_float<T>(value) stores a value of Compute<T>.
template <class T>
struct FromFloat;
template <>
struct FromFloat<float> {
  EVKERNELS_INLINE float convert(float value) { return value; }
};
template <>
struct FromFloat<double> {
  EVKERNELS_INLINE double convert(double value) { return value; }
};
template <>
struct FromFloat<Half> {
  EVKERNELS_INLINE Half convert(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    return {half_detail::half_of_float(value)};
#endif
  }
};
template <>
struct FromFloat<BFloat16> {
  EVKERNELS_INLINE BFloat16 convert(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    return {half_detail::bfloat16_of_float(value)};
#endif
  }
};

template <class T>
EVKERNELS_INLINE T from_float(Compute<T> value) {
  return FromFloat<T>::convert(value);
}

}  // namespace evkernels
