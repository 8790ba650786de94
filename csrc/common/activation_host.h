// Activations at the boundary of the kernels: from the op's string to a compile-time constant.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <string>
#include <type_traits>

#include "common/activation.h"

namespace evkernels {

inline Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "gelu", "activation must be none, relu, silu or gelu, got ", name);
  return Activation::kGelu;
}

// Calls f(std::integral_constant<Activation, ...>).
template <class F>
void dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
  }
}

}  // namespace evkernels
