// Depthwise-separable convolution with two norms on the CPU: tensors to pointers, workspace, threads, registration. The
// loops are in loops.inl and take channels_last; other layouts are copied.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/workspace.h"
#include "depthwise_conv2d/cpu.h"
#include "separable_conv2d/host.h"
#include "separable_norm_conv2d/norm.h"
#include "separable_norm_conv2d/statistics.h"

#define EVKERNELS_LOOPS "separable_norm_conv2d/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// The arguments that both directions take.
struct Call {
  SeparableShape shape;
  MemoryFormat layout;
  Tensor x, depthwise_weight, pointwise_weight;
  std::optional<Tensor> depthwise_bias, pointwise_bias;
  Tensor norm_weight, norm_bias, output_norm_weight, output_norm_bias;
  Norm norm, output_norm;

  Call(Tensor x_, Tensor depthwise_weight_, Tensor pointwise_weight_, std::optional<Tensor> depthwise_bias_,
       std::optional<Tensor> pointwise_bias_, Tensor norm_weight_, Tensor norm_bias_, Tensor output_norm_weight_,
       Tensor output_norm_bias_, int64_t stride, int64_t padding, const std::string& activation,
       const std::string& output_activation, int64_t groups, int64_t output_groups, double eps, double output_eps)
      : x(x_),
        depthwise_weight(depthwise_weight_),
        pointwise_weight(pointwise_weight_),
        depthwise_bias(depthwise_bias_),
        pointwise_bias(pointwise_bias_) {
    layout = common_layout(x);
    shape = prepare_separable_conv2d(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride,
                                     padding, activation, output_activation)
                .shape;
    x = in_layout(x, MemoryFormat::ChannelsLast);
    norm = {shape.batch, shape.channels, groups, eps};
    output_norm = {shape.batch, shape.outputs, output_groups, output_eps};
    for (const Norm& n : {norm, output_norm}) {
      STD_TORCH_CHECK(n.groups >= 0 && (n.groups == 0 || n.channels % n.groups == 0),
                      "groups must divide the channels");
    }
    const auto vector = [&](const Tensor& t, int64_t size) {
      STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.scalar_type() == x.scalar_type(),
                      "weights and biases of norms must be [channels] in the dtype of x");
      return in_layout(t, MemoryFormat::Contiguous);
    };
    norm_weight = vector(norm_weight_, shape.channels);
    norm_bias = vector(norm_bias_, shape.channels);
    output_norm_weight = vector(output_norm_weight_, shape.outputs);
    output_norm_bias = vector(output_norm_bias_, shape.outputs);
  }

  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const {
    const MemoryFormat format = sizes.size() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    return torch::stable::empty(sizes, dtype, std::nullopt, x.device(), std::nullopt, format);
  }
  Tensor empty_output() const {
    return empty({shape.batch, shape.outputs, shape.out_height, shape.out_width}, x.scalar_type());
  }
  Tensor empty_like(const Tensor& t) const {
    return torch::stable::empty(t.sizes(), t.scalar_type(), std::nullopt, t.device());
  }
  int64_t units() const { return EVKERNELS_CALL(norm_units, shape); }
  int64_t pixels() const { return shape.out_height * shape.out_width; }
  // Pixels of a unit.
  double count(int64_t unit) const {
    const int64_t size = EVKERNELS_CALL(norm_unit_size), begin = unit % units() * size;
    return static_cast<double>(std::min(size, pixels() - begin));
  }

  // Calls f(begin, end, memory) for shares of all units.
  template <class T, class F>
  void for_units(const F& f) const {
    torch::stable::parallel_for(0, shape.batch * units(), 1, [&](int64_t begin, int64_t end) {
      const auto buffer = zeroed_workspace<Compute<T>>(EVKERNELS_CALL(norm_buffer_size<T>, shape));
      f(begin, end, buffer.get());
    });
  }
  template <class T>
  auto pack() const {
    auto packed = workspace<Compute<T>>(EVKERNELS_CALL(separable_conv2d_packed_size<T>, shape));
    EVKERNELS_CALL(separable_conv2d_pack, data<T>(depthwise_weight), data<T>(depthwise_bias), data<T>(pointwise_weight),
                   data<T>(pointwise_bias), packed.get(), shape, true);
    return packed;
  }
};

