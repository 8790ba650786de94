// A 3x3 ConvLSTM over a sequence on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/activation_host.h"
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
    const bool x_is_maps = EVKERNELS_CALL(are_maps<T>, s.inputs, s.channels_last);
    // A reset writes to the state before a step, which must then be a copy.
    const bool h_is_maps = EVKERNELS_CALL(are_maps<T>, s.channels, s.channels_last) && !reset.has_value();
    const bool c_is_maps = EVKERNELS_CALL(are_maps<S>, s.channels, s.channels_last);
    const auto x_copy = workspace<R>(x_is_maps ? 0 : EVKERNELS_CALL(maps_size<R>, x_stride, m));
    const auto h_copies = workspace<R>(h_is_maps ? 0 : 2 * map_size);
    const auto c_copy = workspace<R>(c_is_maps ? 0 : map_size);
    R* const copies[2] = {h_copies.get(), h_copies.get() + map_size};
    R* const cell = c_is_maps ? mutable_data<R>(c_last) : c_copy.get();
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(conv_lstm_3x3_pack, data<T>(weight), data<T>(bias), packed.get(), packed_bias.get(), s, begin,
                     end);
    });
    parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(load_rows, data<S>(c), s.channels, s.channels_last, cell, stride, m, begin, end);
      if (h_is_maps) return;
      EVKERNELS_CALL(load_rows, data<T>(h), s.channels, s.channels_last, copies[0], stride, m, begin, end);
    });
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
        EVKERNELS_CALL(restart_rows, data<bool>(reset) + frame, cell, stride, m, begin, end);
      });
      const ConvLstm3x3Step<T, S, R> step = {x_is_maps ? data<R>(x) + pixels * s.inputs : x_copy.get(),
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
      now = next;
      if (h_is_maps) continue;
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(store_rows, next, stride, mutable_data<T>(output) + pixels * s.channels, s.channels,
                       s.channels_last, m, begin, end);
      });
    }
    if (c_is_maps) return;
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

// activation(convolution(x) + bias + residual), channels_last, for a weight that conv_3x3_packed_weight or
// conv_3x3_gradient_weight has packed: of x's channels to `count`. The first `split` of these, without a residual, and
// the rest; or nothing and, with a projection, one map of all.
std::tuple<Tensor, Tensor> convolved(Tensor x, const Tensor& packed, int64_t split, int64_t count,
                                     std::optional<Tensor> bias = std::nullopt,
                                     std::optional<Tensor> residual = std::nullopt,
                                     Activation activation = Activation::kNone,
                                     std::optional<Tensor> projection = std::nullopt) {
  STD_TORCH_CHECK(x.dim() == 4, "the maps must be [N, C, H, W]");
  const MemoryFormat layout = common_layout(x);
  const Maps m = {x.size(0), x.size(2), x.size(3)};
  const WinogradShape s = {m, {x.size(1), 0}, count, 1};
  const auto dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(split >= 0 && split <= count && split % 16 == 0, "split must be a multiple of 16 up to the channels");
  STD_TORCH_CHECK(packed.scalar_type() == dtype && has_shape(packed, {transformed_size(s)}),
                  "packed must be of a weight for these channels and this dtype");
  STD_TORCH_CHECK(!bias.has_value() || (has_shape(*bias, {count}) && bias->scalar_type() == x.scalar_type()),
                  "bias must be [Cout] of the dtype of x");
  STD_TORCH_CHECK(!residual.has_value() || (has_shape(*residual, {m.batch, count - split, m.height, m.width}) &&
                                            residual->scalar_type() == x.scalar_type()),
                  "residual must be [N, channels behind the split, H, W] of the dtype of x");
  STD_TORCH_CHECK(!projection.has_value() || (split == 0 && has_shape(*projection, {count}) &&
                                              projection->scalar_type() == x.scalar_type() && x.scalar_type() == dtype),
                  "projection must be [Cout] of the dtype of x, float32 or float64");
  x = in_layout(x, layout);
  bring_contiguous(bias);
  bring_contiguous(projection);
  if (residual.has_value()) residual = in_layout(*residual, MemoryFormat::ChannelsLast);
  Tensor first = empty_frames(x, x.scalar_type(), split, true, MemoryFormat::ChannelsLast);
  Tensor rest = projection.has_value()
                    ? empty_frames(x, x.scalar_type(), 1, true, MemoryFormat::Contiguous)
                    : empty_frames(x, x.scalar_type(), count - split, true, MemoryFormat::ChannelsLast);
  if (count == 0) torch::stable::fill_(rest, 0);
  if (first.numel() + rest.numel() == 0 || count == 0) return {first, rest};
  dispatch_floating("conv_3x3", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const bool channels_last = layout == MemoryFormat::ChannelsLast;
    const bool is_maps = EVKERNELS_CALL(are_maps<T>, s.inputs[0], channels_last);
    const int64_t stride = EVKERNELS_CALL(whole_vectors<R>, s.inputs[0]);
    const auto copy = workspace<R>(is_maps ? 0 : EVKERNELS_CALL(maps_size<R>, stride, m));
    if (!is_maps) {
      parallel_for(0, m.rows(), 1, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(load_rows, data<T>(x), s.inputs[0], channels_last, copy.get(), stride, m, begin, end);
      });
    }
    const R* const maps = is_maps ? data<R>(x) : copy.get();
    const auto whole = [&](const std::optional<Tensor>& t) {
      auto values = zeroed_workspace<R>(EVKERNELS_CALL(whole_vectors<R>, count));
      for (int64_t c = 0; t.has_value() && c < count; ++c) values.get()[c] = to_float(data<T>(t)[c]);
      return values;
    };
    const auto whole_bias = whole(bias), weights = whole(projection);
    const bool projected = projection.has_value();
    const ConvolutionEnd<T, R> last = {whole_bias.get(),
                                       data<T>(residual),
                                       activation,
                                       split,
                                       mutable_data<T>(first),
                                       mutable_data<T>(rest),
                                       projected ? weights.get() : nullptr,
                                       projected ? mutable_data<R>(rest) : nullptr};
    parallel_for(0, EVKERNELS_CALL(winograd_blocks<R>, s), 1, [&](int64_t begin, int64_t end) {
      const auto buffer = workspace<R>(EVKERNELS_CALL(winograd_buffer_size<R>, s));
      EVKERNELS_CALL(convolution, maps, data<R>(packed), last, buffer.get(), s, begin, end);
    });
  });
  return {first, rest};
}

