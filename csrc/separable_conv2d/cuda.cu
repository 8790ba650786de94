// Depthwise-separable convolution on CUDA tensors: tensors to pointers, stream, registration. The kernel is in
// kernels.cuh; the gradient is composed of other ops in evkernels/ops/separable_conv2d_composed.py.

#include "common/cuda_host.h"
#include "separable_conv2d/host.h"
#include "separable_conv2d/kernels.cuh"

namespace evkernels {
namespace {

Tensor separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight,
                        std::optional<Tensor> depthwise_bias, std::optional<Tensor> pointwise_bias, int64_t stride,
                        int64_t padding, std::string activation, std::string output_activation) {
  const SeparableCall call = prepare_separable_conv2d(x, depthwise_weight, pointwise_weight, depthwise_bias,
                                                      pointwise_bias, stride, padding, activation, output_activation);
  Tensor y = empty_separable_output(x, call);
  const DeviceScope scope(x);
  dispatch_floating("separable_conv2d", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    launch_separable_conv2d_forward(data<T>(x), data<T>(depthwise_weight), data<T>(pointwise_weight),
                                    data<T>(depthwise_bias), data<T>(pointwise_bias), mutable_data<T>(y), call.shape,
                                    call.layout == MemoryFormat::ChannelsLast, scope.stream());
  });
  EVKERNELS_CHECK_LAUNCH();
  return y;
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) { m.impl("separable_conv2d", TORCH_BOX(&evkernels::separable_conv2d)); }
