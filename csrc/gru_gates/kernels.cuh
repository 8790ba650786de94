// ConvGRU gates on the GPU: one thread takes kPack consecutive elements of the state and their gates, see
// common/rows.cuh. The gates' sums are formed in the arithmetic type, never rounded to 16 bits.
#pragma once

#include "common/device_math.cuh"
#include "common/rows.cuh"
#include "gru_gates/order.h"

namespace evkernels {
namespace device_math {
#include "gru_gates/math.inl"
}  // namespace device_math

template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    gru_gates_forward_kernel(const G* __restrict__ x_gates, const G* __restrict__ h_gates, const S* __restrict__ h,
                             S* __restrict__ h_next, GruGateOrder order, int64_t inner, int64_t total) {
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const int64_t row = block_offset<3>(e, inner, total);
  const int64_t at_z = row + order.z * inner, at_r = row + order.r * inner, at_n = row + order.n * inner;
  const auto x_z = load_packed<kPack>(x_gates + at_z), h_z = load_packed<kPack>(h_gates + at_z);
  const auto x_r = load_packed<kPack>(x_gates + at_r), h_r = load_packed<kPack>(h_gates + at_r);
  const auto x_n = load_packed<kPack>(x_gates + at_n), h_n = load_packed<kPack>(h_gates + at_n);
  const auto state = load_packed<kPack>(h + e);
  Packed<S, kPack> result;
#pragma unroll
  for (int k = 0; k < kPack; ++k)
    result[k] = from_float<S>(device_math::gru_gates_math<Compute<G>>(
        to_float(x_z[k]) + to_float(h_z[k]), to_float(x_r[k]) + to_float(h_r[k]), to_float(x_n[k]) + to_float(h_n[k]),
        to_float(state[k])));
  store_packed(h_next + e, result);
}

// d_gates is the gradient of x_gates and of h_gates.
template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    gru_gates_backward_kernel(const S* __restrict__ d_h_next, const G* __restrict__ x_gates,
                              const G* __restrict__ h_gates, const S* __restrict__ h, G* __restrict__ d_gates,
                              S* __restrict__ d_h, GruGateOrder order, int64_t inner, int64_t total) {
  using V = Compute<G>;
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const int64_t row = block_offset<3>(e, inner, total);
  const int64_t at_z = row + order.z * inner, at_r = row + order.r * inner, at_n = row + order.n * inner;
  const auto x_z = load_packed<kPack>(x_gates + at_z), h_z = load_packed<kPack>(h_gates + at_z);
  const auto x_r = load_packed<kPack>(x_gates + at_r), h_r = load_packed<kPack>(h_gates + at_r);
  const auto x_n = load_packed<kPack>(x_gates + at_n), h_n = load_packed<kPack>(h_gates + at_n);
  const auto state = load_packed<kPack>(h + e), arriving = load_packed<kPack>(d_h_next + e);
  Packed<G, kPack> z_pack, r_pack, n_pack;
  Packed<S, kPack> h_pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    V d_z, d_r, d_n, d_state;
    device_math::gru_gates_backward_math<V>(to_float(x_z[k]) + to_float(h_z[k]), to_float(x_r[k]) + to_float(h_r[k]),
                                            to_float(x_n[k]) + to_float(h_n[k]), to_float(state[k]),
                                            to_float(arriving[k]), d_z, d_r, d_n, d_state);
    z_pack[k] = from_float<G>(d_z);
    r_pack[k] = from_float<G>(d_r);
    n_pack[k] = from_float<G>(d_n);
    h_pack[k] = from_float<S>(d_state);
  }
  store_packed(d_gates + at_z, z_pack);
  store_packed(d_gates + at_r, r_pack);
  store_packed(d_gates + at_n, n_pack);
  store_packed(d_h + e, h_pack);
}

template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    gru_reset_forward_kernel(const G* __restrict__ zr, const S* __restrict__ h, G* __restrict__ z_active,
                             G* __restrict__ rh, GruResetOrder order, int64_t inner, int64_t total) {
  using V = Compute<G>;
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const G* const row = zr + block_offset<2>(e, inner, total);
  const auto z = load_packed<kPack>(row + order.z * inner), r = load_packed<kPack>(row + order.r * inner);
  const auto state = load_packed<kPack>(h + e);
  Packed<G, kPack> z_pack, rh_pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    V z_value, rh_value;
    device_math::gru_reset_math<V>(to_float(z[k]), to_float(r[k]), to_float(state[k]), z_value, rh_value);
    z_pack[k] = from_float<G>(z_value);
    rh_pack[k] = from_float<G>(rh_value);
  }
  store_packed(z_active + e, z_pack);
  store_packed(rh + e, rh_pack);
}