// The gradients of the input channels [first, first + split) and, with `residual` added, of those up to first + count;
// `packed` is conv_3x3_gradient_weight's.
std::tuple<Tensor, Tensor> conv_3x3_input_gradient(Tensor grad, Tensor, Tensor packed, int64_t, int64_t split,
                                                   int64_t count, std::optional<Tensor> residual) {
  return convolved(grad, packed, split, count, std::nullopt, residual);
}

void check_weight(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(
      x.dim() == 4 && has_shape(weight, {weight.size(0), x.size(1), 3, 3}) && weight.scalar_type() == x.scalar_type(),
      "x must be [N, Cin, H, W] and weight [Cout, Cin, 3, 3] of its dtype");
}

Tensor conv_3x3(Tensor x, Tensor weight, Tensor packed, Tensor) {
  check_weight(x, weight);
  return std::get<1>(convolved(x, packed, 0, weight.size(0)));
}

Tensor conv_3x3_activated(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                          std::optional<Tensor> projection, std::string activation) {
  check_weight(x, weight);
  return std::get<1>(convolved(x, conv_3x3_packed_weight(weight), 0, weight.size(0), bias, residual,
                               parse_activation(activation), projection));
}

// The gradient of the weight [C, channels of x and h, 3, 3], float32 or float64, of a convolution of x and h side by
// side, and that of its bias [C].
std::tuple<Tensor, Tensor> conv_3x3_weight_gradient(Tensor grad, Tensor x, Tensor h) {
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
  Tensor d_bias = torch::stable::empty({s.channels}, dtype, std::nullopt, grad.device());
  if (grad.numel() == 0) return {torch::stable::fill_(d_weight, 0), torch::stable::fill_(d_bias, 0)};
  dispatch_floating("conv_3x3_weight_gradient", grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto buffer = workspace<R>(EVKERNELS_CALL(gradient_buffer_size<R>, s));
    EVKERNELS_CALL(gradient_clear, buffer.get(), s);
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
      EVKERNELS_CALL(weight_gradient, buffer.get(), mutable_data<R>(d_weight), mutable_data<R>(d_bias), s, begin, end);
    });
  });
  return {d_weight, d_bias};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("conv_lstm_3x3", TORCH_BOX(&evkernels::conv_lstm_3x3));
  m.impl("conv_3x3_gradient_weight", TORCH_BOX(&evkernels::conv_3x3_gradient_weight));
  m.impl("conv_3x3", TORCH_BOX(&evkernels::conv_3x3));
  m.impl("conv_3x3_activated", TORCH_BOX(&evkernels::conv_3x3_activated));
  m.impl("conv_3x3_packed_weight", TORCH_BOX(&evkernels::conv_3x3_packed_weight));
  m.impl("conv_3x3_input_gradient", TORCH_BOX(&evkernels::conv_3x3_input_gradient));
  m.impl("conv_3x3_weight_gradient", TORCH_BOX(&evkernels::conv_3x3_weight_gradient));
}
