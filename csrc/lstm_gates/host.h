// What the CPU and CUDA host functions of lstm_gates share: the order of the gate blocks and the memory-safety checks.
// The argument checks that users meet are in evkernels/ops/lstm_gates.py.
#pragma once

#include <string>

#include "common/tensor.h"
#include "lstm_gates/order.h"

namespace evkernels {

inline LstmGateOrder parse_lstm_gate_order(const std::string& order) {
  const auto position = [&](char letter) {
    const size_t found = order.find(letter);
    STD_TORCH_CHECK(order.size() == 4 && found != std::string::npos, "order must be a permutation of ifgo, got ",
                    order);
    return static_cast<int>(found);
  };
  return {position('i'), position('f'), position('g'), position('o')};
}

// How one call runs: the layout of all tensors, the order of the gate blocks, the length of the rows that the kernels
// see.
struct LstmGatesCall {
  MemoryFormat layout;
  LstmGateOrder order;
  int64_t inner;
};

// Checks the inputs and brings them into the layout of `gates`.
inline LstmGatesCall prepare_lstm_gates(Tensor& gates, Tensor& c, const std::string& order) {
  STD_TORCH_CHECK(gates.dim() == c.dim() && c.dim() >= 2, "gates and c must have as many dimensions, at least 2");
  for (int64_t d = 0; d < c.dim(); ++d)
    STD_TORCH_CHECK(gates.size(d) == (d == 1 ? 4 : 1) * c.size(d), "gates must be [N, 4*C, ...] and c [N, C, ...]");
  const MemoryFormat layout = common_layout(gates);
  gates = in_layout(gates, layout);
  c = in_layout(c, layout);
  return {layout, parse_lstm_gate_order(order), inner_size(c, layout)};
}

}  // namespace evkernels
