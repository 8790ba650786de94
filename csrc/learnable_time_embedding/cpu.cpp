// Learnable time embedding on the CPU: parameters widened and transposed once, blocks of timestamps shared by threads,
// registration. The loops are in loops.inl.
//
// The backward pass recomputes the forward one. Its sums over timestamps, the gradients of the parameters, are formed
// per chunk, and the chunks' sums added in double in their order; chunks depend on the number of timestamps alone.

#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "common/workspace.h"
#include "common/tensor.h"
#include "learnable_time_embedding/shape.h"

#define EVKERNELS_LOOPS "learnable_time_embedding/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Timestamps per task of the forward pass at least: about 20 us of work.
constexpr int64_t kForwardGrain = 256;
// Timestamps per chunk of the backward pass at least, and chunks at most: their sums together stay small.
constexpr int64_t kChunk = 512, kMostChunks = 64;

// The arguments between t and eps, contiguous.
struct Arguments {
  Tensor frequency, phase, fourier_weight, fourier_bias, rate, shift, base_weight, spline_weight;
  std::optional<Tensor> norm_weight, norm_bias, scale;
};

Tensor dense(const Tensor& t) { return in_layout(t, MemoryFormat::Contiguous); }
std::optional<Tensor> dense(const std::optional<Tensor>& t) { return t ? std::optional<Tensor>(dense(*t)) : t; }

TimeEmbeddingShape check(const Tensor& t, Arguments& a, double eps) {
  a = {dense(a.frequency),   dense(a.phase),     dense(a.fourier_weight), dense(a.fourier_bias),
       dense(a.rate),        dense(a.shift),     dense(a.base_weight),    dense(a.spline_weight),
       dense(a.norm_weight), dense(a.norm_bias), dense(a.scale)};
  STD_TORCH_CHECK(t.dim() == 1 && a.fourier_weight.dim() == 4 && a.spline_weight.dim() == 3,
                  "t must be [N], fourier_weight [2, F, F, G] and spline_weight [S, S, B]");
  const int64_t f = a.frequency.numel(), s = a.rate.numel();
  const TimeEmbeddingShape shape = {f, s, a.fourier_weight.size(3), a.spline_weight.size(2), eps};
  STD_TORCH_CHECK(f + s >= 1 && shape.harmonics >= 1 && shape.bases >= 4, "features, harmonics or bases are missing");
  STD_TORCH_CHECK(a.phase.numel() == f && a.fourier_bias.numel() == f &&
                      a.fourier_weight.numel() == 2 * f * f * shape.harmonics && a.shift.numel() == s &&
                      a.base_weight.numel() == s * s && a.spline_weight.numel() == s * s * shape.bases,
                  "the parameters disagree about the number of features");
  STD_TORCH_CHECK(a.norm_weight.has_value() == a.norm_bias.has_value(), "norm_weight and norm_bias come together");
  for (const auto* t_or_none : {&a.norm_weight, &a.norm_bias, &a.scale})
    STD_TORCH_CHECK(!t_or_none->has_value() || (*t_or_none)->numel() == f + s, "norm and scale must be [F + S]");
  for (const Tensor* parameter : {&a.frequency, &a.phase, &a.fourier_weight, &a.fourier_bias, &a.rate, &a.shift,
                                  &a.base_weight, &a.spline_weight})
    STD_TORCH_CHECK(parameter->scalar_type() == t.scalar_type(), "the parameters must have the dtype of t");
  for (const auto* t_or_none : {&a.norm_weight, &a.norm_bias, &a.scale})
    STD_TORCH_CHECK(!t_or_none->has_value() || (*t_or_none)->scalar_type() == t.scalar_type(),
                    "norm and scale must have the dtype of t");
  return shape;
}

