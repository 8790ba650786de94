// A 1x1 ConvLSTM over a sequence on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl.

#include <torch/csrc/stable/library.h>

#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "common/workspace.h"
#include "conv_lstm_1x1/host.h"

#define EVKERNELS_LOOPS "conv_lstm_1x1/loops.inl"
#define EVKERNELS_AMX_LOOPS "conv_lstm_1x1/amx.inl"
#include "common/foreach_isa.h"

#if defined(__x86_64__)
// The loops once more, for processors whose AVX-512 multiplies pairs of bfloat16.
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace evkernels {
namespace {
namespace avx512_bf16 {
#define EVKERNELS_LANES 16
#define EVKERNELS_BF16_DOT
#include "common/vec.inl"
#include EVKERNELS_LOOPS
#undef EVKERNELS_BF16_DOT
#undef EVKERNELS_LANES
}  // namespace avx512_bf16
}  // namespace
}  // namespace evkernels
#pragma GCC pop_options
#endif

namespace evkernels {
namespace {

// Whether the loops with pairs of bfloat16 serve: pairs must not straddle x and h, nor h and what pads it.
bool multiplies_pairs(const ConvLstmShape& s) {
#if defined(__x86_64__)
  return current_isa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") && s.inputs % 2 == 0 &&
         s.channels % 2 == 0;
#else
  return false;
#endif
}

// EVKERNELS_CALL, or the copy with pairs of bfloat16 where the data is that and `pairs` is true.
#if defined(__x86_64__)
#define EVKERNELS_CALL_PAIRS(T, pairs, function, ...)       \
  [&] {                                                     \
    if constexpr (std::is_same_v<T, BFloat16>) {            \
      if (pairs) return avx512_bf16::function(__VA_ARGS__); \
    }                                                       \
    EVKERNELS_CALL(function, __VA_ARGS__);                  \
  }()
#else
#define EVKERNELS_CALL_PAIRS(T, pairs, function, ...) EVKERNELS_CALL(function, __VA_ARGS__)
#endif

#if defined(__x86_64__)
// Calls function(std::integral_constant with the parts) and returns true where tiles of AMX serve: 16-bit data that
// they take as it is, float32 data whose products may be rounded.
template <class T, class Function>
bool with_tiles(const std::string& precision, Function function) {
  if (current_isa() < Isa::kAmx) return false;
  if constexpr (std::is_same_v<T, BFloat16>) {
    function(std::integral_constant<int, 1>{});
    return true;
  } else if constexpr (std::is_same_v<T, float>) {
    if (precision == "medium") function(std::integral_constant<int, 1>{});
    if (precision == "high") function(std::integral_constant<int, 2>{});
    return precision != "highest";
  }
  return false;
}
#endif

Tensor empty(const Tensor& like, ScalarType dtype, std::vector<int64_t> sizes, bool needed,
             MemoryFormat layout = MemoryFormat::Contiguous) {
  if (!needed) sizes = {0};
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              needed ? layout : MemoryFormat::Contiguous);
}

#if defined(__x86_64__)
template <int parts, class T, class S>
void forward_on_tiles(const ConvLstmForward<T, S>& pointers, const T* weight, const T* bias, const ConvLstmShape& s) {
  const auto packed = workspace<BFloat16>(amx::amx_packed_size<parts>(s));
  amx::amx_pack<parts>(weight, bias, packed.get(), s);
  torch::stable::parallel_for(0, amx::conv_lstm_tiles(s), 1, [&](int64_t begin, int64_t end) {
    const auto buffer = workspace<char>(amx::amx_buffer_size<parts>(s));
    amx::amx_forward<parts>(pointers, packed.get(), buffer.get(), s, begin, end);
  });
}

template <int parts, class T, class S>
void backward_on_tiles(const ConvLstmBackward<T, S>& pointers, const T* weight, const T* bias, T* d_weight, T* d_bias,
                       const ConvLstmShape& s) {
  const auto packed = workspace<BFloat16>(amx::amx_packed_size<parts>(s));
  if (s.kept < s.channels) amx::amx_pack<parts>(weight, bias, packed.get(), s);
  const auto panels = workspace<BFloat16>(amx::amx_panels_size<parts>(s));
  amx::amx_pack_backward<parts>(weight, panels.get(), s);
  const int64_t groups = amx::conv_lstm_groups(s);
  const auto sums = workspace<float>(groups * amx::amx_sums_size<parts>(s));
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = workspace<char>(amx::amx_backward_buffer_size<parts>(s));
    amx::amx_backward<parts>(pointers, packed.get(), panels.get(), sums.get(), buffer.get(), s, begin, end);
  });
  torch::stable::parallel_for(0, amx::amx_gate_blocks(s), 1, [&](int64_t begin, int64_t end) {
    amx::amx_reduce<parts>(sums.get(), d_weight, d_bias, s, begin, end);
  });
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_lstm_1x1(Tensor x, Tensor h, Tensor c, Tensor weight,
                                                         std::optional<Tensor> bias, std::optional<Tensor> reset,
                                                         std::string order, std::string save, std::string precision) {
  ConvLstmCall call = prepare_conv_lstm(x, h, c, weight, bias, reset, order, precision);
  ConvLstmShape& s = call.shape;
  const bool pairs = multiplies_pairs(s);
  const bool keeps_gates = save == "gates", keeps_cells = save != "none";
  Tensor output = empty(x, x.scalar_type(), {x.size(0), s.channels, x.size(2), x.size(3)}, true, call.layout);
  Tensor c_last = empty_in_layout(c, c.scalar_type(), call.layout);
  Tensor gates = empty(x, x.scalar_type(), {x.size(0), s.pixels, 4 * s.kept}, keeps_gates);
  Tensor cells = empty(x, c.scalar_type(), {x.size(0), s.pixels, s.channels}, keeps_cells);
  dispatch_input_and_state("conv_lstm_1x1", x.scalar_type(), c.scalar_type(), [&](auto input, auto state) {
    using T = typename decltype(input)::type;
    using S = typename decltype(state)::type;
    using R = Compute<T>;
    const ConvLstmForward<T, S> pointers = {data<T>(x),
                                            data<T>(h),
                                            data<S>(c),
                                            data<bool>(reset),
                                            mutable_data<T>(output),
                                            mutable_data<S>(c_last),
                                            keeps_gates ? mutable_data<T>(gates) : nullptr,
                                            keeps_cells ? mutable_data<S>(cells) : nullptr};
#if defined(__x86_64__)
    const bool done = with_tiles<T>(
        precision, [&](auto parts) { forward_on_tiles<parts>(pointers, data<T>(weight), data<T>(bias), s); });
    if (done) return;
#endif
    const auto packed = workspace<R>(EVKERNELS_CALL(conv_lstm_packed_size<T>, s));
    EVKERNELS_CALL_PAIRS(T, pairs, conv_lstm_pack, data<T>(weight), data<T>(bias), packed.get(), s);
    torch::stable::parallel_for(0, EVKERNELS_CALL(conv_lstm_tiles, s), 1, [&](int64_t begin, int64_t end) {
      const auto buffer = zeroed_workspace<R>(EVKERNELS_CALL(conv_lstm_buffer_size<T>, s));
      EVKERNELS_CALL_PAIRS(T, pairs, conv_lstm_forward, pointers, packed.get(), buffer.get(), s, begin, end);
    });
  });
  return {output, c_last, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_lstm_1x1_backward(
    std::optional<Tensor> grad_output, std::optional<Tensor> grad_c_last, Tensor x, Tensor h, Tensor c, Tensor weight,
    std::optional<Tensor> bias, std::optional<Tensor> reset, Tensor output, Tensor gates, Tensor cells,
    std::string order, std::string precision, std::vector<bool> output_mask) {
  ConvLstmCall call = prepare_conv_lstm(x, h, c, weight, bias, reset, order, precision);
  ConvLstmShape& s = call.shape;
  const bool pairs = multiplies_pairs(s);
  STD_TORCH_CHECK(
      has_shape(output, {x.size(0), s.channels, x.size(2), x.size(3)}) && output.scalar_type() == x.scalar_type(),
      "output must be that of the forward");
  STD_TORCH_CHECK(has_shape(cells, {x.size(0), s.pixels, s.channels}) && cells.scalar_type() == c.scalar_type(),
                  "cells must be [T*N, H*W, C] in the dtype of c");
  // Without elements they are absent, or there is nothing to read.
  if (gates.numel() == 0) s.kept = 0;
  STD_TORCH_CHECK(
      s.kept == 0 || (has_shape(gates, {x.size(0), s.pixels, 4 * s.kept}) && gates.scalar_type() == x.scalar_type()),
      "gates must be [T*N, H*W, 4*K] in the dtype of x with K as the forward has it, or empty");
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask must have 5 entries");
  bring_gradient("grad_output", grad_output, output, x.scalar_type(), call.layout);
  bring_gradient("grad_c_last", grad_c_last, c, c.scalar_type(), call.layout);
  output = in_layout(output, call.layout);
  gates = in_layout(gates, MemoryFormat::Contiguous);
  cells = in_layout(cells, MemoryFormat::Contiguous);
  Tensor d_x = empty(x, x.scalar_type(), {x.size(0), s.inputs, x.size(2), x.size(3)}, output_mask[0], call.layout);
  Tensor d_h = empty(x, x.scalar_type(), {s.batch, s.channels, x.size(2), x.size(3)}, output_mask[1], call.layout);
  Tensor d_c = empty(x, c.scalar_type(), {s.batch, s.channels, x.size(2), x.size(3)}, output_mask[2], call.layout);
  Tensor d_weight = empty(x, x.scalar_type(), {4 * s.channels, s.inputs + s.channels, 1, 1}, output_mask[3]);
  Tensor d_bias = empty(x, x.scalar_type(), {4 * s.channels}, output_mask[4]);
  dispatch_input_and_state("conv_lstm_1x1_backward", x.scalar_type(), c.scalar_type(), [&](auto input, auto state) {
    using T = typename decltype(input)::type;
    using S = typename decltype(state)::type;
    using R = Compute<T>;
    const ConvLstmBackward<T, S> pointers = {data<T>(grad_output),
                                             data<S>(grad_c_last),
                                             data<T>(x),
                                             data<T>(h),
                                             data<T>(output),
                                             data<bool>(reset),
                                             data<T>(gates),
                                             data<S>(cells),
                                             output_mask[0] ? mutable_data<T>(d_x) : nullptr,
                                             output_mask[1] ? mutable_data<T>(d_h) : nullptr,
                                             output_mask[2] ? mutable_data<S>(d_c) : nullptr,
                                             output_mask[3]};
    T* const to_weight = output_mask[3] ? mutable_data<T>(d_weight) : nullptr;
    T* const to_bias = output_mask[4] ? mutable_data<T>(d_bias) : nullptr;
#if defined(__x86_64__)
    const bool done = with_tiles<T>(precision, [&](auto parts) {
      backward_on_tiles<parts>(pointers, data<T>(weight), data<T>(bias), to_weight, to_bias, s);
    });
    if (done) return;
#endif
    const auto packed = workspace<R>(EVKERNELS_CALL(conv_lstm_packed_size<T>, s));
    if (s.kept < s.channels) {
      EVKERNELS_CALL_PAIRS(T, pairs, conv_lstm_pack, data<T>(weight), data<T>(bias), packed.get(), s);
    }
    const auto panels = workspace<R>(EVKERNELS_CALL(conv_lstm_panels_size<T>, s));
    EVKERNELS_CALL_PAIRS(T, pairs, conv_lstm_pack_backward, data<T>(weight), panels.get(), s);
    const int64_t groups = EVKERNELS_CALL(conv_lstm_groups, s);
    const auto sums = workspace<R>(groups * EVKERNELS_CALL(conv_lstm_sums_size<T>, s));
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const auto buffer = zeroed_workspace<R>(EVKERNELS_CALL(conv_lstm_backward_buffer_size<T>, s));
      EVKERNELS_CALL_PAIRS(T, pairs, conv_lstm_backward, pointers, packed.get(), panels.get(), sums.get(), buffer.get(),
                           s, begin, end);
    });
    torch::stable::parallel_for(0, s.channels, 16, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(conv_lstm_reduce, sums.get(), to_weight, to_bias, s, begin, end);
    });
  });
  return {d_x, d_h, d_c, d_weight, d_bias};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("conv_lstm_1x1", TORCH_BOX(&evkernels::conv_lstm_1x1));
  m.impl("conv_lstm_1x1_backward", TORCH_BOX(&evkernels::conv_lstm_1x1_backward));
}
