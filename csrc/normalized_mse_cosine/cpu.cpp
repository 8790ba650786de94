// Mean squared difference and cosine of normalised rows on the CPU: tensors to pointers, threads, registration. Rows
// are shared by threads, and their results added in double in their order.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/activation.h"
#include "common/tensor.h"

#define EVKERNELS_LOOPS "normalized_mse_cosine/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Elements per task: about 10 us of work.
constexpr int64_t kGrain = 32768;

int64_t rows_per_task(const Tensor& a) { return kGrain / a.size(1) + 1; }

void check(Tensor& a, Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.numel() > 0 &&
                      a.scalar_type() == b.scalar_type(),
                  "a and b must both be [N, D] of one dtype, with sizes of at least 1");
  a = in_layout(a, MemoryFormat::Contiguous);
  b = in_layout(b, MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> normalized_mse_cosine(Tensor a, Tensor b) {
  check(a, b);
  const int64_t N = a.size(0), D = a.size(1);
  Tensor mse = torch::stable::empty({}, a.scalar_type(), std::nullopt, a.device());
  Tensor cosine = torch::stable::empty({}, a.scalar_type(), std::nullopt, a.device());
  dispatch_floating("normalized_mse_cosine", a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    std::vector<A> squares(N), cosines(N);
    torch::stable::parallel_for(0, N, rows_per_task(a), [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(normalized_mse_cosine_sums, data<T>(a), data<T>(b), squares.data(), cosines.data(), D, begin, end);
    });
    double square = 0, sum = 0;
    for (int64_t i = 0; i < N; ++i) {
      square += squares[i];
      sum += cosines[i];
    }
    *mutable_data<T>(mse) = from_float<T>(static_cast<A>(square / N / D));
    *mutable_data<T>(cosine) = from_float<T>(static_cast<A>(sum / N));
  });
  return {mse, cosine};
}

std::tuple<Tensor, Tensor> normalized_mse_cosine_backward(std::optional<Tensor> grad_mse,
                                                          std::optional<Tensor> grad_cosine, Tensor a, Tensor b) {
  check(a, b);
  for (const auto& gradient : {grad_mse, grad_cosine})
    STD_TORCH_CHECK(!gradient || (gradient->numel() == 1 && gradient->scalar_type() == a.scalar_type()),
                    "gradients must be numbers in the dtype of a");
  const int64_t N = a.size(0), D = a.size(1);
  Tensor d_a = empty_in_layout(a, a.scalar_type(), MemoryFormat::Contiguous);
  Tensor d_b = empty_in_layout(b, b.scalar_type(), MemoryFormat::Contiguous);
  dispatch_floating("normalized_mse_cosine_backward", a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    const auto number = [](const std::optional<Tensor>& t) { return t ? to_float(*data<T>(*t)) : A(0); };
    const A d_mse = number(grad_mse) * 2 / N / D, d_cosine = number(grad_cosine) / N;
    torch::stable::parallel_for(0, N, rows_per_task(a), [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(normalized_mse_cosine_gradients, data<T>(a), data<T>(b), mutable_data<T>(d_a),
                     mutable_data<T>(d_b), d_mse, d_cosine, D, begin, end);
    });
  });
  return {d_a, d_b};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("normalized_mse_cosine", TORCH_BOX(&evkernels::normalized_mse_cosine));
  m.impl("normalized_mse_cosine_backward", TORCH_BOX(&evkernels::normalized_mse_cosine_backward));
}