// Means and variances [2, rows, columns]: as a tensor of the computation's dtype and, unrounded, for what follows.
template <class R>
std::vector<double> write_statistics(const std::vector<Moments>& moments, Tensor& statistics) {
  const int64_t size = static_cast<int64_t>(moments.size());
  std::vector<double> values(2 * size);
  for (int64_t k = 0; k < size; ++k) {
    values[k] = moments[k].mean;
    values[size + k] = moments[k].deviations / moments[k].count;
  }
  for (int64_t k = 0; k < 2 * size; ++k) mutable_data<R>(statistics)[k] = static_cast<R>(values[k]);
  return values;
}
template <class R>
std::vector<double> read_statistics(const Tensor& statistics, const Norm& norm) {
  const int64_t size = 2 * norm.rows() * norm.columns();
  STD_TORCH_CHECK(statistics.numel() == size, "statistics must be [2, rows, columns] as the forward returns them");
  const R* const from = data<R>(statistics);
  return std::vector<double>(from, from + size);
}

template <class R>
Affine<R> affine(const Rows<R>& rows) {
  return {rows.values[0].data(), rows.values[1].data(), rows.pitch};
}
template <class R>
NormGradient<R> gradient(const Rows<R>& rows) {
  return {rows.values[0].data(), rows.values[1].data(), rows.values[2].data(), rows.values[3].data(), rows.pitch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> separable_norm_conv2d(
    Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, std::optional<Tensor> depthwise_bias,
    std::optional<Tensor> pointwise_bias, Tensor norm_weight, Tensor norm_bias, Tensor output_norm_weight,
    Tensor output_norm_bias, std::optional<Tensor> residual, int64_t stride, int64_t padding, std::string activation,
    std::string output_activation, int64_t groups, int64_t output_groups, double eps, double output_eps) {
  const Call call(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias,
                  output_norm_weight, output_norm_bias, stride, padding, activation, output_activation, groups,
                  output_groups, eps, output_eps);
  const SeparableShape& s = call.shape;
  STD_TORCH_CHECK(s.batch > 0, "the batch must not be empty");
  const ScalarType statistics_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor pre = call.empty_output(), y = call.empty_output();
  if (residual.has_value()) bring_gradient("residual", residual, y, x.scalar_type(), MemoryFormat::ChannelsLast);
  Tensor statistics = call.empty({2, call.norm.rows(), call.norm.columns()}, statistics_type);
  Tensor output_statistics = call.empty({2, call.output_norm.rows(), call.output_norm.columns()}, statistics_type);
  const auto count = [&](int64_t unit) { return call.count(unit); };
  dispatch_floating("separable_norm_conv2d", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto packed = call.pack<T>();
    std::vector<double> sums(s.batch * call.units() * 3 * std::max(s.channels, s.outputs));
    const T* const from = data<T>(call.x);
    call.for_units<T>([&](int64_t begin, int64_t end, R* buffer) {
      EVKERNELS_CALL(norm_depthwise_moments, from, packed.get(), sums.data(), buffer, s, begin, end);
    });
    const auto inner = write_statistics<R>(moments_of(call.norm, sums.data(), call.units(), count), statistics);
    const Rows<R> norm = affine_of<R>(call.norm, inner.data(), inner.data() + inner.size() / 2,
                                      data<T>(call.norm_weight), data<T>(call.norm_bias));
    call.for_units<T>([&](int64_t begin, int64_t end, R* buffer) {
      EVKERNELS_CALL(norm_products, from, packed.get(), affine(norm), mutable_data<T>(pre), sums.data(), buffer, s,
                     begin, end);
    });
    const auto outer =
        write_statistics<R>(moments_of(call.output_norm, sums.data(), call.units(), count), output_statistics);
    const Rows<R> output_norm = affine_of<R>(call.output_norm, outer.data(), outer.data() + outer.size() / 2,
                                             data<T>(call.output_norm_weight), data<T>(call.output_norm_bias));
    call.for_units<T>([&](int64_t begin, int64_t end, R*) {
      EVKERNELS_CALL(norm_outputs, data<T>(pre), affine(output_norm), data<T>(residual), mutable_data<T>(y), s, begin,
                     end);
    });
  });
  return {in_layout(y, call.layout), pre, statistics, output_statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_norm_conv2d_backward(
    Tensor grad_output, Tensor x, Tensor depthwise_weight, Tensor pointwise_weight,
    std::optional<Tensor> depthwise_bias, std::optional<Tensor> pointwise_bias, Tensor norm_weight, Tensor norm_bias,
    Tensor output_norm_weight, Tensor output_norm_bias, Tensor pre, Tensor statistics, Tensor output_statistics,
    int64_t stride, int64_t padding, std::string activation, std::string output_activation, int64_t groups,
    int64_t output_groups, double eps, double output_eps, bool need_x) {
  const Call call(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias,
                  output_norm_weight, output_norm_bias, stride, padding, activation, output_activation, groups,
                  output_groups, eps, output_eps);
  const SeparableShape& s = call.shape;
  STD_TORCH_CHECK(s.batch > 0, "the batch must not be empty");
  check_separable_output("grad_output", grad_output, call.x, s);
  check_separable_output("pre", pre, call.x, s);
  grad_output = in_layout(grad_output, MemoryFormat::ChannelsLast);
  pre = in_layout(pre, MemoryFormat::ChannelsLast);
  const ScalarType dtype = x.scalar_type();
  Tensor d_inner = call.empty({s.batch, s.channels, s.out_height, s.out_width}, dtype);
  Tensor d_pointwise = call.empty_like(call.pointwise_weight), d_pointwise_bias = call.empty({s.outputs}, dtype);
  Tensor d_norm_weight = call.empty({s.channels}, dtype), d_norm_bias = call.empty({s.channels}, dtype);
  Tensor d_output_norm_weight = call.empty({s.outputs}, dtype), d_output_norm_bias = call.empty({s.outputs}, dtype);
  dispatch_floating("separable_norm_conv2d_backward", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const auto packed = call.pack<T>();
    const auto panels = workspace<R>(s.outputs * (s.channels + 16));
    EVKERNELS_CALL(separable_conv2d_pack_backward, data<T>(call.pointwise_weight), panels.get(), s);
    const int64_t units = s.batch * call.units();
    std::vector<double> sums(units * 2 * std::max(s.channels, s.outputs)), bias_sums(units * s.outputs);
    const auto inner = read_statistics<R>(statistics, call.norm);
    const auto outer = read_statistics<R>(output_statistics, call.output_norm);
    const double *const mean = inner.data(), *const variance = mean + inner.size() / 2;
    const double *const output_mean = outer.data(), *const output_variance = output_mean + outer.size() / 2;
    const T* const nothing = nullptr;
    const T *const weight = data<T>(call.norm_weight), *const output_weight = data<T>(call.output_norm_weight);

    const Rows<R> output_norm =
        affine_of<R>(call.output_norm, output_mean, output_variance, output_weight, data<T>(call.output_norm_bias));
    const Rows<R> output_normal = affine_of<R>(call.output_norm, output_mean, output_variance, nothing, nothing);
    call.for_units<T>([&](int64_t begin, int64_t end, R*) {
      EVKERNELS_CALL(norm_output_sums<false>, data<T>(pre), data<T>(grad_output), nullptr, affine(output_norm),
                     affine(output_normal), sums.data(), s, begin, end);
    });
    const Rows<R> output_gradient = gradient_of_norm<R>(
        call.output_norm, output_mean, output_variance, output_weight, sums.data(), call.units(), call.pixels(), false,
        mutable_data<T>(d_output_norm_weight), mutable_data<T>(d_output_norm_bias));

    const Rows<R> normal = affine_of<R>(call.norm, mean, variance, nothing, nothing);
    Rows<R> behind(s.batch, s.channels);
    for (int64_t n = 0; n < s.batch; ++n) {
      for (int64_t c = 0; c < s.channels; ++c) {
        behind(0, n, c) = to_float(weight[c]);
        behind(1, n, c) = to_float(data<T>(call.norm_bias)[c]);
      }
    }
    const int64_t size = EVKERNELS_CALL(norm_weight_sums_size<T>, s);
    const auto weight_sums = workspace<R>(units * size);
    const NormBackward<T> b = {
        data<T>(call.x),          data<T>(pre),      data<T>(grad_output), panels.get(),
        affine(normal),           affine(behind),    affine(output_norm),  gradient(output_gradient),
        mutable_data<T>(d_inner), weight_sums.get(), sums.data(),          bias_sums.data()};
    call.for_units<T>([&](int64_t begin, int64_t end, R* buffer) {
      EVKERNELS_CALL(norm_backward_products, b, packed.get(), buffer, s, begin, end);
    });
    const Rows<R> inner_gradient =
        gradient_of_norm<R>(call.norm, mean, variance, weight, sums.data(), call.units(), call.pixels(), true,
                            mutable_data<T>(d_norm_weight), mutable_data<T>(d_norm_bias));
    call.for_units<T>([&](int64_t begin, int64_t end, R* buffer) {
      EVKERNELS_CALL(norm_depthwise_gradient, data<T>(call.x), packed.get(), affine(normal), gradient(inner_gradient),
                     mutable_data<T>(d_inner), buffer, s, begin, end);
    });

    const int64_t row = size / EVKERNELS_CALL(norm_weight_rows<T>, s);
    for (int64_t o = 0; o < s.outputs; ++o) {
      double bias = 0;
      for (int64_t unit = 0; output_groups && unit < units; ++unit) bias += bias_sums[unit * s.outputs + o];
      mutable_data<T>(d_pointwise_bias)[o] = from_float<T>(static_cast<R>(bias));
      for (int64_t c = 0; c < s.channels; ++c) {
        double total = 0;
        for (int64_t unit = 0; unit < units; ++unit) total += weight_sums.get()[unit * size + o * row + c];
        mutable_data<T>(d_pointwise)[o * s.channels + c] = from_float<T>(static_cast<R>(total));
      }
    }
  });
  // A bias before a batch norm changes nothing. Its gradient is zero, of which a sum over the pixels would leave its
  // rounding.
  const bool bias_acts = call.depthwise_bias.has_value() && groups;
  auto [d_x, d_depthwise, d_depthwise_bias] = depthwise_conv2d_backward_cpu(
      d_inner, call.x, call.depthwise_weight, call.depthwise_bias, stride, padding, "none", 1, need_x, true, bias_acts);
  if (call.depthwise_bias.has_value() && !bias_acts) {
    d_depthwise_bias = call.empty({s.channels}, dtype);
    torch::stable::zero_(d_depthwise_bias);
  }
  return {need_x ? in_layout(d_x, call.layout) : d_x,
          d_depthwise,
          d_pointwise,
          d_depthwise_bias,
          d_pointwise_bias,
          d_norm_weight,
          d_norm_bias,
          d_output_norm_weight,
          d_output_norm_bias};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("separable_norm_conv2d", TORCH_BOX(&evkernels::separable_norm_conv2d));
  m.impl("separable_norm_conv2d_backward", TORCH_BOX(&evkernels::separable_norm_conv2d_backward));
}
