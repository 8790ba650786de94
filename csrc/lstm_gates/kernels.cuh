// ConvLSTM gates on the GPU: one thread takes kPack consecutive elements of the state and their four gates, see
// common/rows.cuh.
#pragma once

#include "common/device_math.cuh"
#include "common/rows.cuh"
#include "lstm_gates/order.h"

namespace evkernels {
namespace device_math {
#include "lstm_gates/math.inl"
}  // namespace device_math

template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    lstm_gates_forward_kernel(const G* __restrict__ gates, const S* __restrict__ c, G* __restrict__ h,
                              S* __restrict__ c_next, LstmGateOrder order, int64_t inner, int64_t total) {
  using V = Compute<G>;
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const G* const row = gates + block_offset<4>(e, inner, total);
  const auto i = load_packed<kPack>(row + order.i * inner), f = load_packed<kPack>(row + order.f * inner);
  const auto g = load_packed<kPack>(row + order.g * inner), o = load_packed<kPack>(row + order.o * inner);
  const auto state = load_packed<kPack>(c + e);
  Packed<G, kPack> h_pack;
  Packed<S, kPack> c_pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    V h_value, c_value;
    device_math::lstm_gates_math<V>(to_float(i[k]), to_float(f[k]), to_float(g[k]), to_float(o[k]), to_float(state[k]),
                                    h_value, c_value);
    h_pack[k] = from_float<G>(h_value);
    c_pack[k] = from_float<S>(c_value);
  }
  store_packed(h + e, h_pack);
  store_packed(c_next + e, c_pack);
}

// d_h or d_c_next may be null: a gradient that is zero everywhere.
template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    lstm_gates_backward_kernel(const G* __restrict__ d_h, const S* __restrict__ d_c_next, const G* __restrict__ gates,
                               const S* __restrict__ c, G* __restrict__ d_gates, S* __restrict__ d_c,
                               LstmGateOrder order, int64_t inner, int64_t total) {
  using V = Compute<G>;
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const int64_t row = block_offset<4>(e, inner, total);
  const int64_t at_i = row + order.i * inner, at_f = row + order.f * inner;
  const int64_t at_g = row + order.g * inner, at_o = row + order.o * inner;
  const auto i = load_packed<kPack>(gates + at_i), f = load_packed<kPack>(gates + at_f);
  const auto g = load_packed<kPack>(gates + at_g), o = load_packed<kPack>(gates + at_o);
  const auto state = load_packed<kPack>(c + e);
  Packed<G, kPack> h_pack = {}, i_pack, f_pack, g_pack, o_pack;
  Packed<S, kPack> c_next_pack = {}, c_pack;
  if (d_h) h_pack = load_packed<kPack>(d_h + e);
  if (d_c_next) c_next_pack = load_packed<kPack>(d_c_next + e);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    V d_i, d_f, d_g, d_o, d_state;
    device_math::lstm_gates_backward_math<V>(to_float(i[k]), to_float(f[k]), to_float(g[k]), to_float(o[k]),
                                             to_float(state[k]), to_float(h_pack[k]), to_float(c_next_pack[k]), d_i,
                                             d_f, d_g, d_o, d_state);
    i_pack[k] = from_float<G>(d_i);
    f_pack[k] = from_float<G>(d_f);
    g_pack[k] = from_float<G>(d_g);
    o_pack[k] = from_float<G>(d_o);
    c_pack[k] = from_float<S>(d_state);
  }
  store_packed(d_gates + at_i, i_pack);
  store_packed(d_gates + at_f, f_pack);
  store_packed(d_gates + at_g, g_pack);
  store_packed(d_gates + at_o, o_pack);
  store_packed(d_c + e, c_pack);
}

template <class G, class S>
void launch_lstm_gates_forward(const G* gates, const S* c, G* h, S* c_next, LstmGateOrder order, int64_t inner,
                               int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((lstm_gates_forward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream,
                     gates, c, h, c_next, order, inner, total);
  };
  launch_on_rows<G>(inner, total, launch, gates, c, h, c_next);
}

template <class G, class S>
void launch_lstm_gates_backward(const G* d_h, const S* d_c_next, const G* gates, const S* c, G* d_gates, S* d_c,
                                LstmGateOrder order, int64_t inner, int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((lstm_gates_backward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream, d_h,
                     d_c_next, gates, c, d_gates, d_c, order, inner, total);
  };
  launch_on_rows<G>(inner, total, launch, d_h, d_c_next, gates, c, d_gates, d_c);
}

}  // namespace evkernels
