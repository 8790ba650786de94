// Gated sums of basis functions of time on the CPU: tensors to pointers, threads, registration. The loops are in
// loops.inl.
//
// The backward pass recomputes the basis functions. Its sums over timestamps are formed per chunk, and the chunks' sums
// added in double in their order; chunks depend on the number of timestamps alone.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <type_traits>
#include <vector>

#include "common/workspace.h"
#include "common/tensor.h"
#include "learnable_time_embedding/shape.h"
#include "time_basis/kind.h"

#define EVKERNELS_LOOPS "time_basis/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Timestamps per task of the forward pass at least: some 20 us of work.
constexpr int64_t kForwardGrain = 512;
// Timestamps per chunk of the backward pass at least, and chunks at most: their sums together stay small.
constexpr int64_t kChunk = 512, kMostChunks = 64;

TimeBasis kind_of(const std::string& name) {
  if (name == "cosine") return TimeBasis::kCosine;
  if (name == "gaussian") return TimeBasis::kGaussian;
  if (name == "mexican_hat") return TimeBasis::kMexicanHat;
  if (name == "morlet") return TimeBasis::kMorlet;
  STD_TORCH_CHECK(name == "stepped_cubic", "kind must be cosine, gaussian, mexican_hat, morlet or stepped_cubic");
  return TimeBasis::kSteppedCubic;
}

Tensor dense(const Tensor& t) { return in_layout(t, MemoryFormat::Contiguous); }

// The arguments, contiguous and checked.
struct TimeBasisCall {
  Tensor t, gate, rate, shift, weight;
  TimeBasis kind;
  int64_t count, features, functions;

  TimeBasisCall(const Tensor& t_, const Tensor& gate_, const Tensor& rate_, const Tensor& shift_, const Tensor& weight_,
                const std::string& kind_)
      : t(dense(t_)),
        gate(dense(gate_)),
        rate(dense(rate_)),
        shift(dense(shift_)),
        weight(dense(weight_)),
        kind(kind_of(kind_)) {
    STD_TORCH_CHECK(t.dim() == 1 && rate.dim() == 2, "t must be [N] and rate [D, J]");
    count = t.numel();
    features = rate.size(0);
    functions = rate.size(1);
    STD_TORCH_CHECK(gate.numel() == count, "gate must be [N]");
    STD_TORCH_CHECK(shift.numel() == rate.numel() && weight.numel() == rate.numel(),
                    "shift and weight must be [D, J] like rate");
    for (const Tensor* other : {&gate, &rate, &shift, &weight})
      STD_TORCH_CHECK(other->scalar_type() == t.scalar_type(), "all tensors must have the dtype of t");
  }
};

template <class T>
std::vector<Compute<T>> widened(const Tensor& values) {
  const T* const from = data<T>(values);
  std::vector<Compute<T>> to(values.numel());
  for (size_t k = 0; k < to.size(); ++k) to[k] = to_float(from[k]);
  return to;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor zeros = torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device());
  if (zeros.numel()) std::memset(zeros.mutable_data_ptr(), 0, zeros.numel() * zeros.element_size());
  return zeros;
}

Tensor time_basis(Tensor t, Tensor gate, Tensor rate, Tensor shift, Tensor weight, std::string kind) {
  const TimeBasisCall c(t, gate, rate, shift, weight, kind);
  Tensor embedding = zeros(c.t, {c.count, c.features});
  dispatch_floating("time_basis", c.t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto rates = widened<T>(c.rate), shifts = widened<T>(c.shift), weights = widened<T>(c.weight);
    torch::stable::parallel_for(0, c.count, kForwardGrain, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(time_basis_forward, c.kind, data<T>(c.t), data<T>(c.gate), rates.data(), shifts.data(),
                     weights.data(), mutable_data<T>(embedding), c.features, c.functions, begin, end);
    });
  });
  return embedding;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> time_basis_backward(Tensor grad_embedding, Tensor t, Tensor gate,
                                                                       Tensor rate, Tensor shift, Tensor weight,
                                                                       std::string kind) {
  const TimeBasisCall c(t, gate, rate, shift, weight, kind);
  STD_TORCH_CHECK(grad_embedding.dim() == 2 && grad_embedding.size(0) == c.count &&
                      grad_embedding.size(1) == c.features && grad_embedding.scalar_type() == c.t.scalar_type(),
                  "grad_embedding must have the shape and dtype of the embedding");
  grad_embedding = dense(grad_embedding);
  Tensor d_t = zeros(c.t, {c.count}), d_gate = zeros(c.t, {c.count});
  Tensor d_parameters[3];
  for (Tensor& d : d_parameters) d = empty_in_layout(c.rate, c.t.scalar_type(), MemoryFormat::Contiguous);
  dispatch_floating("time_basis_backward", c.t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const auto rates = widened<T>(c.rate), shifts = widened<T>(c.shift), weights = widened<T>(c.weight);
    const int64_t even = blocks_of(c.count, kMostChunks), size = even < kChunk ? kChunk : even;
    const int64_t chunks = blocks_of(c.count, size), all = c.features * c.functions;
    std::vector<A> sums(chunks * 3 * all);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      const auto lanes = workspace<A>(all * EVKERNELS_CALL(time_basis_lanes<A>));
      for (int64_t k = begin; k < end; ++k) {
        EVKERNELS_CALL(time_basis_backward, c.kind, data<T>(grad_embedding), data<T>(c.t), data<T>(c.gate),
                       rates.data(), shifts.data(), weights.data(), mutable_data<T>(d_t), mutable_data<T>(d_gate),
                       sums.data() + k * 3 * all, lanes.get(), c.features, c.functions, k * size,
                       (k + 1) * size < c.count ? (k + 1) * size : c.count);
      }
    });
    for (int which = 0; which < 3; ++which) {
      T* const to = mutable_data<T>(d_parameters[which]);
      for (int64_t j = 0; j < all; ++j) {
        double total = 0;
        for (int64_t k = 0; k < chunks; ++k) total += sums[(3 * k + which) * all + j];
        to[j] = from_float<T>(static_cast<A>(total));
      }
    }
  });
  return {d_t, d_gate, d_parameters[0], d_parameters[1], d_parameters[2]};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("time_basis", TORCH_BOX(&evkernels::time_basis));
  m.impl("time_basis_backward", TORCH_BOX(&evkernels::time_basis_backward));
}
