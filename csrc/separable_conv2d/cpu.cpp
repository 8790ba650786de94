// Depthwise-separable convolution on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl.
//
// The backward pass forms the gradient at the depthwise result, the pointwise half, and goes on with the backward pass
// of depthwise_conv2d. channels_last does both for one unit of rows after the other, so that this gradient is in the
// cache and never in memory as a whole; the rows that a unit needs of the one above it are kept, or formed again where
// another thread has that one. Contiguous planes, whose units are a channel's, take two sweeps.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/workspace.h"
#include "depthwise_conv2d/cpu.h"
#include "depthwise_conv2d/host.h"
#include "separable_conv2d/host.h"

#define EVKERNELS_LOOPS "separable_conv2d/loops.inl"
#define EVKERNELS_AMX_LOOPS "separable_conv2d/amx.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Multiply-adds per task: about 50 us of work, well above the cost of waking a thread.
constexpr int64_t kGrain = 2 << 20;
// Pixels in one sum of the pointwise weight's gradient: four tiles. With eight an error came to 2.2 times PyTorch's.
constexpr int64_t kPixelsPerSum = 384;

#if defined(__x86_64__)
// channels_last bfloat16 on processors with AMX.
void separable_conv2d_on_tiles(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                               const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
                               Tensor& y, const SeparableShape& s) {
  using T = BFloat16;
  const auto packed = workspace<float>(amx::separable_conv2d_packed_size<T>(s));
  amx::separable_conv2d_pack<T>(data<T>(depthwise_weight), data<T>(depthwise_bias), nullptr, data<T>(pointwise_bias),
                                packed.get(), s, true);
  const auto tiles = workspace<T>(amx::separable_conv2d_tile_weights_size(s));
  amx::separable_conv2d_pack_tiles(data<T>(pointwise_weight), tiles.get(), s);
  const int64_t tasks = amx::separable_conv2d_tile_tasks(s);
  const int64_t work = s.batch * s.out_height * s.out_width * s.channels * (s.outputs + s.size * s.size);
  // A product takes a tenth of the time that it takes on vectors, what surrounds it as long: four times the grain.
  torch::stable::parallel_for(0, tasks, 4 * kGrain / (work / tasks + 1) + 1, [&](int64_t begin, int64_t end) {
    const auto buffer = zeroed_workspace<float>(amx::separable_conv2d_tile_buffer_size(s));
    amx::separable_conv2d_tiles_last(data<T>(x), packed.get(), tiles.get(), mutable_data<T>(y), s, begin, end,
                                     buffer.get());
  });
}
#endif

// Fills y, and `pre` with what it is before its activation, if that is given.
void separable_conv2d_forward(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                              const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
                              Tensor& y, Tensor* pre, const SeparableCall& call) {
  const SeparableShape& s = call.shape;
  const bool channels_last = call.layout == MemoryFormat::ChannelsLast;
  if (s.batch == 0) return;
#if defined(__x86_64__)
  if (current_isa() == Isa::kAmx && channels_last && x.scalar_type() == ScalarType::BFloat16 && !pre) {
    separable_conv2d_on_tiles(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, s);
    return;
  }
#endif
  dispatch_floating("separable_conv2d", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto packed = workspace<R>(EVKERNELS_CALL(separable_conv2d_packed_size<T>, s));
    EVKERNELS_CALL(separable_conv2d_pack, data<T>(depthwise_weight), data<T>(depthwise_bias), data<T>(pointwise_weight),
                   data<T>(pointwise_bias), packed.get(), s, channels_last);
    const int64_t tiles = EVKERNELS_CALL(separable_conv2d_tiles, s, channels_last);
    const int64_t work = s.batch * s.out_height * s.out_width * s.channels * (s.outputs + s.size * s.size);
    const int64_t grain = kGrain / (work / tiles + 1) + 1;
    T* const kept = pre ? mutable_data<T>(*pre) : nullptr;
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      const auto buffer = zeroed_workspace<R>(EVKERNELS_CALL(separable_conv2d_buffer_size<T>, s, channels_last));
      if (channels_last) {
        EVKERNELS_CALL(separable_conv2d_channels_last, data<T>(x), packed.get(), mutable_data<T>(y), kept, buffer.get(),
                       s, begin, end);
      } else {
        EVKERNELS_CALL(separable_conv2d_channels_first, data<T>(x), packed.get(), mutable_data<T>(y), kept,
                       buffer.get(), s, begin, end);
      }
    });
  });
}

