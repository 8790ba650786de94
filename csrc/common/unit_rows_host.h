// Features as rows of unit length, and a library's products of them, for host functions whose loops include
// common/unit_rows.inl. Comes after foreach_isa.h.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "common/tensor.h"

namespace evkernels {
namespace {

using torch::stable::narrow;
using torch::stable::parallel_for;

// Rows per task of what is done row by row.
constexpr int64_t kUnitRowGrain = 64;

// Rows brought to unit length, with the factors that did it.
template <class A>
struct UnitRows {
  Tensor rows;  // [N, D]
  std::vector<A> inverses;

  Tensor part(int64_t begin, int64_t count) { return narrow(rows, 0, begin, count); }
};

ScalarType wide_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Unit rows of x and, below them, of `more`.
template <class T>
UnitRows<Compute<T>> make_unit_rows(const Tensor& x, const std::optional<Tensor>& more) {
  using A = Compute<T>;
  const int64_t D = x.size(1), first = x.size(0), N = first + (more ? more->size(0) : 0);
  UnitRows<A> made = {torch::stable::empty({N, D}, wide_dtype(x.scalar_type()), std::nullopt, x.device()),
                      std::vector<A>(N)};
  const auto fill = [&](const Tensor& from, int64_t at) {
    A* const to = mutable_data<A>(made.rows) + at * D;
    parallel_for(0, from.size(0), kUnitRowGrain, [&](int64_t begin, int64_t end) {
      EVKERNELS_CALL(unit_rows, data<T>(from), to, made.inverses.data() + at, D, begin, end);
    });
  };
  fill(x, 0);
  if (more) fill(*more, first);
  return made;
}

// out = alpha * left * right + beta * out.
void product(const Tensor& out, const Tensor& left, const Tensor& right, double alpha, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), beta, alpha));
}

}  // namespace
}  // namespace evkernels
