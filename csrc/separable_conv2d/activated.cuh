// The activations of a separable convolution, chosen at run time.
#pragma once

#include "common/activation.h"
#include "common/device_math.cuh"

namespace evkernels {
namespace device_math {
#include "common/activations.inl"
}  // namespace device_math

// SiLU, GELU with tanh and the sigmoid share one exponential: a copy for each made the compiler spill registers.
template <class V>
__device__ __forceinline__ V activated(Activation kind, V x) {
  using namespace device_math;
  if (kind == Activation::kNone) return x;
  if (kind == Activation::kRelu) return activate<Activation::kRelu>(x);
  if (kind == Activation::kGelu) return activate<Activation::kGelu>(x);
  const V share = logistic(kind == Activation::kGeluTanh ? gelu_tanh_argument(x) : x);
  return kind == Activation::kSigmoid ? share : x * share;
}

// The same for values that 16 bits will hold, in place. One choice serves all of them, and the power of two goes
// without exp's correction, which is below 2^-16 of it.
template <int kRows, int kColumns>
__device__ __forceinline__ void activate_16_bits(Activation kind, float (&values)[kRows][kColumns]) {
  using namespace device_math;
  const auto replace = [&](const auto& function) {
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) {
      float& x = values[i / kColumns][i % kColumns];
      x = function(x);
    }
  };
  const auto share = [](float x) { return rcp(1.0f + ex2(-1.44269502f * x)); };
  if (kind == Activation::kNone) return;
  if (kind == Activation::kSilu) return replace([&](float x) { return x * share(x); });
  if (kind == Activation::kRelu) return replace([](float x) { return activate<Activation::kRelu>(x); });
  if (kind == Activation::kSigmoid) return replace(share);
  if (kind == Activation::kGelu) return replace([](float x) { return activate<Activation::kGelu>(x); });
  replace([&](float x) { return x * share(gelu_tanh_argument(x)); });
}

}  // namespace evkernels
