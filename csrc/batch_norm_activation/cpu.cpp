// Batch norm with live statistics, activation and projection on the CPU: tensors to pointers, threads, registration.
// The loops are in loops.inl and take channels_last; other layouts are copied.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/activation_host.h"
#include "common/tensor.h"
#include "separable_conv2d/shape.h"
#include "separable_norm_conv2d/norm.h"
#include "separable_norm_conv2d/statistics.h"

#define EVKERNELS_LOOPS "batch_norm_activation/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// The arguments that both directions take. All pixels of the batch are one map; of few channels as many pixels count as
// one as fill a vector, and the norm as one of `folds` times the channels; not so before a projection.
struct Call {
  Tensor x, weight, bias;
  std::optional<Tensor> projection;
  MemoryFormat layout;
  int64_t channels, pixels, folds = 1;
  SeparableShape shape;
  Norm norm;

  Call(Tensor x_, Tensor weight_, Tensor bias_, std::optional<Tensor> projection_, const std::string& activation,
       double eps)
      : x(x_) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W] and not empty");
    layout = common_layout(x);
    x = in_layout(x, MemoryFormat::ChannelsLast);
    channels = x.size(1);
    pixels = x.numel() / channels;
    const auto vector = [&](const Tensor& t) {
      STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.scalar_type() == x.scalar_type(),
                      "weight, bias and projection must be [C] in the dtype of x");
      return in_layout(t, MemoryFormat::Contiguous);
    };
    weight = vector(weight_);
    bias = vector(bias_);
    if (projection_.has_value()) projection = vector(*projection_);
    while (!projection.has_value() && 2 * folds * channels <= 16 && pixels % (2 * folds) == 0) folds *= 2;
    shape = {};
    shape.batch = 1;
    shape.channels = shape.outputs = folds * channels;
    shape.height = shape.out_height = pixels / folds;
    shape.width = shape.out_width = 1;
    shape.size = shape.stride = 1;
    shape.output_activation = parse_activation(activation);
    norm = {1, shape.outputs, 0, eps};
  }

  int64_t units() const { return EVKERNELS_CALL(norm_units, shape); }
  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const {
    return torch::stable::empty(sizes, dtype, std::nullopt, x.device());
  }
  template <class T>
  std::vector<T> folded(const T* vector) const {
    std::vector<T> result;
    for (int64_t fold = 0; fold < folds; ++fold) result.insert(result.end(), vector, vector + channels);
    return result;
  }
  Tensor empty_output() const {
    if (projection.has_value()) return empty({x.size(0), 1, x.size(2), x.size(3)}, x.scalar_type());
    return empty_in_layout(x, x.scalar_type(), MemoryFormat::ChannelsLast);
  }
  // The projection's weights as the loops read them, padded to vectors; empty without one.
  template <class R, class T>
  std::vector<R> projection_row() const {
    if (!projection.has_value()) return {};
    std::vector<R> row(Rows<R>(1, channels).pitch);
    for (int64_t c = 0; c < channels; ++c) row[c] = to_float(data<T>(*projection)[c]);
    return row;
  }
  // Calls f(begin, end) for shares of all units.
  template <class F>
  void for_units(const F& f) const {
    torch::stable::parallel_for(0, units(), 1, f);
  }
};

// What a norm multiplies and adds, with weight and bias, or of the normalisation alone where these are empty.
template <class R, class T>
Rows<R> affine_rows(const Call& call, const std::vector<double>& statistics, const std::vector<T>& weight,
                    const std::vector<T>& bias) {
  const T* const nothing = nullptr;
  return affine_of<R>(call.norm, statistics.data(), statistics.data() + call.norm.channels,
                      weight.empty() ? nothing : weight.data(), bias.empty() ? nothing : bias.data());
}
template <class R>
Affine<R> affine(const Rows<R>& rows) {
  return {rows.values[0].data(), rows.values[1].data(), rows.pitch};
}

