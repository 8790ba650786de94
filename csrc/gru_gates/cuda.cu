// ConvGRU gates on CUDA tensors: tensors to pointers, stream, registration. The kernels are in kernels.cuh.

#include "common/cuda_host.h"
#include "gru_gates/host.h"
#include "gru_gates/kernels.cuh"

namespace evkernels {
namespace {

// Calls f(Type<gates>, Type<state>, stream) with the state's device current.
template <class F>
void launch_for(const char* op, const Tensor& gates, const Tensor& h, const F& f) {
  const DeviceScope scope(h);
  dispatch_input_and_state(op, gates.scalar_type(), h.scalar_type(), [&](auto g, auto s) { f(g, s, scope.stream()); });
  EVKERNELS_CHECK_LAUNCH();
}

Tensor gru_gates(Tensor x_gates, Tensor h_gates, Tensor h, std::string order) {
  const GruCall call = prepare_gru_gates(x_gates, h_gates, h);
  const GruGateOrder blocks = parse_gru_gate_order(order);
  Tensor h_next = empty_in_layout(h, h.scalar_type(), call.layout);
  launch_for("gru_gates", x_gates, h, [&](auto g, auto s, cudaStream_t stream) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_gru_gates_forward(data<G>(x_gates), data<G>(h_gates), data<S>(h), mutable_data<S>(h_next), blocks,
                             call.inner, h.numel(), stream);
  });
  return h_next;
}

std::tuple<Tensor, Tensor> gru_gates_backward(Tensor grad_h_next, Tensor x_gates, Tensor h_gates, Tensor h,
                                              std::string order) {
  const GruCall call = prepare_gru_gates(x_gates, h_gates, h);
  const GruGateOrder blocks = parse_gru_gate_order(order);
  bring_gradient("grad_h_next", grad_h_next, h, h.scalar_type(), call.layout);
  Tensor grad_gates = empty_in_layout(x_gates, x_gates.scalar_type(), call.layout);
  Tensor grad_h = empty_in_layout(h, h.scalar_type(), call.layout);
  launch_for("gru_gates_backward", x_gates, h, [&](auto g, auto s, cudaStream_t stream) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_gru_gates_backward(data<S>(grad_h_next), data<G>(x_gates), data<G>(h_gates), data<S>(h),
                              mutable_data<G>(grad_gates), mutable_data<S>(grad_h), blocks, call.inner, h.numel(),
                              stream);
  });
  return {grad_gates, grad_h};
}

std::tuple<Tensor, Tensor> gru_reset(Tensor zr, Tensor h, std::string order) {
  const GruCall call = prepare_gru_reset(zr, h);
  const GruResetOrder blocks = parse_gru_reset_order(order);
  Tensor z = empty_in_layout(h, zr.scalar_type(), call.layout);
  Tensor rh = empty_in_layout(h, zr.scalar_type(), call.layout);
  launch_for("gru_reset", zr, h, [&](auto g, auto s, cudaStream_t stream) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_gru_reset_forward(data<G>(zr), data<S>(h), mutable_data<G>(z), mutable_data<G>(rh), blocks, call.inner,
                             h.numel(), stream);
  });
  return {z, rh};
}

std::tuple<Tensor, Tensor> gru_reset_backward(std::optional<Tensor> grad_z, std::optional<Tensor> grad_rh, Tensor zr,
                                              Tensor h, std::string order) {
  const GruCall call = prepare_gru_reset(zr, h);
  const GruResetOrder blocks = parse_gru_reset_order(order);
  bring_gradient("grad_z", grad_z, h, zr.scalar_type(), call.layout);
  bring_gradient("grad_rh", grad_rh, h, zr.scalar_type(), call.layout);
  Tensor grad_zr = empty_in_layout(zr, zr.scalar_type(), call.layout);
  Tensor grad_h = empty_in_layout(h, h.scalar_type(), call.layout);
  launch_for("gru_reset_backward", zr, h, [&](auto g, auto s, cudaStream_t stream) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_gru_reset_backward(data<G>(grad_z), data<G>(grad_rh), data<G>(zr), data<S>(h), mutable_data<G>(grad_zr),
                              mutable_data<S>(grad_h), blocks, call.inner, h.numel(), stream);
  });
  return {grad_zr, grad_h};
}

Tensor gru_update(Tensor z, Tensor n, Tensor h) {
  const GruCall call = prepare_gru_update(z, n, h);
  Tensor h_next = empty_in_layout(h, h.scalar_type(), call.layout);
  launch_for("gru_update", z, h, [&](auto g, auto s, cudaStream_t stream) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_gru_update_forward(data<G>(z), data<G>(n), data<S>(h), mutable_data<S>(h_next), h.numel(), stream);
  });
  return h_next;
}

std::tuple<Tensor, Tensor, Tensor> gru_update_backward(Tensor grad_h_next, Tensor z, Tensor n, Tensor h) {
  const GruCall call = prepare_gru_update(z, n, h);
  bring_gradient("grad_h_next", grad_h_next, h, h.scalar_type(), call.layout);
  Tensor grad_z = empty_in_layout(z, z.scalar_type(), call.layout);
  Tensor grad_n = empty_in_layout(n, n.scalar_type(), call.layout);
  Tensor grad_h = empty_in_layout(h, h.scalar_type(), call.layout);
  launch_for("gru_update_backward", z, h, [&](auto g, auto s, cudaStream_t stream) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    launch_gru_update_backward(data<S>(grad_h_next), data<G>(z), data<G>(n), data<S>(h), mutable_data<G>(grad_z),
                               mutable_data<G>(grad_n), mutable_data<S>(grad_h), h.numel(), stream);
  });
  return {grad_z, grad_n, grad_h};
}

}  // namespace
}  // namespace evkernels

EVKERNELS_CUDA_LIBRARY(m) {
  m.impl("gru_gates", TORCH_BOX(&evkernels::gru_gates));
  m.impl("gru_gates_backward", TORCH_BOX(&evkernels::gru_gates_backward));
  m.impl("gru_reset", TORCH_BOX(&evkernels::gru_reset));
  m.impl("gru_reset_backward", TORCH_BOX(&evkernels::gru_reset_backward));
  m.impl("gru_update", TORCH_BOX(&evkernels::gru_update));
  m.impl("gru_update_backward", TORCH_BOX(&evkernels::gru_update_backward));
}
