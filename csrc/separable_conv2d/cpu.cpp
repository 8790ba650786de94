// Depthwise-separable convolution on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl. The backward pass is two sweeps: the pointwise half over tiles, which leaves the gradient at the depthwise
// result, and the backward pass of depthwise_conv2d from there.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/workspace.h"
#include "depthwise_conv2d/cpu.h"
#include "separable_conv2d/host.h"

#define EVKERNELS_LOOPS "separable_conv2d/loops.inl"
#define EVKERNELS_AMX_LOOPS "separable_conv2d/amx.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Multiply-adds per task: about 50 us of work, well above the cost of waking a thread.
constexpr int64_t kGrain = 2 << 20;

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
  Tensor d_pre = result(true, {s.batch, s.channels, s.out_height, s.out_width}, call.layout);
  Tensor d_pointwise = result(output_mask[2], {s.outputs, s.channels, 1, 1}, MemoryFormat::Contiguous);
  Tensor d_pointwise_bias = result(output_mask[4], {s.outputs}, MemoryFormat::Contiguous);
  dispatch_floating("separable_conv2d_backward", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto packed = workspace<R>(EVKERNELS_CALL(separable_conv2d_packed_size<T>, s));
    EVKERNELS_CALL(separable_conv2d_pack, data<T>(depthwise_weight), data<T>(depthwise_bias), data<T>(pointwise_weight),
                   data<T>(pointwise_bias), packed.get(), s, channels_last);
    // Panels are at most as many elements as the whole pointwise weight with its channels rounded up to a vector.
    const auto panels = workspace<R>(channels_last ? s.outputs * (s.channels + 16) : 0);
    if (channels_last) EVKERNELS_CALL(separable_conv2d_pack_backward, data<T>(pointwise_weight), panels.get(), s);
    const int64_t groups = s.batch == 0 ? 0 : EVKERNELS_CALL(separable_conv2d_groups, s, channels_last);
    const auto sums = workspace<R>(groups * EVKERNELS_CALL(separable_conv2d_sums_size<T>, s));
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const auto buffer =
          zeroed_workspace<R>(EVKERNELS_CALL(separable_conv2d_backward_buffer_size<T>, s, channels_last));
      EVKERNELS_CALL(separable_conv2d_backward_groups, data<T>(grad_output), data<T>(x), data<T>(pre), packed.get(),
                     panels.get(), mutable_data<T>(d_pre), sums.get(), buffer.get(), s, channels_last, begin, end);
    });
    EVKERNELS_CALL(separable_conv2d_reduce, sums.get(), groups, output_mask[2] ? mutable_data<T>(d_pointwise) : nullptr,
                   output_mask[4] ? mutable_data<T>(d_pointwise_bias) : nullptr, s);
  });
  auto [d_x, d_depthwise, d_depthwise_bias] =
      depthwise_conv2d_backward_cpu(d_pre, x, depthwise_weight, depthwise_bias, stride, padding, "none", 1,
                                    output_mask[0], output_mask[1], output_mask[3]);
  return {d_x, d_depthwise, d_pointwise, d_depthwise_bias, d_pointwise_bias};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("separable_conv2d", TORCH_BOX(&evkernels::separable_conv2d));
  m.impl("separable_conv2d_training", TORCH_BOX(&evkernels::separable_conv2d_training));
  m.impl("separable_conv2d_backward", TORCH_BOX(&evkernels::separable_conv2d_backward));
}
