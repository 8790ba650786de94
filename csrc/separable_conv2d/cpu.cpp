// Depthwise-separable convolution on the CPU: tensors to pointers, workspace, threads, registration. The loops are in
// loops.inl. The gradient is composed of other ops in evkernels/ops/separable_conv2d_backward.py.

#include <torch/csrc/stable/library.h>

#include <memory>
#include <new>

#include "separable_conv2d/host.h"

#define EVKERNELS_LOOPS "separable_conv2d/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Multiply-adds per task: about 50 us of work, well above the cost of waking a thread.
constexpr int64_t kGrain = 2 << 20;
constexpr std::align_val_t kCacheLine{64};

template <class R>
struct Delete {
  void operator()(R* memory) const { ::operator delete(memory, kCacheLine); }
};

// Uninitialised memory for vectors, each on one cache line.
template <class R>
std::unique_ptr<R, Delete<R>> workspace(int64_t count) {
  return std::unique_ptr<R, Delete<R>>(static_cast<R*>(::operator new(count * sizeof(R), kCacheLine)));
}

Tensor separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight,
                        std::optional<Tensor> depthwise_bias, std::optional<Tensor> pointwise_bias, int64_t stride,
                        int64_t padding, std::string activation, std::string output_activation) {
  const SeparableCall call = prepare_separable_conv2d(x, depthwise_weight, pointwise_weight, depthwise_bias,
                                                      pointwise_bias, stride, padding, activation, output_activation);
  const SeparableShape& s = call.shape;
  const bool channels_last = call.layout == MemoryFormat::ChannelsLast;
  Tensor y = empty_separable_output(x, call);
  if (s.batch == 0) return y;
  dispatch_floating("separable_conv2d", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto packed = workspace<R>(EVKERNELS_CALL(separable_conv2d_packed_size<T>, s));
    EVKERNELS_CALL(separable_conv2d_pack, data<T>(depthwise_weight), data<T>(depthwise_bias),
                   data<T>(pointwise_weight), data<T>(pointwise_bias), packed.get(), s, channels_last);
    const int64_t tiles = EVKERNELS_CALL(separable_conv2d_tiles, s, channels_last);
    const int64_t work = s.batch * s.out_height * s.out_width * s.channels * (s.outputs + s.size * s.size);
    const int64_t grain = kGrain / (work / tiles + 1) + 1;
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
      const auto buffer = workspace<R>(EVKERNELS_CALL(separable_conv2d_buffer_size<T>, s, channels_last));
      if (channels_last) {
        EVKERNELS_CALL(separable_conv2d_channels_last, data<T>(x), packed.get(), mutable_data<T>(y), buffer.get(), s,
                       begin, end);
      } else {
        EVKERNELS_CALL(separable_conv2d_channels_first, data<T>(x), packed.get(), mutable_data<T>(y), buffer.get(), s,
                       begin, end);
      }
    });
  });
  return y;
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) { m.impl("separable_conv2d", TORCH_BOX(&evkernels::separable_conv2d)); }