Tensor separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight,
                        std::optional<Tensor> depthwise_bias, std::optional<Tensor> pointwise_bias, int64_t stride,
                        int64_t padding, std::string activation, std::string output_activation) {
  const SeparableCall call = prepare_separable_conv2d(x, depthwise_weight, pointwise_weight, depthwise_bias,
                                                      pointwise_bias, stride, padding, activation, output_activation);
  Tensor y = empty_separable_output(x, call);
  separable_conv2d_forward(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, nullptr, call);
  return y;
}

std::tuple<Tensor, Tensor> separable_conv2d_training(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight,
                                                     std::optional<Tensor> depthwise_bias,
                                                     std::optional<Tensor> pointwise_bias, int64_t stride,
                                                     int64_t padding, std::string activation,
                                                     std::string output_activation) {
  const SeparableCall call = prepare_separable_conv2d(x, depthwise_weight, pointwise_weight, depthwise_bias,
                                                      pointwise_bias, stride, padding, activation, output_activation);
  Tensor y = empty_separable_output(x, call), pre = empty_separable_output(x, call);
  separable_conv2d_forward(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, &pre, call);
  return {y, pre};
}

// The gradients in the order of the arguments, of those that `wanted` names; empty tensors for others.
struct Gradients {
  Tensor x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias;
};

// The packed weights and their panels for the product with the output's gradient.
template <class T>
struct BackwardWeights {
  Workspace<Compute<T>> packed, panels;

  BackwardWeights(const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                  const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
                  const SeparableShape& s, bool channels_last)
      : packed(workspace<Compute<T>>(EVKERNELS_CALL(separable_conv2d_packed_size<T>, s))),
        // Panels are at most as many elements as the whole pointwise weight with its channels rounded up to a vector.
        panels(workspace<Compute<T>>(channels_last ? s.outputs * (s.channels + 16) : 0)) {
    EVKERNELS_CALL(separable_conv2d_pack, data<T>(depthwise_weight), data<T>(depthwise_bias), data<T>(pointwise_weight),
                   data<T>(pointwise_bias), packed.get(), s, channels_last);
    if (channels_last) EVKERNELS_CALL(separable_conv2d_pack_backward, data<T>(pointwise_weight), panels.get(), s);
  }
};

