// Depthwise convolution on CUDA tensors: tensors to pointers, stream, registration. The kernels are in kernels.cuh.

#include "common/cuda_host.h"
#include "depthwise_conv2d/host.h"
#include "depthwise_conv2d/kernels.cuh"

namespace evkernels {
namespace {

Tensor depthwise_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride, int64_t padding,
                        std::string activation, int64_t dilation) {
  const MemoryFormat layout = common_layout(x);
  const DepthwiseGeometry g = depthwise_geometry(x, weight, bias, stride, padding, dilation, layout);
  x = in_layout(x, layout);
  weight = in_layout(weight, MemoryFormat::Contiguous);
  if (bias.has_value()) bias = in_layout(*bias, MemoryFormat::Contiguous);
  Tensor y = empty_output(x, g, x.scalar_type(), layout);
  const Activation kind = parse_activation(activation);
  const DeviceScope scope(x);
  dispatch_floating("depthwise_conv2d", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    launch_depthwise_conv2d_forward(data<T>(x), data<T>(weight), data<T>(bias), mutable_data<T>(y), g, kind,
                                    scope.stream());
  });
  EVKERNELS_CHECK_LAUNCH();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad_output, Tensor x, Tensor weight,
                                                             std::optional<Tensor> bias, int64_t stride,
                                                             int64_t padding, std::string activation, int64_t dilation,
                                                             bool need_x, bool need_weight, bool need_bias) {
  const MemoryFormat layout = common_layout(x);
  const DepthwiseGeometry g = depthwise_geometry(x, weight, bias, stride, padding, dilation, layout);
  check_grad_output(grad_output, x, g);
  STD_TORCH_CHECK(!need_bias || bias.has_value(), "there is no bias to have a gradient");
  grad_output = in_layout(grad_output, layout);
  x = in_layout(x, layout);
  weight = in_layout(weight, MemoryFormat::Contiguous);
  if (bias.has_value()) bias = in_layout(*bias, MemoryFormat::Contiguous);
  Tensor grad_x = empty_or_nothing(need_x, x, layout);
  Tensor grad_weight = empty_or_nothing(need_weight, weight, MemoryFormat::Contiguous);
  Tensor grad_bias = empty_or_nothing(need_bias, bias.has_value() ? *bias : x, MemoryFormat::Contiguous);
  const Activation kind = parse_activation(activation);
  const DeviceScope scope(x);
  dispatch_floating("depthwise_conv2d_backward", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    std::optional<Tensor> d_pre;
    if (kind != Activation::kNone) {
      d_pre = empty_output(x, g, kComputeDtype<T>, layout);
      launch_depthwise_conv2d_backward_activation(data<T>(x), data<T>(weight), data<T>(bias), data<T>(grad_output),
                                                  mutable_data<Compute<T>>(*d_pre), g, kind, scope.stream());
    }
    if (need_x) {
      launch_depthwise_conv2d_backward_input(data<T>(grad_output), data<Compute<T>>(d_pre), data<T>(weight),
                                             mutable_data<T>(grad_x), g, scope.stream());
    }
    if (need_weight || need_bias) {
      Tensor sums = torch::stable::empty({depthwise_sums_size(g)}, kComputeDtype<T>, std::nullopt, x.device());
      launch_depthwise_conv2d_backward_weight(data<T>(grad_output), data<Compute<T>>(d_pre), data<T>(x),
                                              mutable_data<Compute<T>>(sums),
                                              need_weight ? mutable_data<T>(grad_weight) : nullptr,
                                              need_bias ? mutable_data<T>(grad_bias) : nullptr, g, scope.stream());
    }
  });
  EVKERNELS_CHECK_LAUNCH();
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&evkernels::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&evkernels::depthwise_conv2d_backward));
}