std::tuple<Tensor, Tensor> batch_norm_activation(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> projection,
                                                 std::string activation, double eps) {
  const Call call(x, weight, bias, projection, activation, eps);
  const SeparableShape& s = call.shape;
  const ScalarType statistics_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor y = call.empty_output();
  Tensor statistics = call.empty({2, call.channels}, statistics_type);
  dispatch_floating("batch_norm_activation", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const T* const from = data<T>(call.x);
    std::vector<double> sums(call.units() * 3 * s.outputs);
    call.for_units(
        [&](int64_t begin, int64_t end) { EVKERNELS_CALL(batch_norm_moments, from, sums.data(), s, begin, end); });
    const int64_t size = EVKERNELS_CALL(norm_unit_size), height = s.out_height;
    const auto count = [&](int64_t unit) { return static_cast<double>(std::min(size, height - unit * size)); };
    const std::vector<Moments> moments = moments_of(call.norm, sums.data(), call.units(), count);
    std::vector<double> values(2 * s.outputs);
    for (int64_t c = 0; c < call.channels; ++c) {
      Moments total;
      for (int64_t fold = 0; fold < call.folds; ++fold) total.add(moments[fold * call.channels + c]);
      const double variance = total.deviations / total.count;
      mutable_data<R>(statistics)[c] = static_cast<R>(total.mean);
      mutable_data<R>(statistics)[call.channels + c] = static_cast<R>(variance);
      for (int64_t k = c; k < s.outputs; k += call.channels) {
        values[k] = total.mean;
        values[s.outputs + k] = variance;
      }
    }
    const Rows<R> norm =
        affine_rows<R>(call, values, call.folded(data<T>(call.weight)), call.folded(data<T>(call.bias)));
    const std::vector<R> weights = call.projection_row<R, T>();
    const T* const nothing = nullptr;
    call.for_units([&](int64_t begin, int64_t end) {
      if (projection.has_value()) {
        EVKERNELS_CALL(batch_norm_projection, from, affine(norm), weights.data(), mutable_data<T>(y), s, begin, end);
        return;
      }
      EVKERNELS_CALL(norm_outputs, from, affine(norm), nothing, mutable_data<T>(y), s, begin, end);
    });
  });
  return {projection.has_value() ? y : in_layout(y, call.layout), statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_activation_backward(Tensor grad_output, Tensor x, Tensor weight,
                                                                          Tensor bias, std::optional<Tensor> projection,
                                                                          Tensor statistics, std::string activation,
                                                                          double eps) {
  const Call call(x, weight, bias, projection, activation, eps);
  const SeparableShape& s = call.shape;
  const ScalarType dtype = x.scalar_type();
  const bool projected = projection.has_value();
  if (projected) {
    STD_TORCH_CHECK(grad_output.numel() == call.pixels && grad_output.scalar_type() == dtype,
                    "grad_output must have the size of the output and the dtype of x");
    grad_output = in_layout(grad_output, MemoryFormat::Contiguous);
  } else {
    bring_gradient("grad_output", grad_output, x, dtype, MemoryFormat::ChannelsLast);
  }
  STD_TORCH_CHECK(statistics.numel() == 2 * call.channels && statistics.is_contiguous(),
                  "statistics must be [2, C] as the forward returns them");
  Tensor d_x = empty_in_layout(call.x, dtype, MemoryFormat::ChannelsLast);
  Tensor d_weight = call.empty({call.channels}, dtype), d_bias = call.empty({call.channels}, dtype);
  Tensor d_projection = call.empty({projected ? call.channels : 0}, dtype);
  dispatch_floating("batch_norm_activation_backward", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const T *const from = data<T>(call.x), *const d_y = data<T>(grad_output);
    std::vector<double> values(2 * s.outputs);
    for (int64_t k = 0; k < 2 * s.outputs; ++k)
      values[k] = data<R>(statistics)[k / s.outputs * call.channels + k % call.channels];
    const std::vector<T> weights = call.folded(data<T>(call.weight)), none;
    const Rows<R> norm = affine_rows<R>(call, values, weights, call.folded(data<T>(call.bias)));
    const Rows<R> normal = affine_rows<R>(call, values, none, none);
    const std::vector<R> row = call.projection_row<R, T>();
    const int64_t size = (projected ? 3 : 2) * s.outputs;
    std::vector<double> sums(call.units() * size), totals(size);
    call.for_units([&](int64_t begin, int64_t end) {
      if (projected) {
        EVKERNELS_CALL(norm_output_sums<true>, from, d_y, row.data(), affine(norm), affine(normal), sums.data(), s,
                       begin, end);
      } else {
        EVKERNELS_CALL(norm_output_sums<false>, from, d_y, nullptr, affine(norm), affine(normal), sums.data(), s, begin,
                       end);
      }
    });
    for (int64_t k = 0; k < size; ++k) {
      // Every fold of a channel has the sums over all of them.
      const int64_t first = k / s.outputs * s.outputs + k % call.channels;
      for (int64_t unit = 0; unit < call.units(); ++unit)
        for (int64_t fold = 0; fold < call.folds; ++fold) totals[k] += sums[unit * size + first + fold * call.channels];
    }
    for (int64_t c = 0; projected && c < call.channels; ++c)
      mutable_data<T>(d_projection)[c] = from_float<T>(static_cast<R>(totals[2 * s.outputs + c]));
    std::vector<T> d_weights(s.outputs), d_biases(s.outputs);
    const Rows<R> rows = gradient_of_norm<R>(call.norm, values.data(), values.data() + s.outputs, weights.data(),
                                             totals.data(), 1, call.pixels, false, d_weights.data(), d_biases.data());
    std::copy_n(d_weights.begin(), call.channels, mutable_data<T>(d_weight));
    std::copy_n(d_biases.begin(), call.channels, mutable_data<T>(d_bias));
    const NormGradient<R> gradient = {rows.values[0].data(), rows.values[1].data(), rows.values[2].data(),
                                      rows.values[3].data(), rows.pitch};
    call.for_units([&](int64_t begin, int64_t end) {
      if (projected) {
        EVKERNELS_CALL(batch_norm_input_gradient<true>, from, d_y, row.data(), affine(norm), gradient,
                       mutable_data<T>(d_x), s, begin, end);
      } else {
        EVKERNELS_CALL(batch_norm_input_gradient<false>, from, d_y, nullptr, affine(norm), gradient,
                       mutable_data<T>(d_x), s, begin, end);
      }
    });
  });
  return {in_layout(d_x, call.layout), d_weight, d_bias, d_projection};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("batch_norm_activation", TORCH_BOX(&evkernels::batch_norm_activation));
  m.impl("batch_norm_activation_backward", TORCH_BOX(&evkernels::batch_norm_activation_backward));
}
