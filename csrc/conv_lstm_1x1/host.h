// Shapes, order and memory-safety checks of conv_lstm_1x1 on the host. The argument checks that users meet are in
// evkernels/ops/conv_lstm_1x1.py.
#pragma once

#include "conv_lstm_1x1/shape.h"
#include "lstm_gates/host.h"

namespace evkernels {

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes) {
    if (t.size(d++) != size) return false;
  }
  return true;
}

inline void bring_contiguous(std::optional<Tensor>& t) {
  if (t.has_value()) t = in_layout(*t, MemoryFormat::Contiguous);
}

struct ConvLstmCall {
  ConvLstmShape shape;
  MemoryFormat layout;
};

// Checks the inputs and brings them into the layout of the frames x [T*N, Cin, H, W].
inline ConvLstmCall prepare_conv_lstm(Tensor& x, Tensor& h, Tensor& c, Tensor& weight, std::optional<Tensor>& bias,
                                      std::optional<Tensor>& reset, const std::string& order,
                                      const std::string& precision) {
  STD_TORCH_CHECK(x.dim() == 4 && h.dim() == 4, "x must be [T*N, Cin, H, W] and h [N, C, H, W]");
  ConvLstmCall call;
  ConvLstmShape& s = call.shape;
  s.batch = h.size(0);
  s.steps = s.batch == 0 ? 0 : x.size(0) / s.batch;
  s.inputs = x.size(1);
  s.channels = h.size(1);
  s.pixels = x.size(2) * x.size(3);
  // Beside c, these are at most 45 % of the 8 * C values per pixel and step that plain PyTorch keeps.
  s.kept = s.channels * 13 / 20 / 16 * 16;
  s.order = parse_lstm_gate_order(order);
  STD_TORCH_CHECK(precision == "highest" || precision == "high" || precision == "medium",
                  "precision must be highest, high or medium, got ", precision);
  call.layout = common_layout(x);
  s.channels_last = call.layout == MemoryFormat::ChannelsLast;
  STD_TORCH_CHECK(x.size(0) == s.steps * s.batch, "x must hold a whole number of steps");
  STD_TORCH_CHECK(has_shape(h, {s.batch, s.channels, x.size(2), x.size(3)}) &&
                      has_shape(c, {s.batch, s.channels, x.size(2), x.size(3)}),
                  "h and c must be [N, C, H, W] with the height and width of x");
  STD_TORCH_CHECK(has_shape(weight, {4 * s.channels, s.inputs + s.channels, 1, 1}),
                  "weight must be [4*C, Cin + C, 1, 1]");
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
