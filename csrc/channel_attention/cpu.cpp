// Channel attention on the CPU: tensors to pointers, the small network, threads, registration. The loops are in
// loops.inl and take channels_last; other layouts are copied.
//
// Floor: the forward reads x twice, for a sample's means come before its outputs, and writes y; the gradient reads x
// once, the gradient of y twice, and writes that of x. PyTorch's operators move twice as much in the gradient: products
// of x and the gradient are written and read, and so is the means' gradient, once for every pixel.
// The network has a few numbers per sample, in double; the gradient forms it anew from the means.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "common/tensor.h"
#include "separable_conv2d/shape.h"
#include "separable_norm_conv2d/norm.h"

#define EVKERNELS_LOOPS "channel_attention/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

std::vector<double> doubles(Tensor t) {
  t = in_layout(t, MemoryFormat::Contiguous);
  std::vector<double> values(t.numel());
  dispatch_floating("channel_attention", t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for (size_t k = 0; k < values.size(); ++k) values[k] = to_float(data<T>(t)[k]);
  });
  return values;
}

// [rows, columns] times a vector of `columns` or, transposed, of `rows`.
std::vector<double> product(const std::vector<double>& matrix, const std::vector<double>& vector) {
  std::vector<double> result(matrix.size() / vector.size());
  for (size_t k = 0; k < matrix.size(); ++k) result[k / vector.size()] += matrix[k] * vector[k % vector.size()];
  return result;
}
std::vector<double> transposed_product(const std::vector<double>& matrix, const std::vector<double>& vector) {
  const size_t columns = matrix.size() / vector.size();
  std::vector<double> result(columns);
  for (size_t k = 0; k < matrix.size(); ++k) result[k % columns] += matrix[k] * vector[k / columns];
  return result;
}

// scale = sigmoid(expand * gelu(reduce * means)) of one sample.
struct Network {
  std::vector<double> reduce, expand;

  struct Values {
    std::vector<double> inner, activated, scale;
  };
  Values operator()(const std::vector<double>& means) const {
    Values v;
    v.inner = product(reduce, means);
    for (const double x : v.inner) v.activated.push_back(x * below(x));
    for (const double x : product(expand, v.activated)) v.scale.push_back(1 / (1 + std::exp(-x)));
    return v;
  }
  // The share of a normal distribution below x.
  static double below(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }

  // From the gradient of the scale to that of the means, and added to those of both weights.
  std::vector<double> gradient(const std::vector<double>& means, std::vector<double> d_scale,
                               std::vector<double>& d_reduce, std::vector<double>& d_expand) const {
    const Values v = (*this)(means);
    for (size_t c = 0; c < d_scale.size(); ++c) d_scale[c] *= v.scale[c] * (1 - v.scale[c]);
    std::vector<double> d_inner = transposed_product(expand, d_scale);
    for (size_t r = 0; r < d_inner.size(); ++r) {
      const double x = v.inner[r];
      d_inner[r] *= below(x) + x * std::exp(-x * x / 2) * 0.39894228040143268;
    }
    for (size_t k = 0; k < expand.size(); ++k)
      d_expand[k] += d_scale[k / d_inner.size()] * v.activated[k % d_inner.size()];
    for (size_t k = 0; k < reduce.size(); ++k) d_reduce[k] += d_inner[k / means.size()] * means[k % means.size()];
    return transposed_product(reduce, d_inner);
  }
};

// The arguments that both directions take.
struct Call {
  Tensor x;
  MemoryFormat layout;
  int64_t samples, channels, pixels;
  SeparableShape shape;
  Network network;

  Call(Tensor x_, const Tensor& reduce_weight, const Tensor& expand_weight) : x(x_), layout(common_layout(x_)) {
    STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must be [N, C, H, W] and not empty");
    x = in_layout(x, MemoryFormat::ChannelsLast);
    samples = x.size(0);
    channels = x.size(1);
    pixels = x.size(2) * x.size(3);
    for (const Tensor* t : {&reduce_weight, &expand_weight})
      STD_TORCH_CHECK(t->dim() == 4 && t->scalar_type() == x.scalar_type() && t->numel() == reduce_weight.numel() &&
                          t->size(t == &reduce_weight) == channels && t->size(2) * t->size(3) == 1,
                      "the weights must be [R, C, 1, 1] and [C, R, 1, 1] in the dtype of x");
    shape = {};
    shape.batch = samples;
    shape.channels = shape.outputs = channels;
    shape.height = shape.out_height = pixels;
    shape.width = shape.out_width = 1;
    network = {doubles(reduce_weight), doubles(expand_weight)};
  }

  int64_t units() const { return EVKERNELS_CALL(norm_units, shape); }
  // Calls f(begin, end) for shares of all units.
  template <class F>
  void for_units(const F& f) const {
    torch::stable::parallel_for(0, samples * units(), 1, f);
  }
  // The sums of a sample's units, times `factor`.
  std::vector<double> of_sample(const std::vector<double>& sums, int64_t sample, double factor) const {
    std::vector<double> result(channels);
    for (int64_t k = sample * units() * channels; k < (sample + 1) * units() * channels; ++k)
      result[k % channels] += sums[k] * factor;
    return result;
  }
};