// channels_last: units of rows from the output's gradient to the input's.
template <class T>
void backward_by_rows(const Tensor& grad_output, const Tensor& x, const Tensor& depthwise_weight,
                      const BackwardWeights<T>& weights, const std::optional<Tensor>& pre, const DepthwiseGeometry& g,
                      const SeparableShape& s, const std::vector<bool>& wanted, Gradients& d) {
  using R = Compute<T>;
  const int64_t units = g.planes * g.sums_per_plane(), row = g.out_width * g.channels;
  // A group of units shares the sums of the pointwise weight's gradient, which then are no larger than its units; of
  // narrow maps a unit has several, because rounding errors grow with the pixels of one.
  const int64_t per_group = 1 + s.outputs * s.channels / 65536, groups = (units + per_group - 1) / per_group;
  const int64_t parts = (g.rows_per_sum() * g.out_width + kPixelsPerSum - 1) / kPixelsPerSum;
  const int64_t sums_size = EVKERNELS_CALL(separable_conv2d_sums_size<T>, s), taps = (g.k * g.k + 1) * g.channels;
  const auto sums = zeroed_workspace<R>(groups * parts * sums_size);
  const bool need_taps = wanted[1] || wanted[3];
  const auto tap_sums = workspace<double>(need_taps ? units * taps : 0);
  T* const d_x = wanted[0] ? mutable_data<T>(d.x) : nullptr;
  const SeparableBackward<T, R> call = {data<T>(grad_output), data<T>(x), data<T>(pre), weights.panels.get()};
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = zeroed_workspace<R>(EVKERNELS_CALL(separable_conv2d_backward_buffer_size<T>, s, true));
    const auto scratch = workspace<R>(g.backward_memory(sizeof(T) == 2));
    const auto d_pre = workspace<T>(g.rows_before_sum() * row);
    const auto form = [&](int64_t first, int64_t last, T* to, R* d_weight) {
      const int64_t begin = first * g.out_width, end = last * g.out_width;
      for (int64_t pixel = begin; pixel < end; pixel += kPixelsPerSum) {
        EVKERNELS_CALL(separable_conv2d_backward_pixels, call, weights.packed.get(), to + (pixel - begin) * g.channels,
                       d_weight, buffer.get(), s, pixel, std::min(pixel + kPixelsPerSum, end));
        if (d_weight) d_weight += sums_size;
      }
    };
    int64_t top = 0, last = 0;  // rows of all samples that d_pre holds
    for (int64_t unit = begin * per_group; unit < std::min(end * per_group, units); ++unit) {
      const int64_t plane = unit / g.sums_per_plane() * g.out_height;
      const int64_t first = plane + unit % g.sums_per_plane() * g.rows_per_sum();
      const int64_t above = std::min(first - plane, g.rows_above_sum());
      if (first == last) {
        std::memmove(d_pre.get(), d_pre.get() + (first - above - top) * row, above * row * sizeof(T));
      } else {
        form(first - above, first, d_pre.get(), nullptr);
      }
      top = first - above;
      last = std::min(first + g.rows_per_sum(), plane + g.out_height);
      form(first, last, d_pre.get() + above * row, sums.get() + unit / per_group * parts * sums_size);
      depthwise_backward_units<T>(data<T>(x), data<T>(depthwise_weight), d_pre.get(), top, d_x,
                                  need_taps ? tap_sums.get() : nullptr, g, scratch.get(), unit, unit + 1);
    }
  });
  EVKERNELS_CALL(separable_conv2d_reduce, sums.get(), groups * parts,
                 wanted[2] ? mutable_data<T>(d.pointwise_weight) : nullptr,
                 wanted[4] ? mutable_data<T>(d.pointwise_bias) : nullptr, s);
  if (need_taps) {
    reduce_depthwise_sums<T>(tap_sums.get(), wanted[1] ? mutable_data<T>(d.depthwise_weight) : nullptr,
                             wanted[3] ? mutable_data<T>(d.depthwise_bias) : nullptr, g);
  }
}

