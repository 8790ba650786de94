// The CPU host functions of depthwise_conv2d that other ops build on.
#pragma once

#include <string>
#include <tuple>

#include "common/tensor.h"
#include "depthwise_conv2d/geometry.h"

namespace evkernels {

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cpu(Tensor grad_output, Tensor x, Tensor weight,
                                                                 std::optional<Tensor> bias, int64_t stride,
                                                                 int64_t padding, std::string activation,
                                                                 int64_t dilation, bool need_x, bool need_weight,
                                                                 bool need_bias);

// Units [begin, end) of g.rows_per_sum() output rows of channels_last or contiguous planes, without an activation: the
// gradient of the input rows beside them, and the sums [unit][k * k + 1][channels] of the weights' and the bias's
// gradients, which reduce_depthwise_sums adds up over all units. Null is left out. `d_y` begins with row `d_first` of
// all planes' output rows and holds those of the units and g.rows_above_sum() above them; `memory` holds
// g.backward_memory(sizeof(T) == 2) elements.
template <class T>
void depthwise_backward_units(const T* x, const T* weight, const T* d_y, int64_t d_first, T* d_x, double* sums,
                              const DepthwiseGeometry& g, Compute<T>* memory, int64_t begin, int64_t end);
template <class T>
void reduce_depthwise_sums(const double* sums, T* grad_weight, T* grad_bias, const DepthwiseGeometry& g);

}  // namespace evkernels
