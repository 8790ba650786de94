// Shapes, order and memory-safety checks of conv_lstm_3x3 on the host. The argument checks that users meet are in
// evkernels/ops/conv_lstm_3x3.py.
#pragma once

#include "conv_lstm_1x1/host.h"
#include "conv_lstm_3x3/shape.h"

namespace evkernels {

struct ConvLstm3x3Call {
  ConvLstm3x3Shape shape;
  MemoryFormat layout;
};

// Checks the inputs and brings them into the layout of the frames x [T*N, Cin, H, W].
inline ConvLstm3x3Call prepare_conv_lstm_3x3(Tensor& x, Tensor& h, Tensor& c, Tensor& weight,
                                             std::optional<Tensor>& bias, std::optional<Tensor>& reset,
                                             const std::string& order) {
  STD_TORCH_CHECK(x.dim() == 4 && h.dim() == 4, "x must be [T*N, Cin, H, W] and h [N, C, H, W]");
  ConvLstm3x3Call call;
  ConvLstm3x3Shape& s = call.shape;
  s.maps = {h.size(0), x.size(2), x.size(3)};
  s.steps = s.maps.batch == 0 ? 0 : x.size(0) / s.maps.batch;
  s.inputs = x.size(1);
  s.channels = h.size(1);
  s.order = parse_lstm_gate_order(order);
  call.layout = common_layout(x);
  s.channels_last = call.layout == MemoryFormat::ChannelsLast;
  const int64_t depth = s.inputs + s.channels;
  STD_TORCH_CHECK(x.size(0) == s.steps * s.maps.batch, "x must hold a whole number of steps");
  STD_TORCH_CHECK(has_shape(h, {s.maps.batch, s.channels, x.size(2), x.size(3)}) &&
                      has_shape(c, {s.maps.batch, s.channels, x.size(2), x.size(3)}),
                  "h and c must be [N, C, H, W] with the height and width of x");
  STD_TORCH_CHECK(has_shape(weight, {4 * s.channels, depth, 3, 3}), "weight must be [4*C, Cin + C, 3, 3]");
  STD_TORCH_CHECK(!bias.has_value() || has_shape(*bias, {4 * s.channels}), "bias must be [4*C]");
  STD_TORCH_CHECK(!reset.has_value() ||
                      (reset->scalar_type() == ScalarType::Bool && reset->dim() == 2 && reset->numel() == x.size(0)),
                  "reset must be bool [T, N]");
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(
      h.scalar_type() == dtype && weight.scalar_type() == dtype && (!bias.has_value() || bias->scalar_type() == dtype),
      "h, weight and bias must have the dtype of x");
  x = in_layout(x, call.layout);
  h = in_layout(h, call.layout);
  c = in_layout(c, call.layout);
  weight = in_layout(weight, MemoryFormat::Contiguous);
  bring_contiguous(bias);
  bring_contiguous(reset);
  return call;
}

}  // namespace evkernels
