// ConvGRU gates on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.

#include <torch/csrc/stable/library.h>

#include "gru_gates/host.h"

#define EVKERNELS_LOOPS "gru_gates/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Elements per task: about 20 us of work, well above the cost of waking a thread.
constexpr int64_t kGrain = 8192;

// Calls f(Type<gates>, Type<state>, begin, end) for parts of the state's elements, on all threads.
template <class F>
void parallel_over(const char* op, const Tensor& gates, const Tensor& h, const F& f) {
  dispatch_input_and_state(op, gates.scalar_type(), h.scalar_type(), [&](auto g, auto s) {
    torch::stable::parallel_for(0, h.numel(), kGrain, [&](int64_t begin, int64_t end) { f(g, s, begin, end); });
  });
}

Tensor gru_gates(Tensor x_gates, Tensor h_gates, Tensor h, std::string order) {
  const GruCall call = prepare_gru_gates(x_gates, h_gates, h);
  const GruGateOrder blocks = parse_gru_gate_order(order);
  Tensor h_next = empty_in_layout(h, h.scalar_type(), call.layout);
  parallel_over("gru_gates", x_gates, h, [&](auto g, auto s, int64_t begin, int64_t end) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    EVKERNELS_CALL(gru_gates_loop, data<G>(x_gates), data<G>(h_gates), data<S>(h), mutable_data<S>(h_next), blocks,
                   call.inner, begin, end);
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
  parallel_over("gru_gates_backward", x_gates, h, [&](auto g, auto s, int64_t begin, int64_t end) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    EVKERNELS_CALL(gru_gates_backward_loop, data<S>(grad_h_next), data<G>(x_gates), data<G>(h_gates), data<S>(h),
                   mutable_data<G>(grad_gates), mutable_data<S>(grad_h), blocks, call.inner, begin, end);
  });
  return {grad_gates, grad_h};
}

std::tuple<Tensor, Tensor> gru_reset(Tensor zr, Tensor h, std::string order) {
  const GruCall call = prepare_gru_reset(zr, h);
  const GruResetOrder blocks = parse_gru_reset_order(order);
  Tensor z = empty_in_layout(h, zr.scalar_type(), call.layout);
  Tensor rh = empty_in_layout(h, zr.scalar_type(), call.layout);
  parallel_over("gru_reset", zr, h, [&](auto g, auto s, int64_t begin, int64_t end) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    EVKERNELS_CALL(gru_reset_loop, data<G>(zr), data<S>(h), mutable_data<G>(z), mutable_data<G>(rh), blocks, call.inner,
                   begin, end);
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
  parallel_over("gru_reset_backward", zr, h, [&](auto g, auto s, int64_t begin, int64_t end) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    EVKERNELS_CALL(gru_reset_backward_loop, data<G>(grad_z), data<G>(grad_rh), data<G>(zr), data<S>(h),
                   mutable_data<G>(grad_zr), mutable_data<S>(grad_h), blocks, call.inner, begin, end);
  });
  return {grad_zr, grad_h};
}

Tensor gru_update(Tensor z, Tensor n, Tensor h) {
  const GruCall call = prepare_gru_update(z, n, h);
  Tensor h_next = empty_in_layout(h, h.scalar_type(), call.layout);
  parallel_over("gru_update", z, h, [&](auto g, auto s, int64_t begin, int64_t end) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    EVKERNELS_CALL(gru_update_loop, data<G>(z), data<G>(n), data<S>(h), mutable_data<S>(h_next), begin, end);
  });
  return h_next;
}

std::tuple<Tensor, Tensor, Tensor> gru_update_backward(Tensor grad_h_next, Tensor z, Tensor n, Tensor h) {
  const GruCall call = prepare_gru_update(z, n, h);
  bring_gradient("grad_h_next", grad_h_next, h, h.scalar_type(), call.layout);
  Tensor grad_z = empty_in_layout(z, z.scalar_type(), call.layout);
  Tensor grad_n = empty_in_layout(n, n.scalar_type(), call.layout);
  Tensor grad_h = empty_in_layout(h, h.scalar_type(), call.layout);
  parallel_over("gru_update_backward", z, h, [&](auto g, auto s, int64_t begin, int64_t end) {
    using G = typename decltype(g)::type;
    using S = typename decltype(s)::type;
    EVKERNELS_CALL(gru_update_backward_loop, data<S>(grad_h_next), data<G>(z), data<G>(n), data<S>(h),
                   mutable_data<G>(grad_z), mutable_data<G>(grad_n), mutable_data<S>(grad_h), begin, end);
  });
  return {grad_z, grad_n, grad_h};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("gru_gates", TORCH_BOX(&evkernels::gru_gates));
  m.impl("gru_gates_backward", TORCH_BOX(&evkernels::gru_gates_backward));
  m.impl("gru_reset", TORCH_BOX(&evkernels::gru_reset));
  m.impl("gru_reset_backward", TORCH_BOX(&evkernels::gru_reset_backward));
  m.impl("gru_update", TORCH_BOX(&evkernels::gru_update));
  m.impl("gru_update_backward", TORCH_BOX(&evkernels::gru_update_backward));
}
