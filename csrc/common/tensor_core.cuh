// One instruction of the tensor cores: the product of a 16 x 16 and a 16 x 8 matrix of 16-bit numbers, added to sums in
// float32. All lanes of a warp take part, each with its share of the three matrices:
//
//   a[i]    row lane / 4 + 8 (i % 2), columns 2 (lane % 4) + 8 (i / 2) and the one behind, as one word
//   b[i]    rows 2 (lane % 4) + 8 i and the one behind, column lane / 4
//   sum[i]  row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2
//
// (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Both operands lie along their inner dimension.
#pragma once

#include "device.cuh"

namespace evkernels {

// Two neighbouring 16-bit numbers, the first in the word's lower half.
template <class T>
__device__ __forceinline__ void floats_of_pair(uint32_t pair, float (&values)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // A shift and a mask, where to_float of each would take the word apart first.
    values[0] = half_detail::float_of(pair << 16);
    values[1] = half_detail::float_of(pair & 0xffff0000u);
  } else {
    values[0] = to_float(T{static_cast<uint16_t>(pair)});
    values[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
  }
}

template <class T>
__device__ __forceinline__ uint32_t pair_of_floats(const float (&values)[2]) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values[1]), "f"(values[0]));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values[1]), "f"(values[0]));
  }
  return pair;
#else
  return from_float<T>(values[0]).bits | static_cast<uint32_t>(from_float<T>(values[1]).bits) << 16;
#endif
}

template <class T>
__device__ __forceinline__ void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(EVKERNELS_EMULATE)
  cuda_emulation::multiply_matrices(sum, a, b, [](uint16_t bits) { return to_float(T{bits}); });
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "16-bit numbers");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace evkernels
