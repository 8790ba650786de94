// Depthwise convolution on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Threads share rows in the forward pass, in the backward pass units of rows cut by the shape alone: each forms the
// gradient of its input rows and one partial sum of those of weights and bias, added up in double in a fixed order.

#include <torch/csrc/stable/library.h>

#include <memory>

#include "depthwise_conv2d/cpu.h"
#include "depthwise_conv2d/host.h"

#define EVKERNELS_LOOPS "depthwise_conv2d/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Elements per task: about 20 us of work, well above the cost of waking a thread and of arranging the filters.
constexpr int64_t kGrain = 32768;

int64_t rows_per_task(int64_t elements_per_row) { return 1 + kGrain / elements_per_row; }

template <class A>
std::unique_ptr<A[]> memory(int64_t count) {
  return std::unique_ptr<A[]>(new A[count]);
}

// The layout that the loops work in: that of x, but contiguous where one pixel's channels do not fill a vector.
MemoryFormat layout_of_loops(const Tensor& x) { return x.size(1) < 16 ? MemoryFormat::Contiguous : common_layout(x); }

Tensor depthwise_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride, int64_t padding,
                        std::string activation, int64_t dilation) {
  const MemoryFormat layout = layout_of_loops(x), wanted = common_layout(x);
  const DepthwiseGeometry g = depthwise_geometry(x, weight, bias, stride, padding, dilation, layout);
  x = in_layout(x, layout);
  weight = in_layout(weight, MemoryFormat::Contiguous);
  if (bias.has_value()) bias = in_layout(*bias, MemoryFormat::Contiguous);
  const Activation kind = parse_activation(activation);
  Tensor y = empty_output(x, g, x.scalar_type(), layout);
  dispatch_floating("depthwise_conv2d", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    torch::stable::parallel_for(0, g.planes * g.out_height, rows_per_task(g.out_width * g.channels),
                                [&](int64_t begin, int64_t end) {
                                  const auto scratch = memory<Compute<T>>(g.forward_memory(sizeof(T) == 2));
                                  EVKERNELS_CALL(depthwise_forward, data<T>(x), data<T>(weight), data<T>(bias),
                                                 mutable_data<T>(y), g, kind, scratch.get(), begin, end);
                                });
  });
  return in_layout(y, wanted);
}

}  // namespace

// Adds up the partial sums [unit][k * k + 1][channels] in the order of the units.
template <class T>
void reduce_depthwise_sums(const double* sums, T* grad_weight, T* grad_bias, const DepthwiseGeometry& g) {
  const int64_t taps = g.k * g.k, units = g.sums_per_plane();
  for (int64_t filter = 0; filter < g.filters; ++filter) {
    for (int64_t tap = grad_weight ? 0 : taps; tap < (grad_bias ? taps + 1 : taps); ++tap) {
      double total = 0;
      for (int64_t plane = g.channels == 1 ? filter : 0; plane < g.planes; plane += g.channels == 1 ? g.filters : 1) {
        for (int64_t unit = plane * units; unit < (plane + 1) * units; ++unit) {
          total += sums[(unit * (taps + 1) + tap) * g.channels + (g.channels == 1 ? 0 : filter)];
        }
      }
      T* const to = tap < taps ? grad_weight + filter * taps + tap : grad_bias + filter;
      *to = from_float<T>(static_cast<Compute<T>>(total));
    }
  }
}

template <class T>
void depthwise_backward_units(const T* x, const T* weight, const T* d_y, int64_t d_first, T* d_x, double* sums,
                              const DepthwiseGeometry& g, Compute<T>* memory, int64_t begin, int64_t end) {
  const T* const no_bias = nullptr;
  EVKERNELS_CALL(depthwise_backward, x, weight, no_bias, d_y, d_first, d_x, sums, g, Activation::kNone, memory, begin,
                 end);
}

#define EVKERNELS_INSTANTIATE(T)                                                                \
  template void reduce_depthwise_sums<T>(const double*, T*, T*, const DepthwiseGeometry&);      \
  template void depthwise_backward_units<T>(const T*, const T*, const T*, int64_t, T*, double*, \
                                            const DepthwiseGeometry&, Compute<T>*, int64_t, int64_t);
EVKERNELS_INSTANTIATE(float)
EVKERNELS_INSTANTIATE(double)
EVKERNELS_INSTANTIATE(BFloat16)
EVKERNELS_INSTANTIATE(Half)
#undef EVKERNELS_INSTANTIATE

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward_cpu(Tensor grad_output, Tensor x, Tensor weight,
                                                                 std::optional<Tensor> bias, int64_t stride,
                                                                 int64_t padding, std::string activation,
                                                                 int64_t dilation, bool need_x, bool need_weight,
                                                                 bool need_bias) {
  const MemoryFormat layout = layout_of_loops(x), wanted = common_layout(x);
  const DepthwiseGeometry g = depthwise_geometry(x, weight, bias, stride, padding, dilation, layout);
  check_grad_output(grad_output, x, g);
  grad_output = in_layout(grad_output, layout);
  x = in_layout(x, layout);
  weight = in_layout(weight, MemoryFormat::Contiguous);
  if (bias.has_value()) bias = in_layout(*bias, MemoryFormat::Contiguous);
  STD_TORCH_CHECK(!need_bias || bias.has_value(), "there is no bias to have a gradient");
  const Activation kind = parse_activation(activation);
  Tensor grad_x = empty_or_nothing(need_x, x, layout);
  Tensor grad_weight = empty_or_nothing(need_weight, weight, MemoryFormat::Contiguous);
  Tensor grad_bias = empty_or_nothing(need_bias, bias.has_value() ? *bias : x, MemoryFormat::Contiguous);
  dispatch_floating("depthwise_conv2d_backward", x.scalar_type(), [&](auto t) {
    using T = typename decltype(t)::type;
    const bool need_sums = need_weight || need_bias;
    const int64_t units = g.planes * g.sums_per_plane();
    const auto sums = need_sums ? memory<double>(units * (g.k * g.k + 1) * g.channels) : nullptr;
    T* const d_x = need_x ? mutable_data<T>(grad_x) : nullptr;
    const int64_t grain = rows_per_task(g.rows_per_sum() * g.out_width * g.channels);
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      const auto scratch = memory<Compute<T>>(g.backward_memory(sizeof(T) == 2));
      EVKERNELS_CALL(depthwise_backward, data<T>(x), data<T>(weight), data<T>(bias), data<T>(grad_output), 0, d_x,
                     sums.get(), g, kind, scratch.get(), begin, end);
    });
    if (need_sums) {
      reduce_depthwise_sums<T>(sums.get(), need_weight ? mutable_data<T>(grad_weight) : nullptr,
                               need_bias ? mutable_data<T>(grad_bias) : nullptr, g);
    }
  });
  return {need_x ? in_layout(grad_x, wanted) : grad_x, grad_weight, grad_bias};
}

}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&evkernels::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&evkernels::depthwise_conv2d_backward_cpu));
}
