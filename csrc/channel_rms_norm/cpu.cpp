// RMS norm over channels on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Floor: x is read and y written, the gradient reads x and the gradient of y and writes that of x; 3 operations an
// element forward and 8 backward hide behind that. PyTorch's operators move x 9 times forward, not 2.
// Threads share blocks of pixels of a sample (some samples where these are small), all channels of which stay in the
// cache between two passes. In contiguous tensors the second pass reads where the first did: copying a block to
// consecutive addresses took 1.1 to 2 times as long, rows of 64 bytes, which need one pass alone, from 2.5 times
// on.
// The sums that make the gradients of weight and bias are added in double in the order of the units.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "channel_rms_norm/shape.h"
#include "common/tensor.h"
#include "common/workspace.h"

#define EVKERNELS_LOOPS "channel_rms_norm/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Elements of a unit: 64 KiB of floats, which the second level of the cache holds beside what is written. Half or twice
// as many are within the noise.
constexpr int64_t kUnit = 16384;
// Pixels of a block at least: 64 of 256 channels, 256 bytes a row, took a third longer.
constexpr int64_t kFewestPixels = 256;
// And at most, because a block's share of the gradients of weight and bias is summed up in float.
constexpr int64_t kMostPixels = 512;
// Lanes of the widest vector, which may reach over the end of what is used of an array.
constexpr int64_t kWidest = 16;

struct Call {
  Tensor x;
  MemoryFormat layout;
  ChannelNormShape shape;
  bool rows;  // Whether a pixel's channels are adjacent.

  Call(Tensor x_, const Tensor& weight, const Tensor& bias, double eps) : x(x_), layout(common_layout(x_)) {
    STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) > 0, "x must be [N, C, ...] with C at least 1");
    for (const Tensor* t : {&weight, &bias})
      STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1) && is_wide_enough(t->scalar_type()),
                      "weight and bias must be [C] in the dtype of x or float32");
    x = in_layout(x, layout);
    const int64_t channels = x.size(1), all = x.numel() / channels, pixels = x.size(0) ? all / x.size(0) : 0;
    rows = layout == MemoryFormat::ChannelsLast || pixels == 1;
    const int64_t block = std::clamp(kUnit / channels, rows ? kWidest : kFewestPixels, kMostPixels);
    shape = {rows ? 1 : x.size(0), channels, rows ? all : pixels, eps, 1, 1};
    shape.blocks = std::max<int64_t>(shape.pixels / block, 1);
    shape.samples = shape.blocks > 1 ? 1 : std::max<int64_t>(block / std::max<int64_t>(shape.pixels, 1), 1);
  }

  bool is_wide_enough(ScalarType dtype) const {
    return dtype == x.scalar_type() || (dtype == ScalarType::Float && x.scalar_type() != ScalarType::Double);
  }
  // Enough for a vector's whole reach at the end of a block's pixels, or of its channels.
  int64_t pitch() const {
    const int64_t largest = shape.pixels / shape.blocks + (shape.blocks > 1 ? 2 * kWidest : 0);
    return (rows ? shape.channels : largest) + 2 * kWidest;
  }
  // Calls f(begin, end) for shares of all units, of at least kUnit elements: 10 us of work.
  template <class F>
  void for_units(const F& f) const {
    const int64_t elements = x.numel(), units = shape.units();
    if (elements > 0) torch::stable::parallel_for(0, units, kUnit * units / elements + 1, f);
  }
};

// The values of a weight or bias, with room for the last vector.
template <class A>
std::vector<A> widened(Tensor t) {
  t = in_layout(t, MemoryFormat::Contiguous);
  std::vector<A> values(t.size(0) + kWidest);
  dispatch_floating("channel_rms_norm", t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t c = 0; c < t.size(0); ++c) values[c] = static_cast<A>(to_float(data<T>(t)[c]));
  });
  return values;
}

Tensor rounded(const double* values, const Tensor& like) {
  Tensor result = torch::stable::empty({like.size(0)}, like.scalar_type(), std::nullopt, like.device());
  dispatch_floating("channel_rms_norm_backward", like.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t c = 0; c < like.size(0); ++c)
      mutable_data<T>(result)[c] = from_float<T>(static_cast<Compute<T>>(values[c]));
  });
  return result;
}

Tensor channel_rms_norm(Tensor x, Tensor weight, Tensor bias, double eps) {
  const Call call(x, weight, bias, eps);
  const ChannelNormShape& s = call.shape;
  Tensor y = empty_in_layout(call.x, x.scalar_type(), call.layout);
  dispatch_floating("channel_rms_norm", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const T* const from = data<T>(call.x);
    T* const to = mutable_data<T>(y);
    const std::vector<A> w = widened<A>(weight), b = widened<A>(bias);
    call.for_units([&](int64_t begin, int64_t end) {
      if (call.rows) {
        EVKERNELS_CALL(channel_norm_last_forward, from, w.data(), b.data(), to, s, s.first_pixel(begin),
                       s.first_pixel(end));
      } else {
        const auto memory = workspace<A>(call.pitch());
        EVKERNELS_CALL(channel_norm_forward, from, w.data(), b.data(), to, s, memory.get(), begin, end);
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> channel_rms_norm_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor bias,
                                                             double eps) {
  const Call call(x, weight, bias, eps);
  const ChannelNormShape& s = call.shape;
  bring_gradient("grad_output", grad_output, x, x.scalar_type(), call.layout);
  Tensor d_x = empty_in_layout(call.x, x.scalar_type(), call.layout);
  const int64_t C = s.channels;
  std::vector<double> sums(s.units() * 2 * C);
  dispatch_floating("channel_rms_norm_backward", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const T *const from = data<T>(call.x), *const gradient = data<T>(grad_output);
    T* const to = mutable_data<T>(d_x);
    const std::vector<A> w = widened<A>(weight);
    call.for_units([&](int64_t begin, int64_t end) {
      const int64_t pitch = call.pitch();
      const auto memory = workspace<A>(2 * pitch);
      if (call.rows) {
        for (int64_t unit = begin; unit < end; ++unit)
          EVKERNELS_CALL(channel_norm_last_backward, gradient, from, w.data(), to, sums.data() + unit * 2 * C, s,
                         memory.get(), pitch, s.first_pixel(unit), s.first_pixel(unit + 1));
      } else {
        EVKERNELS_CALL(channel_norm_backward, gradient, from, w.data(), to, sums.data(), s, memory.get(), pitch, begin,
                       end);
      }
    });
  });
  for (int64_t unit = 1; unit < s.units(); ++unit)
    for (int64_t k = 0; k < 2 * C; ++k) sums[k] += sums[unit * 2 * C + k];
  sums.resize(2 * C);
  return {d_x, rounded(sums.data(), weight), rounded(sums.data() + C, bias)};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("channel_rms_norm", TORCH_BOX(&evkernels::channel_rms_norm));
  m.impl("channel_rms_norm_backward", TORCH_BOX(&evkernels::channel_rms_norm_backward));
}
