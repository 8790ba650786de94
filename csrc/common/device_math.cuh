// exp, sigmoid and tanh for kernels: one ex2 and at most one rcp instruction each. The unit for these takes 16 lanes
// per clock and multiprocessor, where multiply-adds get 64 (sm_80) or 128 (sm_90); benchmarks/gpu_budgets.toml counts
// them.
//
// float: x * log2(e) carries its rounding error along, so exp stays within a few ulp over the whole range. Limits at
// +-infinity are exact, NaN propagates, results below 2^-126 are flushed to zero. tanh is odd and accurate near 0 as
// well. Without nvcc the same formulas run with std::exp2 and a division. double: the library's functions.
//
// Use from inside `namespace evkernels::device_math` (where the formulas of math.inl are included) or qualified: an
// unqualified call elsewhere finds ::exp and ::tanh.
#pragma once

#include <cmath>

#include "device.cuh"

namespace evkernels::device_math {

// 2^x, at most 2 ulp on the device.
__host__ __device__ __forceinline__ float ex2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// 1/x, at most 1 ulp on the device.
__host__ __device__ __forceinline__ float rcp(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

__host__ __device__ __forceinline__ float exp(float x) {
  // Beyond +-110 the result is infinite or zero anyway, and infinity minus infinity is avoided. NaN passes both.
  x = x > 110.0f ? 110.0f : x;
  x = x < -110.0f ? -110.0f : x;
  const float high = x * 1.44269502f;
  float low = fmaf(x, 1.44269502f, -high);
  low = fmaf(x, 1.92596303e-8f, low);
  // A factor and not a summand, so that an infinite or zero power stays what it is.
  return ex2(high) * fmaf(low, 0.693147182f, 1.0f);
}

__host__ __device__ __forceinline__ float sigmoid(float x) { return rcp(1.0f + exp(-x)); }

__host__ __device__ __forceinline__ float tanh(float x) {
  const float magnitude = fabsf(x);
  const float large = fmaf(-2.0f, rcp(1.0f + exp(2.0f * magnitude)), 1.0f);
  // Minimax polynomial of tanh(x)/x in x^2 on |x| < 0.55, relative error 1.1e-9: above, cancellation costs nothing yet.
  const float square = magnitude * magnitude;
  float series = fmaf(-0.00627423916f, square, 0.021071678f);
  series = fmaf(series, square, -0.0538523085f);
  series = fmaf(series, square, 0.13332586f);
  series = fmaf(series, square, -0.333333164f);
  const float small = fmaf(magnitude * square, series, magnitude);
  return copysignf(magnitude < 0.55f ? small : large, x);
}

__host__ __device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__host__ __device__ __forceinline__ double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

__host__ __device__ __forceinline__ double exp(double x) { return ::exp(x); }
__host__ __device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
__host__ __device__ __forceinline__ double tanh(double x) { return ::tanh(x); }

// For results that are rounded to T: the same for all here.
template <class T, class V>
__host__ __device__ __forceinline__ V sigmoid_for(V x) {
  return sigmoid(x);
}
template <class T, class V>
__host__ __device__ __forceinline__ V tanh_for(V x) {
  return tanh(x);
}
template <class T, class V>
__host__ __device__ __forceinline__ V sigmoid_times_tanh_for(V x, V y) {
  return sigmoid(x) * tanh(y);
}

}  // namespace evkernels::device_math