// Calls f(value of the parameter, position in TimeEmbeddingParameters::weight) for both mixing products; f may as well
// assign to the parameter.
template <class T, class F>
void for_each_weight(T* fourier_weight, T* base_weight, T* spline_weight, const TimeEmbeddingShape& s, const F& f) {
  const int64_t width = padded(s.fourier), spline_width = padded(s.spline);
  for (int64_t part = 0; part < 2; ++part)
    for (int64_t o = 0; o < s.fourier; ++o)
      for (int64_t i = 0; i < s.fourier; ++i)
        for (int64_t k = 0; k < s.harmonics; ++k) f(*fourier_weight++, (2 * (i * s.harmonics + k) + part) * width + o);
  for (int64_t o = 0; o < s.spline; ++o) {
    for (int64_t i = 0; i < s.spline; ++i) {
      const int64_t row = (s.bases + 1) * i, to = s.fourier_weights() + o;
      f(*base_weight++, to + row * spline_width);
      for (int64_t b = 0; b < s.bases; ++b) f(*spline_weight++, to + (row + 1 + b) * spline_width);
    }
  }
}

// The parameters widened and laid out for the loops.
template <class T>
class Widened {
 public:
  using A = Compute<T>;

  Widened(const Arguments& a, const TimeEmbeddingShape& s) : memory_(s.weights() + 5 * s.dim() + padded(s.fourier)) {
    A* to = memory_.data();
    A* const weight = to;
    for_each_weight(data<T>(a.fourier_weight), data<T>(a.base_weight), data<T>(a.spline_weight), s,
                    [&](const T& value, int64_t at) { weight[at] = to_float(value); });
    to += s.weights();
    const auto widened = [&](const T* from, int64_t count) {
      A* const start = to;
      for (int64_t k = 0; from && k < count; ++k) start[k] = to_float(from[k]);
      to += count;
      return from ? start : nullptr;
    };
    // Not what `widened` returns: the data of an empty tensor may be null.
    A* const rate = to;
    widened(data<T>(a.frequency), s.fourier);
    widened(data<T>(a.rate), s.spline);
    A* const shift = to;
    widened(data<T>(a.phase), s.fourier);
    widened(data<T>(a.shift), s.spline);
    A* const norm_weight = widened(data<T>(a.norm_weight), s.dim());
    A* const norm_bias = widened(data<T>(a.norm_bias), s.dim());
    A* const scale = widened(data<T>(a.scale), s.dim());
    A* const bias = widened(data<T>(a.fourier_bias), s.fourier);
    pointers = {rate, shift, weight, bias, norm_weight, norm_bias, scale};
  }

  TimeEmbeddingParameters<A> pointers;

 private:
  std::vector<A> memory_;  // zeros where padding is
};

// Memory of one task; zeros, so that arithmetic on padding is harmless.
template <class A>
struct Scratch {
  Workspace<A> memory;
  std::vector<int32_t> lists;
  Scratch(const TimeEmbeddingShape& s, bool backward)
      : memory(zeroed_workspace<A>(EVKERNELS_CALL(time_embedding_memory<A>, s, backward))), lists(s.lists()) {}
};

Tensor learnable_time_embedding(Tensor t, Tensor frequency, Tensor phase, Tensor fourier_weight, Tensor fourier_bias,
                                Tensor rate, Tensor shift, Tensor base_weight, Tensor spline_weight,
                                std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                std::optional<Tensor> scale, double eps) {
  Arguments a = {frequency,   phase,         fourier_weight, fourier_bias, rate, shift,
                 base_weight, spline_weight, norm_weight,    norm_bias,    scale};
  const TimeEmbeddingShape s = check(t, a, eps);
  t = dense(t);
  const int64_t N = t.numel();
  Tensor embedding = torch::stable::empty({N, s.dim()}, t.scalar_type(), std::nullopt, t.device());
  dispatch_floating("learnable_time_embedding", t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Widened<T> parameters(a, s);
    torch::stable::parallel_for(0, blocks_of(N, kTimes), kForwardGrain / kTimes, [&](int64_t begin, int64_t end) {
      Scratch<Compute<T>> scratch(s, false);
      EVKERNELS_CALL(time_embedding_forward, data<T>(t), mutable_data<T>(embedding), parameters.pointers, s,
                     begin * kTimes, end * kTimes < N ? end * kTimes : N, scratch.memory.get(), scratch.lists.data());
    });
  });
  return embedding;
}