// What is multiplied and added per sample and channel, padded to vectors.
template <class R>
struct ScaleRows {
  int64_t pitch;
  std::vector<R> scale, shift;

  explicit ScaleRows(const Call& call)
      : pitch((call.channels + 31) / 16 * 16), scale(call.samples * pitch), shift(call.samples * pitch) {}
  Affine<R> get() const { return {scale.data(), shift.data(), pitch}; }
};

std::tuple<Tensor, Tensor> channel_attention(Tensor x, Tensor reduce_weight, Tensor expand_weight) {
  const Call call(x, reduce_weight, expand_weight);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor y = empty_in_layout(call.x, x.scalar_type(), MemoryFormat::ChannelsLast);
  Tensor means = torch::stable::empty({call.samples, call.channels}, wide, std::nullopt, x.device());
  dispatch_floating("channel_attention", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const T* const from = data<T>(call.x);
    const T* const nothing = nullptr;
    std::vector<double> sums(call.samples * call.units() * call.channels);
    call.for_units([&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(attention_sums<false>, from, nothing, sums.data(), call.shape, begin, end);
    });
    ScaleRows<R> rows(call);
    for (int64_t n = 0; n < call.samples; ++n) {
      std::vector<double> mean = call.of_sample(sums, n, 1.0 / call.pixels);
      // As the gradient will read them.
      for (int64_t c = 0; c < call.channels; ++c)
        mean[c] = mutable_data<R>(means)[n * call.channels + c] = static_cast<R>(mean[c]);
      const std::vector<double> scale = call.network(mean).scale;
      for (int64_t c = 0; c < call.channels; ++c) rows.scale[n * rows.pitch + c] = static_cast<R>(scale[c]);
    }
    call.for_units([&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(attention_scale, from, rows.get(), mutable_data<T>(y), call.shape, begin, end);
    });
  });
  return {in_layout(y, call.layout), means};
}

std::tuple<Tensor, Tensor, Tensor> channel_attention_backward(Tensor grad_output, Tensor x, Tensor reduce_weight,
                                                              Tensor expand_weight, Tensor means) {
  const Call call(x, reduce_weight, expand_weight);
  const ScalarType dtype = x.scalar_type();
  bring_gradient("grad_output", grad_output, x, dtype, MemoryFormat::ChannelsLast);
  STD_TORCH_CHECK(means.numel() == call.samples * call.channels, "means must be [N, C] as the forward returns them");
  const std::vector<double> all_means = doubles(means);
  Tensor d_x = empty_in_layout(call.x, dtype, MemoryFormat::ChannelsLast);
  Tensor d_reduce_weight = torch::stable::empty(reduce_weight.sizes(), dtype, std::nullopt, x.device());
  Tensor d_expand_weight = torch::stable::empty(expand_weight.sizes(), dtype, std::nullopt, x.device());
  dispatch_floating("channel_attention_backward", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using R = Compute<T>;
    const T *const from = data<T>(call.x), *const d_y = data<T>(grad_output);
    std::vector<double> sums(call.samples * call.units() * call.channels);
    call.for_units([&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(attention_sums<true>, from, d_y, sums.data(), call.shape, begin, end);
    });
    ScaleRows<R> rows(call);
    std::vector<double> d_reduce(call.network.reduce.size()), d_expand(call.network.expand.size());
    for (int64_t n = 0; n < call.samples; ++n) {
      const auto first = all_means.begin() + n * call.channels;
      const std::vector<double> mean(first, first + call.channels), scale = call.network(mean).scale;
      const std::vector<double> d_mean = call.network.gradient(mean, call.of_sample(sums, n, 1), d_reduce, d_expand);
      for (int64_t c = 0; c < call.channels; ++c) {
        rows.scale[n * rows.pitch + c] = static_cast<R>(scale[c]);
        rows.shift[n * rows.pitch + c] = static_cast<R>(d_mean[c] / call.pixels);
      }
    }
    call.for_units([&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(attention_scale, d_y, rows.get(), mutable_data<T>(d_x), call.shape, begin, end);
    });
    for (size_t k = 0; k < d_reduce.size(); ++k) {
      mutable_data<T>(d_reduce_weight)[k] = from_float<T>(static_cast<R>(d_reduce[k]));
      mutable_data<T>(d_expand_weight)[k] = from_float<T>(static_cast<R>(d_expand[k]));
    }
  });
  return {in_layout(d_x, call.layout), d_reduce_weight, d_expand_weight};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("channel_attention", TORCH_BOX(&evkernels::channel_attention));
  m.impl("channel_attention_backward", TORCH_BOX(&evkernels::channel_attention_backward));
}
