// Which function follows a convolution. The formulas are in activations.inl.
#pragma once

enum class Activation { kNone, kRelu, kSilu, kGelu, kGeluTanh, kSigmoid };

template <Activation kind>
struct ActivationConstant {
  static constexpr Activation value = kind;
};
