// A 3x3 ConvLSTM over a sequence on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "common/workspace.h"
#include "conv_lstm_3x3/host.h"
#include "conv_lstm_3x3/frames.h"

#define EVKERNELS_LOOPS "conv_lstm_3x3/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

using torch::stable::parallel_for;

// Elements of the transformed weight of a gradient in any instruction set: whole panels of the widest vectors.
int64_t transformed_size(const WinogradShape& s) { return 16 * ((s.channels + 63) / 64 * 64) * s.inputs[0]; }

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_lstm_3x3(Tensor x, Tensor h, Tensor c, Tensor weight,
                                                         std::optional<Tensor> bias, std::optional<Tensor> reset,
                                                         std::string order, bool keep) {
  const ConvLstm3x3Call call = prepare_conv_lstm_3x3(x, h, c, weight, bias, reset, order);
  const ConvLstm3x3Shape& s = call.shape;
  const Maps& m = s.maps;
  Tensor output = empty_frames(x, x.scalar_type(), s.channels, true, call.layout);
  Tensor c_last = empty_in_layout(c, c.scalar_type(), call.layout);
  Tensor gates = empty_frames(x, x.scalar_type(), 4 * s.channels, keep, MemoryFormat::ChannelsLast);
  Tensor cells = empty_frames(x, c.scalar_type(), s.channels, keep, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return {output, c_last, gates, cells};
  dispatch_input_and_state("conv_lstm_3x3", x.scalar_type(), c.scalar_type(), [&](auto input, auto state) {
    using T = typename decltype(input)::type;
    using S = typename decltype(state)::type;
    using R = Compute<T>;
    const WinogradShape w = s.convolution();
    const int64_t panels = EVKERNELS_CALL(winograd_panels<R>, w), blocks = EVKERNELS_CALL(winograd_blocks<R>, w);
    const int64_t stride = EVKERNELS_CALL(state_stride<R>, s.channels);
    const int64_t x_stride = EVKERNELS_CALL(whole_vectors<R>, s.inputs);
    const int64_t map_size = EVKERNELS_CALL(maps_size<R>, stride, m);
    const auto packed = workspace<R>(EVKERNELS_CALL(winograd_packed_size<R>, w));
    const auto packed_bias = workspace<R>(4 * EVKERNELS_CALL(whole_vectors<R>, s.channels));
    const auto x_maps = workspace<R>(EVKERNELS_CALL(maps_size<R>, x_stride, m));
    const auto state_maps = workspace<R>(3 * map_size);
    R *now = state_maps.get(), *next = now + map_size, *const cell = next + map_size;
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(conv_lstm_3x3_pack, data<T>(weight), data<T>(bias), packed.get(), packed_bias.get(), s, begin,
                     end);
    });
    EVKERNELS_CALL(zero_borders, x_maps.get(), x_stride, m);
    EVKERNELS_CALL(zero_borders, now, stride, m);
    EVKERNELS_CALL(zero_borders, next, stride, m);
    parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(load_rows, data<T>(h), s.channels, s.channels_last, now, stride, m, begin, end);
      EVKERNELS_CALL(load_rows, data<S>(c), s.channels, s.channels_last, cell, stride, m, begin, end);
    });
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t frame = t * m.batch, pixels = frame * m.pixels();
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(load_rows, data<T>(x) + pixels * s.inputs, s.inputs, s.channels_last, x_maps.get(), x_stride, m,
                       begin, end);
        if (!reset.has_value()) return;
        EVKERNELS_CALL(restart_rows, data<bool>(reset) + frame, now, stride, m, begin, end);
        EVKERNELS_CALL(restart_rows, data<bool>(reset) + frame, cell, stride, m, begin, end);
      });
      const ConvLstm3x3Step<T, S, R> step = {x_maps.get(),
                                             now,
                                             next,
                                             cell,
                                             packed_bias.get(),
                                             keep ? mutable_data<T>(gates) + pixels * 4 * s.channels : nullptr,
                                             keep ? mutable_data<S>(cells) + pixels * s.channels : nullptr};
      parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        const auto buffer = workspace<R>(EVKERNELS_CALL(winograd_buffer_size<R>, w));
        EVKERNELS_CALL(conv_lstm_3x3_step, step, packed.get(), buffer.get(), s, begin, end);
      });
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(store_rows, next, stride, mutable_data<T>(output) + pixels * s.channels, s.channels,
                       s.channels_last, m, begin, end);
      });
      std::swap(now, next);
    }
    parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(store_rows, cell, stride, mutable_data<S>(c_last), s.channels, s.channels_last, m, begin, end);
    });
  });
  return {output, c_last, gates, cells};
}

