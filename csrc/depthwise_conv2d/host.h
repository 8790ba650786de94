// What the CPU and CUDA host functions of depthwise_conv2d share: sizes and the memory-safety checks. The argument
// checks that users meet are in evkernels/ops/depthwise_conv2d.py.
#pragma once

#include <type_traits>

#include "common/activation_host.h"
#include "common/tensor.h"
#include "depthwise_conv2d/geometry.h"

namespace evkernels {

inline DepthwiseGeometry depthwise_geometry(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                            int64_t stride, int64_t padding, int64_t dilation, MemoryFormat layout) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x must be [N, C, H, W] and weight [C, 1, k, k]");
  const int64_t C = x.size(1), k = weight.size(3);
  STD_TORCH_CHECK(C >= 1 && weight.size(0) == C && weight.size(1) == 1 && weight.size(2) == k,
                  "weight must be [C, 1, k, k]");
  STD_TORCH_CHECK(k >= 1 && k <= 31, "weight must have 1 <= k <= 31, got ", k);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  STD_TORCH_CHECK(dilation == 1 || (dilation > 1 && stride == 1), "dilation must be 1, or above at stride 1, got ",
                  dilation);
  const int64_t span = (k - 1) * dilation + 1;
  STD_TORCH_CHECK(padding >= 0 && x.size(2) + 2 * padding >= span && x.size(3) + 2 * padding >= span,
                  "padding must make x at least as large as the filter");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == C && bias->scalar_type() == x.scalar_type()),
                  "bias must be [C] in the dtype of x");
  const bool interleaved = layout == MemoryFormat::ChannelsLast;
  DepthwiseGeometry g;
  g.planes = interleaved ? x.size(0) : x.size(0) * C;
  g.channels = interleaved ? C : 1;
  g.filters = C;
  g.height = x.size(2);
  g.width = x.size(3);
  g.out_height = (g.height + 2 * padding - span) / stride + 1;
  g.out_width = (g.width + 2 * padding - span) / stride + 1;
  g.k = k;
  g.stride = stride;
  g.padding = padding;
  g.dilation = dilation;
  return g;
}

inline Tensor empty_output(const Tensor& x, const DepthwiseGeometry& g, ScalarType dtype, MemoryFormat layout) {
  return torch::stable::empty({x.size(0), x.size(1), g.out_height, g.out_width}, dtype, std::nullopt, x.device(),
                              std::nullopt, layout);
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& x, const DepthwiseGeometry& g) {
  STD_TORCH_CHECK(grad_output.dim() == 4 && grad_output.size(0) == x.size(0) && grad_output.size(1) == x.size(1) &&
                      grad_output.size(2) == g.out_height && grad_output.size(3) == g.out_width &&
                      grad_output.scalar_type() == x.scalar_type(),
                  "grad_output must have the shape and dtype of the output");
}

// A gradient that is not asked for is an empty tensor.
inline Tensor empty_or_nothing(bool needed, const Tensor& like, MemoryFormat layout) {
  if (needed) return empty_in_layout(like, like.scalar_type(), layout);
  return torch::stable::empty({0}, like.scalar_type(), std::nullopt, like.device());
}

// The dtype in which values stored as T are computed.
template <class T>
constexpr ScalarType kComputeDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

}  // namespace evkernels
