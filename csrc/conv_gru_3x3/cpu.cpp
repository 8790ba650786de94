// A 3x3 ConvGRU over a sequence on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl.

#include <torch/csrc/stable/library.h>

#include "common/workspace.h"
#include "conv_gru_3x3/host.h"
#include "conv_lstm_3x3/frames.h"

#define EVKERNELS_LOOPS "conv_gru_3x3/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor, Tensor> conv_gru_3x3(Tensor x, Tensor h, Tensor weight_z, std::optional<Tensor> bias_z,
                                                Tensor weight_r, std::optional<Tensor> bias_r, Tensor weight_n,
                                                std::optional<Tensor> bias_n, std::optional<Tensor> reset, bool keep) {
  Tensor* weights[3] = {&weight_z, &weight_r, &weight_n};
  std::optional<Tensor>* biases[3] = {&bias_z, &bias_r, &bias_n};
  const ConvGru3x3Call call = prepare_conv_gru_3x3(x, h, weights, biases, reset);
  const ConvGru3x3Shape& s = call.shape;
  const Maps& m = s.maps;
  Tensor output = empty_frames(x, h.scalar_type(), s.channels, true, call.layout);
  Tensor zr = empty_frames(x, x.scalar_type(), 2 * s.channels, keep, MemoryFormat::ChannelsLast);
  Tensor n = empty_frames(x, x.scalar_type(), s.channels, keep, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return {output, zr, n};
  dispatch_input_and_state("conv_gru_3x3", x.scalar_type(), h.scalar_type(), [&](auto input, auto state) {
    using T = typename decltype(input)::type;
    using S = typename decltype(state)::type;
    using R = Compute<T>;
    const WinogradShape reset_shape = s.reset_convolution(), candidate_shape = s.candidate_convolution();
    const int64_t stride = EVKERNELS_CALL(whole_vectors<R>, s.channels);
    const int64_t x_stride = EVKERNELS_CALL(whole_vectors<R>, s.inputs);
    const int64_t map_size = EVKERNELS_CALL(maps_size<R>, stride, m);
    const auto packed_zr = workspace<R>(EVKERNELS_CALL(winograd_packed_size<R>, reset_shape));
    const auto packed_n = workspace<R>(EVKERNELS_CALL(winograd_packed_size<R>, candidate_shape));
    const auto biases_of_gates = workspace<R>(3 * stride);
    R *const bias_zr = biases_of_gates.get(), *const bias_of_n = bias_zr + 2 * stride;
    const bool x_is_maps = EVKERNELS_CALL(are_maps<T>, s.inputs, s.channels_last);
    // A reset writes to the state before a step, which must then be a copy.
    const bool h_is_maps = EVKERNELS_CALL(are_maps<S>, s.channels, s.channels_last) && !reset.has_value();
    const auto x_copy = workspace<R>(x_is_maps ? 0 : EVKERNELS_CALL(maps_size<R>, x_stride, m));
    const auto maps = workspace<R>((h_is_maps ? 1 : 3) * map_size);
    R* const rh = maps.get();
    R* const copies[2] = {rh + map_size, rh + 2 * map_size};
    const ConvGru3x3Gate<T> gates[3] = {{data<T>(weight_z), data<T>(bias_z)},
                                        {data<T>(weight_r), data<T>(bias_r)},
                                        {data<T>(weight_n), data<T>(bias_n)}};
    parallel_for(0, EVKERNELS_CALL(winograd_panels<R>, reset_shape), 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(conv_gru_3x3_pack, gates, packed_zr.get(), bias_zr, reset_shape, begin, end);
    });
    parallel_for(0, EVKERNELS_CALL(winograd_panels<R>, candidate_shape), 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(conv_gru_3x3_pack, gates + 2, packed_n.get(), bias_of_n, candidate_shape, begin, end);
    });
    if (!h_is_maps) {
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(load_rows, data<S>(h), s.channels, s.channels_last, copies[0], stride, m, begin, end);
      });
    }
    const R* now = h_is_maps ? data<R>(h) : copies[0];
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t frame = t * m.batch, pixels = frame * m.pixels();
      R* const next = h_is_maps ? mutable_data<R>(output) + pixels * s.channels : copies[(t + 1) % 2];
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        if (!x_is_maps) {
          EVKERNELS_CALL(load_rows, data<T>(x) + pixels * s.inputs, s.inputs, s.channels_last, x_copy.get(), x_stride,
                         m, begin, end);
        }
        if (!reset.has_value()) return;
        EVKERNELS_CALL(restart_rows, data<bool>(reset) + frame, copies[t % 2], stride, m, begin, end);
      });
      const ConvGru3x3Step<T, R> step = {x_is_maps ? data<R>(x) + pixels * s.inputs : x_copy.get(),
                                         now,
                                         rh,
                                         next,
                                         bias_zr,
                                         bias_of_n,
                                         keep ? mutable_data<T>(zr) + pixels * 2 * s.channels : nullptr,
                                         keep ? mutable_data<T>(n) + pixels * s.channels : nullptr};
      parallel_for(0, EVKERNELS_CALL(winograd_blocks<R>, reset_shape), 1, [&](int64_t begin, int64_t end) {
        const auto buffer = workspace<R>(EVKERNELS_CALL(winograd_buffer_size<R>, reset_shape));
        EVKERNELS_CALL(conv_gru_3x3_reset, step, packed_zr.get(), buffer.get(), s, begin, end);
      });
      parallel_for(0, EVKERNELS_CALL(winograd_blocks<R>, candidate_shape), 1, [&](int64_t begin, int64_t end) {
        const auto buffer = workspace<R>(EVKERNELS_CALL(winograd_buffer_size<R>, candidate_shape));
        EVKERNELS_CALL(conv_gru_3x3_update<S>, step, packed_n.get(), buffer.get(), s, begin, end);
      });
      now = next;
      if (h_is_maps) continue;
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(store_rows, next, stride, mutable_data<S>(output) + pixels * s.channels, s.channels,
                       s.channels_last, m, begin, end);
      });
    }
  });
  return {output, zr, n};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) { m.impl("conv_gru_3x3", TORCH_BOX(&evkernels::conv_gru_3x3)); }