// A transformed weight, of the size that the widest vectors need, behind it zeros: pack(type of the weight's elements,
// where to, panels [begin, end)).
template <class F>
Tensor packed_weight(const char* op, const Tensor& weight, const WinogradShape& s, const F& pack) {
  const auto dtype = weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor packed = torch::stable::empty({transformed_size(s)}, dtype, std::nullopt, weight.device());
  dispatch_floating(op, weight.scalar_type(), [&](auto type) {
    using R = Compute<typename decltype(type)::type>;
    R* const to = mutable_data<R>(packed);
    parallel_for(0, EVKERNELS_CALL(winograd_panels<R>, s), 1,
                 [&](int64_t begin, int64_t end) { pack(type, to, begin, end); });
    std::fill(to + EVKERNELS_CALL(winograd_written_size<R>, s), to + packed.numel(), R{0});
  });
  return packed;
}

// What conv_3x3_input_gradient makes of the input channels [first, first + count) of a weight, for any number of calls.
Tensor conv_3x3_gradient_weight(Tensor weight, int64_t first, int64_t count) {
  STD_TORCH_CHECK(weight.dim() == 4 && first >= 0 && count >= 0 && first + count <= weight.size(1) &&
                      has_shape(weight, {weight.size(0), weight.size(1), 3, 3}),
                  "weight must be [C, at least first + count, 3, 3]");
  const WinogradShape s = {{0, 0, 0}, {weight.size(0), 0}, count, 1};
  weight = in_layout(weight, MemoryFormat::Contiguous);
  return packed_weight("conv_3x3_gradient_weight", weight, s, [&](auto type, auto* to, int64_t begin, int64_t end) {
    using T = typename decltype(type)::type;
    EVKERNELS_CALL(input_gradient_pack, data<T>(weight) + first * 9, weight.size(1), to, s, begin, end);
  });
}

// What conv_3x3 makes of a weight [Cout, Cin, 3, 3], for any number of calls.
Tensor conv_3x3_packed_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && has_shape(weight, {weight.size(0), weight.size(1), 3, 3}),
                  "weight must be [Cout, Cin, 3, 3]");
  const WinogradShape s = {{0, 0, 0}, {weight.size(1), 0}, weight.size(0), 1};
  weight = in_layout(weight, MemoryFormat::Contiguous);
  return packed_weight("conv_3x3_packed_weight", weight, s, [&](auto type, auto* to, int64_t begin, int64_t end) {
    using T = typename decltype(type)::type;
    EVKERNELS_CALL(convolution_pack, data<T>(weight), to, s, begin, end);
  });
}

// The gradient of the input channels [first, first + count), channels_last; `packed` is conv_3x3_gradient_weight's.
Tensor conv_3x3_input_gradient(Tensor grad, Tensor weight, Tensor packed, int64_t first, int64_t count) {
  const MemoryFormat layout = common_layout(grad);
  STD_TORCH_CHECK(grad.dim() == 4, "grad must be [N, C, H, W]");
  const Maps m = {grad.size(0), grad.size(2), grad.size(3)};
  const WinogradShape s = {m, {grad.size(1), 0}, count, 1};
  const auto dtype = grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(count >= 0 && packed.scalar_type() == dtype && has_shape(packed, {transformed_size(s)}),
                  "packed must be conv_3x3_gradient_weight's for these channels and this dtype");
  grad = in_layout(grad, layout);
  Tensor d_input = empty_frames(grad, grad.scalar_type(), count, true, MemoryFormat::ChannelsLast);
  if (d_input.numel() == 0) return d_input;
  dispatch_floating("conv_3x3_input_gradient", grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const int64_t stride = EVKERNELS_CALL(whole_vectors<R>, grad.size(1));
    const auto maps = workspace<R>(EVKERNELS_CALL(maps_size<R>, stride, m));
    EVKERNELS_CALL(zero_borders, maps.get(), stride, m);
    parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(load_rows, data<T>(grad), grad.size(1), layout == MemoryFormat::ChannelsLast, maps.get(), stride,
                     m, begin, end);
    });
    parallel_for(0, EVKERNELS_CALL(winograd_blocks<R>, s), 1, [&](int64_t begin, int64_t end) {
      const auto buffer = workspace<R>(EVKERNELS_CALL(winograd_buffer_size<R>, s));
      EVKERNELS_CALL(input_gradient, maps.get(), data<R>(packed), mutable_data<T>(d_input), buffer.get(), s, begin,
                     end);
    });
  });
  return d_input;
}

