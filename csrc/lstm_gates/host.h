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

inline void check_lstm_gates(const Tensor& gates, const Tensor& c) {
  STD_TORCH_CHECK(gates.dim() == c.dim() && c.dim() >= 2,
                  "gates and c must have the same number of dimensions, at least 2");
  for (int64_t d = 0; d < c.dim(); ++d) {
    STD_TORCH_CHECK(gates.size(d) == (d == 1 ? 4 : 1) * c.size(d), "gates must be [N, 4*C, ...] and c [N, C, ...]");
  }
}

inline void check_same_shape(const char* name, const std::optional<Tensor>& t, const Tensor& like) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->dim() == like.dim(), name, " must have the shape of the tensor it belongs to");
  for (int64_t d = 0; d < like.dim(); ++d) STD_TORCH_CHECK(t->size(d) == like.size(d), name, " has a wrong shape");
  STD_TORCH_CHECK(t->scalar_type() == like.scalar_type(), name, " has a wrong dtype");
}

// Length of the rows that the loops see.
inline int64_t inner_size(const Tensor& c, MemoryFormat layout) {
  return layout == MemoryFormat::ChannelsLast ? c.size(1) : c.size(0) == 0 ? 1 : c.numel() / c.size(0);
}

}  // namespace evkernels
