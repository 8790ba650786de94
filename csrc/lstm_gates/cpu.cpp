// ConvLSTM gates on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.

#include <torch/csrc/stable/library.h>

#include "lstm_gates/host.h"

#define EVKERNELS_LOOPS "lstm_gates/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Elements per task: about 30 us of work, well above the cost of waking a thread.
constexpr int64_t kGrain = 8192;

std::tuple<Tensor, Tensor> lstm_gates(Tensor gates, Tensor c, std::string order) {
  const LstmGatesCall call = prepare_lstm_gates(gates, c, order);
  Tensor h = empty_in_layout(c, gates.scalar_type(), call.layout);
  Tensor c_next = empty_in_layout(c, c.scalar_type(), call.layout);
  dispatch_input_and_state("lstm_gates", gates.scalar_type(), c.scalar_type(), [&](auto g, auto s) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    torch::stable::parallel_for(0, c.numel(), kGrain, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(lstm_gates_loop, data<G>(gates), data<S>(c), mutable_data<G>(h), mutable_data<S>(c_next),
                     call.order, call.inner, begin, end);
    });
  });
  return {h, c_next};
}

std::tuple<Tensor, Tensor> lstm_gates_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c_next,
                                               Tensor gates, Tensor c, std::string order) {
  const LstmGatesCall call = prepare_lstm_gates(gates, c, order);
  bring_gradient("grad_h", grad_h, c, gates.scalar_type(), call.layout);
  bring_gradient("grad_c_next", grad_c_next, c, c.scalar_type(), call.layout);
  Tensor grad_gates = empty_in_layout(gates, gates.scalar_type(), call.layout);
  Tensor grad_c = empty_in_layout(c, c.scalar_type(), call.layout);
  dispatch_input_and_state("lstm_gates_backward", gates.scalar_type(), c.scalar_type(), [&](auto g, auto s) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    torch::stable::parallel_for(0, c.numel(), kGrain, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(lstm_gates_backward_loop, data<G>(grad_h), data<S>(grad_c_next), data<G>(gates), data<S>(c),
                     mutable_data<G>(grad_gates), mutable_data<S>(grad_c), call.order, call.inner, begin, end);
    });
  });
  return {grad_gates, grad_c};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("lstm_gates", TORCH_BOX(&evkernels::lstm_gates));
  m.impl("lstm_gates_backward", TORCH_BOX(&evkernels::lstm_gates_backward));
}
