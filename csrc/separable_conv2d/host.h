// What the CPU and CUDA host functions of separable_conv2d share: sizes and the memory-safety checks. The argument
// checks that users meet are in evkernels/ops/separable_conv2d.py.
#pragma once

#include <string>

#include "common/activation_host.h"
#include "common/tensor.h"
#include "separable_conv2d/shape.h"

namespace evkernels {

inline SeparableShape separable_shape(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                                      const std::optional<Tensor>& depthwise_bias,
                                      const std::optional<Tensor>& pointwise_bias, int64_t stride, int64_t padding,
                                      const std::string& activation, const std::string& output_activation) {
  STD_TORCH_CHECK(x.dim() == 4 && depthwise_weight.dim() == 4 && pointwise_weight.dim() == 4,
                  "x and the weights must have 4 dimensions");
  STD_TORCH_CHECK(stride >= 1 && stride <= 2 && padding >= 0, "stride must be 1 or 2 and padding at least 0");
  const int64_t C = x.size(1), O = pointwise_weight.size(0), k = depthwise_weight.size(3);
  const auto has_shape = [](const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
    return t.size(0) == a && t.size(1) == b && t.size(2) == c && t.size(3) == d;
  };
  STD_TORCH_CHECK(C > 0 && k % 2 == 1 && has_shape(depthwise_weight, C, 1, k, k),
                  "depthwise_weight must be [C, 1, k, k] with k odd");
  STD_TORCH_CHECK(O > 0 && has_shape(pointwise_weight, O, C, 1, 1), "pointwise_weight must be [O, C, 1, 1]");
  const auto check = [&](const Tensor& t, bool has_size) {
    STD_TORCH_CHECK(has_size && t.scalar_type() == x.scalar_type(),
                    "weights and biases must have the sizes and the dtype of x");
  };
  check(depthwise_weight, true);
  check(pointwise_weight, true);
  if (depthwise_bias.has_value()) check(*depthwise_bias, depthwise_bias->dim() == 1 && depthwise_bias->size(0) == C);
  if (pointwise_bias.has_value()) check(*pointwise_bias, pointwise_bias->dim() == 1 && pointwise_bias->size(0) == O);
  const int64_t height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(height + 2 * padding >= k && width + 2 * padding >= k, "the kernel is larger than the padded x");
  return {x.size(0),
          C,
          O,
          height,
          width,
          (height + 2 * padding - k) / stride + 1,
          (width + 2 * padding - k) / stride + 1,
          k,
          stride,
          padding,
          parse_activation(activation),
          parse_activation(output_activation)};
}

// Sizes of one call, whose layout x has.
struct SeparableCall {
  SeparableShape shape;
  MemoryFormat layout;
};

// Checks the arguments and brings x into its layout, the parameters into contiguous memory.
inline SeparableCall prepare_separable_conv2d(Tensor& x, Tensor& depthwise_weight, Tensor& pointwise_weight,
                                              std::optional<Tensor>& depthwise_bias,
                                              std::optional<Tensor>& pointwise_bias, int64_t stride, int64_t padding,
                                              const std::string& activation, const std::string& output_activation) {
  const SeparableCall call = {separable_shape(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias,
                                              stride, padding, activation, output_activation),
                              common_layout(x)};
  x = in_layout(x, call.layout);
  depthwise_weight = in_layout(depthwise_weight, MemoryFormat::Contiguous);
  pointwise_weight = in_layout(pointwise_weight, MemoryFormat::Contiguous);
  if (depthwise_bias.has_value()) depthwise_bias = in_layout(*depthwise_bias, MemoryFormat::Contiguous);
  if (pointwise_bias.has_value()) pointwise_bias = in_layout(*pointwise_bias, MemoryFormat::Contiguous);
  return call;
}

inline Tensor empty_separable_output(const Tensor& x, const SeparableCall& call) {
  const SeparableShape& s = call.shape;
  return torch::stable::empty({s.batch, s.outputs, s.out_height, s.out_width}, x.scalar_type(), std::nullopt,
                              x.device(), std::nullopt, call.layout);
}

inline void check_separable_output(const char* name, const Tensor& y, const Tensor& x, const SeparableShape& s) {
  STD_TORCH_CHECK(y.dim() == 4 && y.size(0) == s.batch && y.size(1) == s.outputs && y.size(2) == s.out_height &&
                      y.size(3) == s.out_width && y.scalar_type() == x.scalar_type(),
                  name, " must have the shape of the output and the dtype of x");
}

}  // namespace evkernels
