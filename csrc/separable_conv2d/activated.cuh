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

}  // namespace evkernels
