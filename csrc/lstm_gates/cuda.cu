// ConvLSTM gates on CUDA tensors: tensors to pointers, stream, registration. The kernels are in kernels.cuh.

#include "common/cuda_host.h"
#include "lstm_gates/host.h"
#include "lstm_gates/kernels.cuh"

namespace evkernels {
namespace {

std::tuple<Tensor, Tensor> lstm_gates(Tensor gates, Tensor c, std::string order) {
  const LstmGatesCall call = prepare_lstm_gates(gates, c, order);
  Tensor h = empty_in_layout(c, gates.scalar_type(), call.layout);
  Tensor c_next = empty_in_layout(c, c.scalar_type(), call.layout);
  const DeviceScope scope(c);
  dispatch_input_and_state("lstm_gates", gates.scalar_type(), c.scalar_type(), [&](auto g, auto s) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_lstm_gates_forward(data<G>(gates), data<S>(c), mutable_data<G>(h), mutable_data<S>(c_next), call.order,
                              call.inner, c.numel(), scope.stream());
  });
  EVKERNELS_CHECK_LAUNCH();
  return {h, c_next};
}

std::tuple<Tensor, Tensor> lstm_gates_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c_next,
                                               Tensor gates, Tensor c, std::string order) {
  const LstmGatesCall call = prepare_lstm_gates(gates, c, order);
  bring_gradient("grad_h", grad_h, c, gates.scalar_type(), call.layout);
  bring_gradient("grad_c_next", grad_c_next, c, c.scalar_type(), call.layout);
  Tensor grad_gates = empty_in_layout(gates, gates.scalar_type(), call.layout);
  Tensor grad_c = empty_in_layout(c, c.scalar_type(), call.layout);
  const DeviceScope scope(c);
  dispatch_input_and_state("lstm_gates_backward", gates.scalar_type(), c.scalar_type(), [&](auto g, auto s) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_lstm_gates_backward(data<G>(grad_h), data<S>(grad_c_next), data<G>(gates), data<S>(c),
                               mutable_data<G>(grad_gates), mutable_data<S>(grad_c), call.order, call.inner, c.numel(),
                               scope.stream());
  });
  EVKERNELS_CHECK_LAUNCH();
  return {grad_gates, grad_c};
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) {
  m.impl("lstm_gates", TORCH_BOX(&evkernels::lstm_gates));
  m.impl("lstm_gates_backward", TORCH_BOX(&evkernels::lstm_gates_backward));
}
