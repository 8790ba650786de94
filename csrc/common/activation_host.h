// Activations at the boundary of the kernels: from the op's string to the kernels' constant.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>

#include "common/activation.h"

namespace evkernels {

inline Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  STD_TORCH_CHECK(name == "sigmoid", "activation must be none, relu, silu, gelu, gelu_tanh or sigmoid, got ", name);
  return Activation::kSigmoid;
}

}  // namespace evkernels
