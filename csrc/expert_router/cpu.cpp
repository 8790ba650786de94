// Router of a mixture of experts on the CPU: weights widened and transposed once, blocks of timestamps shared by
// threads, registration. The loops are in loops.inl.
//
// The backward pass recomputes the forward one. Its sums over timestamps, the gradients of the weights, are formed per
// chunk, and the chunks' sums added in double in their order; chunks depend on the number of timestamps alone.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/workspace.h"
#include "common/tensor.h"
#include "expert_router/shape.h"

#define EVKERNELS_LOOPS "expert_router/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Timestamps per task of the forward pass at least: some 20 us of work.
constexpr int64_t kForwardGrain = 512;
// Timestamps per chunk of the backward pass at least, and chunks at most: their sums together stay small.
constexpr int64_t kChunk = 512, kMostChunks = 64;

Tensor dense(const Tensor& t) { return in_layout(t, MemoryFormat::Contiguous); }

// The arguments, contiguous and checked; parameters are weight and bias of each layer in turn.
struct RouterCall {
  Tensor x, parameters[6];
  RouterShape shape;
  int64_t count;

  RouterCall(const Tensor& x_, std::initializer_list<Tensor> parameters_, int64_t top) : x(dense(x_)) {
    int64_t position = 0;
    for (const Tensor& parameter : parameters_) parameters[position++] = dense(parameter);
    STD_TORCH_CHECK(x.dim() == 2, "x must be [N, I]");
    count = x.size(0);
    shape = {{x.size(1), 0, 0, 0}, top};
    for (int k = 0; k < 3; ++k) {
      const Tensor &weight = parameters[2 * k], &bias = parameters[2 * k + 1];
      STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == shape.sizes[k] && bias.numel() == weight.size(0),
                      "weights must be [outputs, inputs] and biases [outputs], one layer's outputs the next one's "
                      "inputs");
      STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type(),
                      "all tensors must have the dtype of x");
      shape.sizes[k + 1] = weight.size(0);
    }
    for (const int64_t size : shape.sizes) STD_TORCH_CHECK(size >= 1, "layers must not be empty");
  }

  // Calls f(parameter, place in it, position among the weights) for every number of the parameters, layer by layer,
  // weights first.
  template <class F>
  void for_each_weight(const F& f) const {
    int64_t start = 0;
    for (int k = 0; k < 3; ++k) {
      const int64_t inputs = shape.sizes[k], outputs = shape.sizes[k + 1], width = padded(outputs);
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < inputs; ++i) f(2 * k, o * inputs + i, start + i * width + o);
      for (int64_t o = 0; o < outputs; ++o) f(2 * k + 1, o, start + inputs * width + o);
      start += shape.layer_weights(k);
    }
  }

  template <class T>
  std::vector<Compute<T>> weights() const {
    const T* from[6];
    for (int k = 0; k < 6; ++k) from[k] = data<T>(parameters[k]);
    std::vector<Compute<T>> weights(shape.weights());  // zeros where padding is
    for_each_weight([&](int which, int64_t place, int64_t at) { weights[at] = to_float(from[which][place]); });
    return weights;
  }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

std::tuple<Tensor, Tensor> expert_router(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,
                                         Tensor weight3, Tensor bias3, int64_t top) {
  const RouterCall c(x, {weight1, bias1, weight2, bias2, weight3, bias3}, top);
  const RouterShape& s = c.shape;
  const auto output = [&] {
    return torch::stable::empty({s.sizes[3], c.count}, c.x.scalar_type(), std::nullopt, c.x.device());
  };
  Tensor weights = output(), gates = output();
  dispatch_floating("expert_router", c.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const auto parameters = c.weights<T>();
    torch::stable::parallel_for(0, blocks_of(c.count, kTimes), kForwardGrain / kTimes, [&](int64_t begin, int64_t end) {
      const auto memory = zeroed_workspace<A>(EVKERNELS_CALL(router_memory<A>, s, false));
      EVKERNELS_CALL(expert_router_forward, data<T>(c.x), mutable_data<T>(weights), mutable_data<T>(gates),
                     parameters.data(), s, c.count, begin * kTimes, smaller(end * kTimes, c.count), memory.get());
    });
  });
  return {weights, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_router_backward(
    std::optional<Tensor> grad_weights, std::optional<Tensor> grad_gates, Tensor x, Tensor weight1, Tensor bias1,
    Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3, int64_t top) {
  const RouterCall c(x, {weight1, bias1, weight2, bias2, weight3, bias3}, top);
  const RouterShape& s = c.shape;
  for (auto* grad : {&grad_weights, &grad_gates}) {
    if (!grad->has_value()) continue;
    STD_TORCH_CHECK((*grad)->dim() == 2 && (*grad)->size(0) == s.sizes[3] && (*grad)->size(1) == c.count &&
                        (*grad)->scalar_type() == c.x.scalar_type(),
                    "gradients must have the shape and dtype of the results");
    *grad = dense(**grad);
  }
  const auto like = [](const Tensor& value) {
    return empty_in_layout(value, value.scalar_type(), MemoryFormat::Contiguous);
  };
  Tensor d_x = like(c.x), d_parameters[6];
  for (int k = 0; k < 6; ++k) d_parameters[k] = like(c.parameters[k]);
  dispatch_floating("expert_router_backward", c.x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const auto parameters = c.weights<T>();
    const int64_t even = blocks_of(blocks_of(c.count, kMostChunks), kTimes) * kTimes;
    const int64_t size = even < kChunk ? kChunk : even, chunks = blocks_of(c.count, size), all = s.weights();
    const auto sums = workspace<A>(chunks * all);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      const auto memory = zeroed_workspace<A>(EVKERNELS_CALL(router_memory<A>, s, true));
      std::vector<int32_t> list(s.most_room() + kRows);
      for (int64_t k = begin; k < end; ++k) {
        EVKERNELS_CALL(expert_router_backward, data<T>(grad_weights), data<T>(grad_gates), data<T>(c.x),
                       mutable_data<T>(d_x), sums.get() + k * all, parameters.data(), s, c.count, k * size,
                       smaller((k + 1) * size, c.count), memory.get(), list.data());
      }
    });
    T* to[6];
    for (int k = 0; k < 6; ++k) to[k] = mutable_data<T>(d_parameters[k]);
    std::vector<double> total(all);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t k = 0; k < all; ++k) total[k] += sums.get()[chunk * all + k];
    c.for_each_weight(
        [&](int which, int64_t place, int64_t at) { to[which][place] = from_float<T>(static_cast<A>(total[at])); });
  });
  return {d_x, d_parameters[0], d_parameters[1], d_parameters[2], d_parameters[3], d_parameters[4], d_parameters[5]};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("expert_router", TORCH_BOX(&evkernels::expert_router));
  m.impl("expert_router_backward", TORCH_BOX(&evkernels::expert_router_backward));
}