// A convolution alone, channels_last: the same loop as that of a gradient, over a weight packed as it is.
Tensor conv_3x3(Tensor x, Tensor weight, Tensor packed, Tensor) {
  STD_TORCH_CHECK(
      x.dim() == 4 && has_shape(weight, {weight.size(0), x.size(1), 3, 3}) && weight.scalar_type() == x.scalar_type(),
      "x must be [N, Cin, H, W] and weight [Cout, Cin, 3, 3] of its dtype");
  return conv_3x3_input_gradient(x, weight, packed, 0, weight.size(0));
}

// The gradient of the weight [C, channels of x and h, 3, 3], float32 or float64, of a convolution of x and h side by
// side.
Tensor conv_3x3_weight_gradient(Tensor grad, Tensor x, Tensor h) {
  const auto beside = [&](const Tensor& t) {
    return t.dim() == 4 && t.scalar_type() == grad.scalar_type() &&
           has_shape(t, {grad.size(0), t.size(1), grad.size(2), grad.size(3)});
  };
  STD_TORCH_CHECK(grad.dim() == 4 && beside(x) && beside(h), "grad, x and h must be [N, *, H, W] of one dtype");
  for (Tensor* t : {&grad, &x, &h}) *t = in_layout(*t, MemoryFormat::ChannelsLast);
  const WinogradShape s = {{grad.size(0), grad.size(2), grad.size(3)}, {x.size(1), h.size(1)}, grad.size(1), 1};
  const auto dtype = grad.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor d_weight =
      torch::stable::empty({s.channels, s.inputs[0] + s.inputs[1], 3, 3}, dtype, std::nullopt, grad.device());
  if (d_weight.numel() == 0) return d_weight;
  if (grad.numel() == 0) return torch::stable::fill_(d_weight, 0);
  dispatch_floating("conv_3x3_weight_gradient", grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto buffer = workspace<R>(EVKERNELS_CALL(gradient_buffer_size<R>, s));
    const std::vector<T> zeros(std::max({s.inputs[0], s.inputs[1], s.channels}));
    const T* const both[2] = {data<T>(x), data<T>(h)};
    const int64_t panels = EVKERNELS_CALL(gradient_panels<R>, s), chunk = EVKERNELS_CALL(gradient_chunk<R>, s);
    for (int64_t first = 0; first < s.maps.squares(); first += chunk) {
      const int64_t squares = std::min(chunk, s.maps.squares() - first);
      parallel_for(0, squares, 8, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(gradient_squares, data<T>(grad), both, zeros.data(), buffer.get(), s, first, begin, end);
      });
      parallel_for(0, 16 * panels, 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(gradient_products, buffer.get(), s, squares, first > 0, begin, end);
      });
    }
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(weight_gradient, buffer.get(), mutable_data<R>(d_weight), s, begin, end);
    });
  });
  return d_weight;
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("conv_lstm_3x3", TORCH_BOX(&evkernels::conv_lstm_3x3));
  m.impl("conv_3x3_gradient_weight", TORCH_BOX(&evkernels::conv_3x3_gradient_weight));
  m.impl("conv_3x3", TORCH_BOX(&evkernels::conv_3x3));
  m.impl("conv_3x3_packed_weight", TORCH_BOX(&evkernels::conv_3x3_packed_weight));
  m.impl("conv_3x3_input_gradient", TORCH_BOX(&evkernels::conv_3x3_input_gradient));
  m.impl("conv_3x3_weight_gradient", TORCH_BOX(&evkernels::conv_3x3_weight_gradient));
}
