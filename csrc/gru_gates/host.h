// What the CPU and CUDA host functions of gru_gates, gru_reset and gru_update share: the order of the gate blocks, the
// memory-safety checks, the layout. The argument checks that users meet are in evkernels/ops/gru_gates.py.
#pragma once

#include <string>

#include "common/tensor.h"
#include "gru_gates/order.h"

namespace evkernels {

inline int gru_gate_position(const std::string& order, char letter, size_t count) {
  const size_t found = order.find(letter);
  STD_TORCH_CHECK(order.size() == count && found != std::string::npos, "order must hold each gate once, got ", order);
  return static_cast<int>(found);
}

inline GruGateOrder parse_gru_gate_order(const std::string& order) {
  return {gru_gate_position(order, 'z', 3), gru_gate_position(order, 'r', 3), gru_gate_position(order, 'n', 3)};
}

inline GruResetOrder parse_gru_reset_order(const std::string& order) {
  return {gru_gate_position(order, 'z', 2), gru_gate_position(order, 'r', 2)};
}

// How one call runs: the layout of all tensors and the length of the rows that the kernels see.
struct GruCall {
  MemoryFormat layout;
  int64_t inner;
};

// Checks that `gates` has `blocks` times the channels of h and brings it into the layout.
inline void bring_gru_gates(const char* name, Tensor& gates, int64_t blocks, const Tensor& h, MemoryFormat layout) {
  STD_TORCH_CHECK(gates.dim() == h.dim() && h.dim() >= 2, name, " and h must have as many dimensions, at least 2");
  for (int64_t d = 0; d < h.dim(); ++d)
    STD_TORCH_CHECK(gates.size(d) == (d == 1 ? blocks : 1) * h.size(d), name, " has a shape that does not fit h");
  gates = in_layout(gates, layout);
}

// The prepare functions check the inputs and bring them into the layout of the first.
inline GruCall prepare_gru_gates(Tensor& x_gates, Tensor& h_gates, Tensor& h) {
  STD_TORCH_CHECK(x_gates.scalar_type() == h_gates.scalar_type(), "x_gates and h_gates must be of one dtype");
  const MemoryFormat layout = common_layout(x_gates);
  bring_gru_gates("x_gates", x_gates, 3, h, layout);
  bring_gru_gates("h_gates", h_gates, 3, h, layout);
  h = in_layout(h, layout);
  return {layout, inner_size(h, layout)};
}

inline GruCall prepare_gru_reset(Tensor& zr, Tensor& h) {
  const MemoryFormat layout = common_layout(zr);
  bring_gru_gates("zr", zr, 2, h, layout);
  h = in_layout(h, layout);
  return {layout, inner_size(h, layout)};
}

inline GruCall prepare_gru_update(Tensor& z, Tensor& n, Tensor& h) {
  STD_TORCH_CHECK(z.scalar_type() == n.scalar_type(), "z and n must be of one dtype");
  const MemoryFormat layout = common_layout(z);
  bring_gru_gates("z", z, 1, h, layout);
  bring_gru_gates("n", n, 1, h, layout);
  h = in_layout(h, layout);
  return {layout, inner_size(h, layout)};
}

}  // namespace evkernels
