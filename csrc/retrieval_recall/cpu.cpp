// Recall of retrieval on the CPU: tiles of similarities by a library's matrix products, counted while in the cache,
// registration. The loop is in loops.inl. PyTorch's own comparison and sum of such a tile took longer than its product.

#include <torch/csrc/stable/library.h>

#include <limits>
#include <vector>

#include "common/activation.h"
#include "common/tensor.h"

#define EVKERNELS_LOOPS "retrieval_recall/loops.inl"
#include "common/foreach_isa.h"
#include "common/unit_rows_host.h"

namespace evkernels {
namespace {

// Rows and columns of a tile: a megabyte of float32, which stays in the second-level cache. From row to row it is not a
// power of 2, for the cache's sake.
constexpr int64_t kTile = 512, kStride = kTile + 16;

Tensor retrieval_recall(Tensor queries, Tensor targets, std::vector<int64_t> ks) {
  STD_TORCH_CHECK(queries.dim() == 2 && targets.dim() == 2 && queries.size(0) == targets.size(0) &&
                      queries.size(1) == targets.size(1) && queries.size(0) > 0 &&
                      queries.scalar_type() == targets.scalar_type(),
                  "queries and targets must both be [N, D] of one dtype, with N of at least 1");
  queries = in_layout(queries, MemoryFormat::Contiguous);
  targets = in_layout(targets, MemoryFormat::Contiguous);
  const int64_t N = queries.size(0), K = static_cast<int64_t>(ks.size());
  Tensor recall = torch::stable::empty({K}, ScalarType::Double, std::nullopt, queries.device());
  std::vector<int64_t> ranks(N), found(K);
  dispatch_floating("retrieval_recall", queries.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    UnitRows<A> p = make_unit_rows<T>(queries, std::nullopt), q = make_unit_rows<T>(targets, std::nullopt);
    Tensor memory = torch::stable::empty({kTile, kStride}, p.rows.scalar_type(), std::nullopt, queries.device());
    A* const tile = mutable_data<A>(memory);
    std::vector<A> owns(kTile);
    for (int64_t i = 0; i < N; i += kTile) {
      const int64_t rows = N - i < kTile ? N - i : kTile;
      const auto count = [&](int64_t j) {
        const int64_t columns = N - j < kTile ? N - j : kTile, width = (columns + 15) / 16 * 16;
        Tensor half = narrow(memory, 0, 0, rows), right = q.part(j, columns);
        product(narrow(half, 1, 0, columns), p.part(i, rows), torch::stable::transpose(right, 0, 1), 1, 0);
        for (int64_t r = 0; width != columns && r < rows; ++r)
          for (int64_t c = columns; c < width; ++c) tile[r * kStride + c] = -std::numeric_limits<A>::infinity();
        for (int64_t r = 0; i == j && r < rows; ++r) owns[r] = tile[r * kStride + r];
        parallel_for(0, rows, kUnitRowGrain, [&](int64_t begin, int64_t end) {
          EVKERNELS_CALL(retrieval_recall_count, tile, kStride, width, i == j, j < i, owns.data(), &ranks[i], begin,
                         end);
        });
      };
      count(i);
      for (int64_t j = 0; j < N; j += kTile)
        if (j != i) count(j);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < K; ++k) found[k] += ranks[i + r] < ks[k] && owns[r] == owns[r];
    }
  });
  for (int64_t k = 0; k < K; ++k) mutable_data<double>(recall)[k] = static_cast<double>(found[k]) / N;
  return recall;
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) { m.impl("retrieval_recall", TORCH_BOX(&evkernels::retrieval_recall)); }
