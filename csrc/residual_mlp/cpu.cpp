// An MLP's residual branch on the CPU: checks, weights packed once per call, tiles of rows shared by threads,
// registration. The loops are in loops.inl.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/activation.h"
#include "common/tensor.h"
#include "common/workspace.h"
#include "residual_mlp/shape.h"

#define EVKERNELS_LOOPS "residual_mlp/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

Tensor dense(const Tensor& t) { return in_layout(t, MemoryFormat::Contiguous); }

// Zeros beyond the last element for the widest vectors.
template <class T>
std::vector<Compute<T>> widened(const Tensor& vector) {
  const Tensor from = dense(vector);
  std::vector<Compute<T>> wide(from.numel() + 16);
  for (int64_t k = 0; k < from.numel(); ++k) wide[k] = to_float(data<T>(from)[k]);
  return wide;
}

template <class T>
Workspace<Compute<T>> packed(const Tensor& weight) {
  const Tensor from = dense(weight);
  const int64_t outputs = from.size(0), inputs = from.size(1);
  auto memory = workspace<Compute<T>>(EVKERNELS_CALL(residual_mlp_packed_size<T>, inputs, outputs));
  EVKERNELS_CALL(residual_mlp_pack, data<T>(from), inputs, outputs, memory.get());
  return memory;
}

Tensor residual_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, Tensor weight2,
                    Tensor bias2, Tensor scale, double eps) {
  x = dense(x);
  STD_TORCH_CHECK(x.dim() >= 1 && weight1.dim() == 2, "x must be [..., C] and weight1 [H, C]");
  const int64_t channels = x.size(x.dim() - 1), hidden = weight1.size(0);
  STD_TORCH_CHECK(channels >= 1 && hidden >= 1 && weight1.size(1) == channels && weight2.dim() == 2 &&
                      weight2.size(0) == channels && weight2.size(1) == hidden,
                  "weight1 must be [H, C] and weight2 [C, H] with C the channels of x");
  for (const Tensor* vector : {&norm_weight, &norm_bias, &bias2, &scale})
    STD_TORCH_CHECK(vector->numel() == channels, "norm_weight, norm_bias, bias2 and scale must be [C]");
  STD_TORCH_CHECK(bias1.numel() == hidden, "bias1 must be [H]");
  for (const Tensor* tensor : {&norm_weight, &norm_bias, &weight1, &bias1, &weight2, &bias2, &scale})
    STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), "all tensors must have the dtype of x");
  Tensor y = empty_in_layout(x, x.scalar_type(), MemoryFormat::Contiguous);
  const MlpShape s = {x.numel() / channels, channels, hidden, eps};
  dispatch_floating("residual_mlp", x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const auto packed1 = packed<T>(weight1), packed2 = packed<T>(weight2);
    const auto v1 = widened<T>(norm_weight), v2 = widened<T>(norm_bias), v3 = widened<T>(bias1);
    const auto v4 = widened<T>(bias2), v5 = widened<T>(scale);
    const MlpVectors<A> vectors = {v1.data(), v2.data(), v3.data(), v4.data(), v5.data()};
    const int64_t tile = EVKERNELS_CALL(residual_mlp_tile);
    torch::stable::parallel_for(0, (s.count + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
      const auto memory = zeroed_workspace<A>(EVKERNELS_CALL(residual_mlp_memory<T>, s));
      EVKERNELS_CALL(residual_mlp_forward, data<T>(x), packed1.get(), packed2.get(), vectors, mutable_data<T>(y), s,
                     begin, end, memory.get());
    });
  });
  return y;
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) { m.impl("residual_mlp", TORCH_BOX(&evkernels::residual_mlp)); }