// Any layout: the gradient at the depthwise result, which is returned, and those of the pointwise half.
template <class T>
void backward_by_tiles(const Tensor& grad_output, const Tensor& x, const BackwardWeights<T>& weights,
                       const std::optional<Tensor>& pre, Tensor& d_pre, const SeparableShape& s, bool channels_last,
                       const std::vector<bool>& wanted, Gradients& d) {
  using R = Compute<T>;
  const int64_t groups = s.batch == 0 ? 0 : EVKERNELS_CALL(separable_conv2d_groups, s, channels_last);
  const auto sums = zeroed_workspace<R>(groups * EVKERNELS_CALL(separable_conv2d_sums_size<T>, s));
  const SeparableBackward<T, R> call = {data<T>(grad_output), data<T>(x), data<T>(pre), weights.panels.get()};
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const auto buffer = zeroed_workspace<R>(EVKERNELS_CALL(separable_conv2d_backward_buffer_size<T>, s, channels_last));
    EVKERNELS_CALL(separable_conv2d_backward_groups, call, weights.packed.get(), mutable_data<T>(d_pre), sums.get(),
                   buffer.get(), s, channels_last, begin, end);
  });
  EVKERNELS_CALL(separable_conv2d_reduce, sums.get(), groups, wanted[2] ? mutable_data<T>(d.pointwise_weight) : nullptr,
                 wanted[4] ? mutable_data<T>(d.pointwise_bias) : nullptr, s);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> separable_conv2d_backward(
    Tensor grad_output, Tensor x, Tensor depthwise_weight, Tensor pointwise_weight,
    std::optional<Tensor> depthwise_bias, std::optional<Tensor> pointwise_bias, int64_t stride, int64_t padding,
    std::string activation, std::string output_activation, std::vector<bool> output_mask, std::optional<Tensor> pre) {
  const SeparableCall call = prepare_separable_conv2d(x, depthwise_weight, pointwise_weight, depthwise_bias,
                                                      pointwise_bias, stride, padding, activation, output_activation);
  const SeparableShape& s = call.shape;
  const bool channels_last = call.layout == MemoryFormat::ChannelsLast;
  check_separable_output("grad_output", grad_output, x, s);
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask must have 5 entries");
  STD_TORCH_CHECK(!output_mask[3] || depthwise_bias.has_value(), "there is no depthwise_bias to have a gradient");
  grad_output = in_layout(grad_output, call.layout);
  if (pre.has_value()) {
    check_separable_output("pre", *pre, x, s);
    pre = in_layout(*pre, call.layout);
  }
  const auto result = [&](bool needed, std::vector<int64_t> sizes, MemoryFormat layout) {
    if (!needed) sizes = {0};
    return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                needed ? layout : MemoryFormat::Contiguous);
  };
  // Where one pixel's channels do not fill a vector the loops of depthwise_conv2d want contiguous planes.
  const bool by_rows = channels_last && s.channels >= 16 && s.batch > 0;
  Gradients d = {result(by_rows && output_mask[0], {s.batch, s.channels, s.height, s.width}, call.layout),
                 result(by_rows && output_mask[1], {s.channels, 1, s.size, s.size}, MemoryFormat::Contiguous),
                 result(output_mask[2], {s.outputs, s.channels, 1, 1}, MemoryFormat::Contiguous),
                 result(by_rows && output_mask[3], {s.channels}, MemoryFormat::Contiguous),
                 result(output_mask[4], {s.outputs}, MemoryFormat::Contiguous)};
  Tensor d_pre = result(!by_rows, {s.batch, s.channels, s.out_height, s.out_width}, call.layout);
  dispatch_floating("separable_conv2d_backward", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const BackwardWeights<T> weights(depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, s,
                                     channels_last);
    if (by_rows) {
      const DepthwiseGeometry g =
          depthwise_geometry(x, depthwise_weight, depthwise_bias, stride, padding, 1, call.layout);
      backward_by_rows<T>(grad_output, x, depthwise_weight, weights, pre, g, s, output_mask, d);
    } else {
      backward_by_tiles<T>(grad_output, x, weights, pre, d_pre, s, channels_last, output_mask, d);
    }
  });
  if (!by_rows) {
    std::tie(d.x, d.depthwise_weight, d.depthwise_bias) =
        depthwise_conv2d_backward_cpu(d_pre, x, depthwise_weight, depthwise_bias, stride, padding, "none", 1,
                                      output_mask[0], output_mask[1], output_mask[3]);
  }
  return {d.x, d.depthwise_weight, d.pointwise_weight, d.depthwise_bias, d.pointwise_bias};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&evkernels::separable_conv2d));
  m.impl("separable_conv2d_training", TORCH_BOX(&evkernels::separable_conv2d_training));
  m.impl("separable_conv2d_backward", TORCH_BOX(&evkernels::separable_conv2d_backward));
}
