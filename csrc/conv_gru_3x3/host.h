// Shapes and memory-safety checks of conv_gru_3x3 on the host. The argument checks that users meet are in
// evkernels/ops/conv_gru_3x3.py.
#pragma once

#include "conv_gru_3x3/shape.h"
#include "conv_lstm_1x1/host.h"

namespace evkernels {

struct ConvGru3x3Call {
  ConvGru3x3Shape shape;
  MemoryFormat layout;
};

// Checks the inputs and brings them into the layout of the frames x [T*N, Cin, H, W]. Gates are z, r and n.
inline ConvGru3x3Call prepare_conv_gru_3x3(Tensor& x, Tensor& h, Tensor* (&weights)[3],
                                           std::optional<Tensor>* (&biases)[3], std::optional<Tensor>& reset) {
  STD_TORCH_CHECK(x.dim() == 4 && h.dim() == 4, "x must be [T*N, Cin, H, W] and h [N, C, H, W]");
  ConvGru3x3Call call;
  ConvGru3x3Shape& s = call.shape;
  s.maps = {h.size(0), x.size(2), x.size(3)};
  s.steps = s.maps.batch == 0 ? 0 : x.size(0) / s.maps.batch;
  s.inputs = x.size(1);
  s.channels = h.size(1);
  call.layout = common_layout(x);
  s.channels_last = call.layout == MemoryFormat::ChannelsLast;
  STD_TORCH_CHECK(x.size(0) == s.steps * s.maps.batch, "x must hold a whole number of steps");
  STD_TORCH_CHECK(has_shape(h, {s.maps.batch, s.channels, x.size(2), x.size(3)}),
                  "h must be [N, C, H, W] with the height and width of x");
  STD_TORCH_CHECK(!reset.has_value() ||
                      (reset->scalar_type() == ScalarType::Bool && reset->dim() == 2 && reset->numel() == x.size(0)),
                  "reset must be bool [T, N]");
  for (int gate = 0; gate < 3; ++gate) {
    Tensor& weight = *weights[gate];
    std::optional<Tensor>& bias = *biases[gate];
    STD_TORCH_CHECK(
        has_shape(weight, {s.channels, s.inputs + s.channels, 3, 3}) && weight.scalar_type() == x.scalar_type(),
        "the weights must be [C, Cin + C, 3, 3] of the dtype of x");
    STD_TORCH_CHECK(!bias.has_value() || (has_shape(*bias, {s.channels}) && bias->scalar_type() == x.scalar_type()),
                    "the biases must be [C] of the dtype of x");
    weight = in_layout(weight, MemoryFormat::Contiguous);
    bring_contiguous(bias);
  }
  x = in_layout(x, call.layout);
  h = in_layout(h, call.layout);
  bring_contiguous(reset);
  return call;
}

}  // namespace evkernels
