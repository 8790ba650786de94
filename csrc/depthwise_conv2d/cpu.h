// The CPU host functions of depthwise_conv2d that other ops build on.
#pragma once

#include <string>
#include <tuple>

#include "common/tensor.h"

namespace evkernels {

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cpu(Tensor grad_output, Tensor x, Tensor weight,
                                                                 std::optional<Tensor> bias, int64_t stride,
                                                                 int64_t padding, std::string activation,
                                                                 int64_t dilation, bool need_x, bool need_weight,
                                                                 bool need_bias);

}  // namespace evkernels
