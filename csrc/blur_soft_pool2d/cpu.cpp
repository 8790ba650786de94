// Blurred soft pooling on the CPU: checks, planes shared by threads, registration. The loops are in loops.inl and take
// contiguous planes; other layouts are copied.

#include <torch/csrc/stable/library.h>

#include "blur_soft_pool2d/shape.h"
#include "common/activation.h"
#include "common/tensor.h"
#include "common/workspace.h"

#define EVKERNELS_LOOPS "blur_soft_pool2d/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Elements per task, about 20 us of work.
constexpr int64_t kGrain = 16384;

SoftPoolShape soft_pool_shape(const Tensor& x, int64_t stride, double temperature) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) >= 2 && x.size(3) >= 2, "x must be [N, C, H, W] with H and W at least 2");
  STD_TORCH_CHECK(stride >= 1 && temperature > 0, "stride must be at least 1 and temperature above 0");
  return {x.size(0) * x.size(1),        x.size(2), x.size(3),  (x.size(2) - 2) / stride + 1,
          (x.size(3) - 2) / stride + 1, stride,    temperature};
}

// Calls f(begin, end, memory) for shares of all planes.
template <class T, class F>
void for_planes(const SoftPoolShape& s, bool gradient, const F& f) {
  const int64_t grain = 1 + kGrain / (s.height * s.width);
  torch::stable::parallel_for(0, s.planes, grain, [&](int64_t begin, int64_t end) {
    const auto memory = zeroed_workspace<Compute<T>>(EVKERNELS_CALL(soft_pool_memory, s, gradient));
    f(begin, end, memory.get());
  });
}

Tensor blur_soft_pool2d(Tensor x, int64_t stride, double temperature) {
  const SoftPoolShape s = soft_pool_shape(x, stride, temperature);
  x = in_layout(x, MemoryFormat::Contiguous);
  Tensor y = torch::stable::empty({x.size(0), x.size(1), s.out_height, s.out_width}, x.scalar_type(), std::nullopt,
                                  x.device());
  dispatch_floating("blur_soft_pool2d", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_planes<T>(s, false, [&](int64_t begin, int64_t end, Compute<T>* memory) {
      EVKERNELS_CALL(soft_pool_forward, data<T>(x), mutable_data<T>(y), s, memory, begin, end);
    });
  });
  return y;
}

Tensor blur_soft_pool2d_backward(Tensor grad_output, Tensor x, int64_t stride, double temperature) {
  const SoftPoolShape s = soft_pool_shape(x, stride, temperature);
  x = in_layout(x, MemoryFormat::Contiguous);
  STD_TORCH_CHECK(
      grad_output.numel() == s.planes * s.out_height * s.out_width && grad_output.scalar_type() == x.scalar_type(),
      "grad_output must have the shape of the output and the dtype of x");
  grad_output = in_layout(grad_output, MemoryFormat::Contiguous);
  Tensor d_x = empty_in_layout(x, x.scalar_type(), MemoryFormat::Contiguous);
  dispatch_floating("blur_soft_pool2d_backward", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_planes<T>(s, true, [&](int64_t begin, int64_t end, Compute<T>* memory) {
      EVKERNELS_CALL(soft_pool_backward, data<T>(grad_output), data<T>(x), mutable_data<T>(d_x), s, memory, begin, end);
    });
  });
  return d_x;
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("blur_soft_pool2d", TORCH_BOX(&evkernels::blur_soft_pool2d));
  m.impl("blur_soft_pool2d_backward", TORCH_BOX(&evkernels::blur_soft_pool2d_backward));
}