// d_z_active or d_rh may be null: a gradient that is zero everywhere.
template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    gru_reset_backward_kernel(const G* __restrict__ d_z_active, const G* __restrict__ d_rh, const G* __restrict__ zr,
                              const S* __restrict__ h, G* __restrict__ d_zr, S* __restrict__ d_h, GruResetOrder order,
                              int64_t inner, int64_t total) {
  using V = Compute<G>;
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const int64_t row = block_offset<2>(e, inner, total);
  const int64_t at_z = row + order.z * inner, at_r = row + order.r * inner;
  const auto z = load_packed<kPack>(zr + at_z), r = load_packed<kPack>(zr + at_r);
  const auto state = load_packed<kPack>(h + e);
  Packed<G, kPack> z_pack = {}, rh_pack = {}, r_pack;
  Packed<S, kPack> h_pack;
  if (d_z_active) z_pack = load_packed<kPack>(d_z_active + e);
  if (d_rh) rh_pack = load_packed<kPack>(d_rh + e);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    V d_z, d_r, d_state;
    device_math::gru_reset_backward_math<V>(to_float(z[k]), to_float(r[k]), to_float(state[k]), to_float(z_pack[k]),
                                            to_float(rh_pack[k]), d_z, d_r, d_state);
    z_pack[k] = from_float<G>(d_z);
    r_pack[k] = from_float<G>(d_r);
    h_pack[k] = from_float<S>(d_state);
  }
  store_packed(d_zr + at_z, z_pack);
  store_packed(d_zr + at_r, r_pack);
  store_packed(d_h + e, h_pack);
}

template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    gru_update_forward_kernel(const G* __restrict__ z, const G* __restrict__ n, const S* __restrict__ h,
                              S* __restrict__ h_next, int64_t total) {
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  const auto z_pack = load_packed<kPack>(z + e), n_pack = load_packed<kPack>(n + e);
  const auto state = load_packed<kPack>(h + e);
  Packed<S, kPack> result;
#pragma unroll
  for (int k = 0; k < kPack; ++k)
    result[k] = from_float<S>(
        device_math::gru_update_math<Compute<G>>(to_float(z_pack[k]), to_float(n_pack[k]), to_float(state[k])));
  store_packed(h_next + e, result);
}

template <int kPack, class G, class S>
__global__ void __launch_bounds__(kRowThreads)
    gru_update_backward_kernel(const S* __restrict__ d_h_next, const G* __restrict__ z, const G* __restrict__ n,
                               const S* __restrict__ h, G* __restrict__ d_z, G* __restrict__ d_n, S* __restrict__ d_h,
                               int64_t total) {
  using V = Compute<G>;
  const int64_t e = first_element<kPack>();
  if (e >= total) return;
  auto z_pack = load_packed<kPack>(z + e), n_pack = load_packed<kPack>(n + e);
  auto h_pack = load_packed<kPack>(h + e);
  const auto arriving = load_packed<kPack>(d_h_next + e);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    V z_value, n_value, h_value;
    device_math::gru_update_backward_math<V>(to_float(z_pack[k]), to_float(n_pack[k]), to_float(h_pack[k]),
                                             to_float(arriving[k]), z_value, n_value, h_value);
    z_pack[k] = from_float<G>(z_value);
    n_pack[k] = from_float<G>(n_value);
    h_pack[k] = from_float<S>(h_value);
  }
  store_packed(d_z + e, z_pack);
  store_packed(d_n + e, n_pack);
  store_packed(d_h + e, h_pack);
}

template <class G, class S>
void launch_gru_gates_forward(const G* x_gates, const G* h_gates, const S* h, S* h_next, GruGateOrder order,
                              int64_t inner, int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((gru_gates_forward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream,
                     x_gates, h_gates, h, h_next, order, inner, total);
  };
  launch_on_rows<G>(inner, total, launch, x_gates, h_gates, h, h_next);
}

template <class G, class S>
void launch_gru_gates_backward(const S* d_h_next, const G* x_gates, const G* h_gates, const S* h, G* d_gates, S* d_h,
                               GruGateOrder order, int64_t inner, int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((gru_gates_backward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream,
                     d_h_next, x_gates, h_gates, h, d_gates, d_h, order, inner, total);
  };
  launch_on_rows<G>(inner, total, launch, d_h_next, x_gates, h_gates, h, d_gates, d_h);
}

template <class G, class S>
void launch_gru_reset_forward(const G* zr, const S* h, G* z_active, G* rh, GruResetOrder order, int64_t inner,
                              int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((gru_reset_forward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream, zr, h,
                     z_active, rh, order, inner, total);
  };
  launch_on_rows<G>(inner, total, launch, zr, h, z_active, rh);
}

template <class G, class S>
void launch_gru_reset_backward(const G* d_z_active, const G* d_rh, const G* zr, const S* h, G* d_zr, S* d_h,
                               GruResetOrder order, int64_t inner, int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((gru_reset_backward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream,
                     d_z_active, d_rh, zr, h, d_zr, d_h, order, inner, total);
  };
  launch_on_rows<G>(inner, total, launch, d_z_active, d_rh, zr, h, d_zr, d_h);
}

template <class G, class S>
void launch_gru_update_forward(const G* z, const G* n, const S* h, S* h_next, int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((gru_update_forward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream, z, n,
                     h, h_next, total);
  };
  launch_on_rows<G>(total, total, launch, z, n, h, h_next);
}

template <class G, class S>
void launch_gru_update_backward(const S* d_h_next, const G* z, const G* n, const S* h, G* d_z, G* d_n, S* d_h,
                                int64_t total, cudaStream_t stream) {
  const auto launch = [&](auto pack, dim3 grid) {
    EVKERNELS_LAUNCH((gru_update_backward_kernel<decltype(pack)::value, G, S>), grid, dim3(kRowThreads), 0, stream,
                     d_h_next, z, n, h, d_z, d_n, d_h, total);
  };
  launch_on_rows<G>(total, total, launch, d_h_next, z, n, h, d_z, d_n, d_h);
}

}  // namespace evkernels