template <class T>
void narrow(const double* from, int64_t count, Tensor& to) {
  T* const out = mutable_data<T>(to);
  for (int64_t k = 0; k < count; ++k) out[k] = from_float<T>(static_cast<Compute<T>>(from[k]));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
learnable_time_embedding_backward(Tensor grad_embedding, Tensor t, Tensor frequency, Tensor phase,
                                  Tensor fourier_weight, Tensor fourier_bias, Tensor rate, Tensor shift,
                                  Tensor base_weight, Tensor spline_weight, std::optional<Tensor> norm_weight,
                                  std::optional<Tensor> norm_bias, std::optional<Tensor> scale, double eps) {
  Arguments a = {frequency,   phase,         fourier_weight, fourier_bias, rate, shift,
                 base_weight, spline_weight, norm_weight,    norm_bias,    scale};
  const TimeEmbeddingShape s = check(t, a, eps);
  t = dense(t);
  const int64_t N = t.numel();
  STD_TORCH_CHECK(grad_embedding.dim() == 2 && grad_embedding.size(0) == N && grad_embedding.size(1) == s.dim() &&
                      grad_embedding.scalar_type() == t.scalar_type(),
                  "grad_embedding must have the shape and dtype of the embedding");
  grad_embedding = dense(grad_embedding);
  const auto like = [](const Tensor& value) {
    return empty_in_layout(value, value.scalar_type(), MemoryFormat::Contiguous);
  };
  const auto like_or_nothing = [&](const std::optional<Tensor>& value) {
    return value ? like(*value) : torch::stable::empty({0}, t.scalar_type(), std::nullopt, t.device());
  };
  Tensor d_t = like(t), d_frequency = like(a.frequency), d_phase = like(a.phase);
  Tensor d_fourier_weight = like(a.fourier_weight), d_fourier_bias = like(a.fourier_bias), d_rate = like(a.rate);
  Tensor d_shift = like(a.shift), d_base_weight = like(a.base_weight), d_spline_weight = like(a.spline_weight);
  Tensor d_norm_weight = like_or_nothing(a.norm_weight), d_norm_bias = like_or_nothing(a.norm_bias);
  Tensor d_scale = like_or_nothing(a.scale);
  dispatch_floating("learnable_time_embedding_backward", t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const Widened<T> parameters(a, s);
    const int64_t even = blocks_of(blocks_of(N, kMostChunks), kTimes) * kTimes, size = even < kChunk ? kChunk : even;
    const int64_t chunks = blocks_of(N, size);
    const auto sums = workspace<A>(chunks * s.sums());
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(s, true);
      for (int64_t c = begin; c < end; ++c) {
        EVKERNELS_CALL(time_embedding_backward, data<T>(t), data<T>(grad_embedding), mutable_data<T>(d_t),
                       sums.get() + c * s.sums(), parameters.pointers, s, c * size,
                       (c + 1) * size < N ? (c + 1) * size : N, scratch.memory.get(), scratch.lists.data());
      }
    });
    std::vector<double> total(s.sums());
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t k = 0; k < s.sums(); ++k) total[k] += sums.get()[c * s.sums() + k];
    for_each_weight(mutable_data<T>(d_fourier_weight), mutable_data<T>(d_base_weight), mutable_data<T>(d_spline_weight),
                    s, [&](T& to, int64_t at) { to = from_float<T>(static_cast<A>(total[at])); });
    const auto vector = [&](TimeEmbeddingSum which) { return total.data() + s.weights() + which * s.dim(); };
    narrow<T>(vector(kRateSum), s.fourier, d_frequency);
    narrow<T>(vector(kRateSum) + s.fourier, s.spline, d_rate);
    narrow<T>(vector(kShiftSum), s.fourier, d_phase);
    narrow<T>(vector(kShiftSum) + s.fourier, s.spline, d_shift);
    narrow<T>(vector(kBiasSum), s.fourier, d_fourier_bias);
    narrow<T>(vector(kNormWeightSum), d_norm_weight.numel(), d_norm_weight);
    narrow<T>(vector(kNormBiasSum), d_norm_bias.numel(), d_norm_bias);
    narrow<T>(vector(kScaleSum), d_scale.numel(), d_scale);
  });
  return {d_t,     d_frequency,   d_phase,         d_fourier_weight, d_fourier_bias, d_rate,
          d_shift, d_base_weight, d_spline_weight, d_norm_weight,    d_norm_bias,    d_scale};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("learnable_time_embedding", TORCH_BOX(&evkernels::learnable_time_embedding));
  m.impl("learnable_time_embedding_backward", TORCH_BOX(&evkernels::learnable_time_embedding_backward));
}
