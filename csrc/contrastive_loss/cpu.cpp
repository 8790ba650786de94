// Contrastive loss on the CPU: tiles of logits by a library's matrix products, what is done to a tile while it is in
// the cache, registration. The loops are in loops.inl.
//
// Logits are never stored whole. Forward, each tile's exponentials go into running sums of its rows and columns.
// Backward, each tile is computed again, turned into the gradient of the cosines in place, and multiplied into both
// gradients: 4 products of B x B x D in all, one more than with stored logits. What is saved are the passes over B x B
// numbers, which take plain PyTorch longer than its products. No logit exceeds the scale, so up to a scale of 40 one
// exponential serves a logit's row and its column; from there on sums are relative to running maxima, since everything
// could underflow. The derivative of the scale is a sum over gradients of rows, not over logits.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "common/activation.h"
#include "common/tensor.h"

#define EVKERNELS_LOOPS "contrastive_loss/loops.inl"
#include "common/foreach_isa.h"
#include "common/unit_rows_host.h"

namespace evkernels {
namespace {

// Rows and columns of a tile: four megabytes of float32. Products of 512 were 5 % slower, those of 256 7 %.
constexpr int64_t kTile = 1024;
// Rows of a tile whose columns are summed together: the tasks of a tile, the same for any number of threads.
constexpr int64_t kGroup = 128, kGroups = kTile / kGroup;
// From row to row of a tile: not a power of 2, for the cache's sake.
constexpr int64_t kStride = kTile + 16;
// Up to this scale exponentials of logits relative to the largest possible one stay normal numbers: e^(-2 * 40).
constexpr double kBoundedScale = 40;
template <class A>
struct Tile {
  Tensor logits;  // [rows, columns], in rows of kStride
  A* data;
  int64_t row, rows, column, columns, width;
  bool is_symmetric;  // its columns belong to pairs and count

  // Where the pairs of rows and columns begin that belong together, and how many there are.
  int64_t diagonal_row() const { return column > row ? column - row : 0; }
  int64_t diagonal_column() const { return row > column ? row - column : 0; }
  int64_t diagonal() const {
    const int64_t by_row = rows - diagonal_row(), by_column = columns - diagonal_column();
    const int64_t count = by_row < by_column ? by_row : by_column;
    return count < 0 ? 0 : count;
  }
};

// Calls f(tile) for every tile of logits, those of a row of tiles in turn. Tiles do not straddle pairs and queue.
template <class A, class F>
void for_each_tile(UnitRows<A>& p, UnitRows<A>& q, double scale, bool symmetric, const F& f) {
  const int64_t B = p.rows.size(0), N = q.rows.size(0);
  Tensor memory = torch::stable::empty({kTile, kStride}, p.rows.scalar_type(), std::nullopt, p.rows.device());
  const int64_t lanes = 16;  // of any instruction set
  for (int64_t i = 0; i < B; i += kTile) {
    const int64_t rows = B - i < kTile ? B - i : kTile;
    for (int64_t j = 0; j < N;) {
      const int64_t until = j < B ? B : N, columns = until - j < kTile ? until - j : kTile;
      Tensor half = narrow(memory, 0, 0, rows), logits = narrow(half, 1, 0, columns);
      Tensor right = q.part(j, columns);
      product(logits, p.part(i, rows), torch::stable::transpose(right, 0, 1), scale, 0);
      const int64_t width = (columns + lanes - 1) / lanes * lanes;
      A* const values = mutable_data<A>(memory);
      for (int64_t r = 0; width != columns && r < rows; ++r)
        for (int64_t c = columns; c < width; ++c) values[r * kStride + c] = -std::numeric_limits<A>::infinity();
      f(Tile<A>{logits, values, i, rows, j, columns, width, symmetric && j < B});
      j += columns;
    }
  }
}

template <class F>
void for_each_group(int64_t rows, const F& f) {
  parallel_for(0, (rows + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) f(g, g * kGroup, rows - g * kGroup < kGroup ? rows - g * kGroup : kGroup);
  });
}

void check(Tensor& a, Tensor& b, const Tensor& logit_scale, std::optional<Tensor>& queue) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.size(0) > 0,
                  "a and b must both be [B, D] with B of at least 1");
  STD_TORCH_CHECK(logit_scale.numel() == 1, "logit_scale must hold one number");
  STD_TORCH_CHECK(b.scalar_type() == a.scalar_type(), "b must have the dtype of a");
  a = in_layout(a, MemoryFormat::Contiguous);
  b = in_layout(b, MemoryFormat::Contiguous);
  if (!queue) return;
  STD_TORCH_CHECK(queue->dim() == 2 && queue->size(1) == a.size(1) && queue->scalar_type() == a.scalar_type(),
                  "queue must be [Q, D] in the dtype of a");
  queue = in_layout(*queue, MemoryFormat::Contiguous);
}

double number(const Tensor& t) {
  double value = 0;
  dispatch_floating("contrastive_loss", t.scalar_type(),
                    [&](auto type) { value = to_float(*data<typename decltype(type)::type>(t)); });
  return value;
}

Tensor new_scalar(double value, const Tensor& like) {
  Tensor t = torch::stable::empty({}, like.scalar_type(), std::nullopt, like.device());
  dispatch_floating("contrastive_loss", t.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    *mutable_data<T>(t) = from_float<T>(static_cast<Compute<T>>(value));
  });
  return t;
}

std::tuple<Tensor, Tensor, Tensor> contrastive_loss(Tensor a, Tensor b, Tensor logit_scale, std::optional<Tensor> queue,
                                                    bool symmetric) {
  check(a, b, logit_scale, queue);
  const int64_t B = a.size(0), sided = symmetric ? B : 0;
  const ScalarType wide = wide_dtype(a.scalar_type());
  Tensor of_rows = torch::stable::empty({B}, wide, std::nullopt, a.device());
  Tensor of_columns = torch::stable::empty({sided}, wide, std::nullopt, a.device());
  double loss = 0;
  dispatch_floating("contrastive_loss", a.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    UnitRows<A> p = make_unit_rows<T>(a, std::nullopt), q = make_unit_rows<T>(b, queue);
    const double scale = number(logit_scale), bound = std::abs(scale);
    const bool is_bounded = bound <= kBoundedScale;
    const A start = is_bounded ? static_cast<A>(bound) : -std::numeric_limits<A>::infinity();
    std::vector<A> row_top(B, start), row_sum(B), column_top(sided, start), column_sum(sided), matching(B);
    std::vector<A> group_top(kGroups * kStride), group_sum(kGroups * kStride);
    for_each_tile(p, q, scale, symmetric, [&](const Tile<A>& t) {
      for (int64_t k = 0; t.column < B && k < t.diagonal(); ++k)
        matching[t.row + t.diagonal_row() + k] = t.data[(t.diagonal_row() + k) * kStride + t.diagonal_column() + k];
      for_each_group(t.rows, [&](int64_t g, int64_t begin, int64_t count) {
        const int64_t at = t.row + begin;
        A* const top = t.is_symmetric ? &group_top[g * kStride] : nullptr;
        A* const sum = t.is_symmetric ? &group_sum[g * kStride] : nullptr;
        const A* const logits = t.data + begin * kStride;
        if (is_bounded)
          EVKERNELS_CALL(contrastive_loss_bounded_sums, logits, kStride, count, t.width, start, &row_sum[at], sum);
        else
          EVKERNELS_CALL(contrastive_loss_sums, logits, kStride, count, t.width, {&row_top[at], &row_sum[at]},
                         {top, sum});
      });
      for (int64_t g = 0; t.is_symmetric && g * kGroup < t.rows; ++g) {
        A *const top = &group_top[g * kStride], *const sum = &group_sum[g * kStride];
        if (is_bounded)
          EVKERNELS_CALL(contrastive_loss_add<A>, &column_sum[t.column], sum, t.columns);
        else
          EVKERNELS_CALL(contrastive_loss_merge<A>, {&column_top[t.column], &column_sum[t.column]}, {top, sum},
                         t.columns);
      }
    });
    double total = 0;
    const auto finish = [&](const std::vector<A>& top, const std::vector<A>& sum, Tensor& to) {
      A* const logs = mutable_data<A>(to);
      for (size_t i = 0; i < top.size(); ++i) {
        const double log = top[i] + std::log(static_cast<double>(sum[i]));
        logs[i] = static_cast<A>(log);
        total += log - matching[i];
      }
    };
    finish(row_top, row_sum, of_rows);
    finish(column_top, column_sum, of_columns);
    loss = total / (B + sided);
  });
  return {new_scalar(loss, a), of_rows, of_columns};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_loss_backward(Tensor grad_loss, Tensor a, Tensor b,
                                                                     Tensor logit_scale, std::optional<Tensor> queue,
                                                                     Tensor of_rows, Tensor of_columns, bool symmetric,
                                                                     bool need_a, bool need_b, bool need_scale,
                                                                     bool need_queue) {
  check(a, b, logit_scale, queue);
  const int64_t B = a.size(0), D = a.size(1), Q = queue ? queue->size(0) : 0, sided = symmetric ? B : 0;
  const ScalarType dtype = a.scalar_type(), wide = wide_dtype(dtype);
  STD_TORCH_CHECK(of_rows.numel() == B && of_columns.numel() == sided && of_rows.scalar_type() == wide &&
                      of_columns.scalar_type() == wide,
                  "the sums must be those of the forward");
  STD_TORCH_CHECK(grad_loss.numel() == 1, "grad_loss must hold one number");
  of_rows = in_layout(of_rows, MemoryFormat::Contiguous);
  of_columns = in_layout(of_columns, MemoryFormat::Contiguous);
  const bool need_p = need_a || need_scale, need_q = need_b || (Q && need_queue);
  const auto empty = [&](bool wanted, int64_t rows, ScalarType type) {
    if (!wanted) return torch::stable::empty({0}, type, std::nullopt, a.device());
    return torch::stable::empty({rows, D}, type, std::nullopt, a.device());
  };
  Tensor d_a = empty(need_a, B, dtype), d_b = empty(need_b, B, dtype);
  Tensor d_queue = empty(queue && need_queue, Q, dtype), d_scale;
  dispatch_floating("contrastive_loss_backward", dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    UnitRows<A> p = make_unit_rows<T>(a, std::nullopt), q = make_unit_rows<T>(b, queue);
    const double scale = number(logit_scale), share = number(grad_loss) / (B + sided), bound = std::abs(scale);
    const bool is_bounded = bound <= kBoundedScale;
    // Logarithms of sums, or e^bound over the sums.
    const auto brought = [&](const Tensor& logs) {
      std::vector<A> values(data<A>(logs), data<A>(logs) + logs.numel());
      for (A& value : values) value = is_bounded ? std::exp(static_cast<A>(bound) - value) : value;
      return values;
    };
    const std::vector<A> row_values = brought(of_rows), column_values = brought(of_columns);
    // Gradients of the unit rows, but for the scale and the share.
    Tensor d_p = empty(need_p, B, wide), d_q = empty(need_q, B + Q, wide);
    if (need_q) torch::stable::zero_(d_q);
    std::vector<A> padded(kStride);
    for_each_tile(p, q, scale, symmetric, [&](Tile<A> t) {
      const A* columns = nullptr;
      if (t.is_symmetric) {
        for (int64_t j = 0; j < t.columns; ++j) padded[j] = column_values[t.column + j];
        columns = padded.data();
      }
      for_each_group(t.rows, [&](int64_t, int64_t begin, int64_t count) {
        A* const logits = t.data + begin * kStride;
        const A* const rows = &row_values[t.row + begin];
        if (is_bounded)
          EVKERNELS_CALL(contrastive_loss_bounded_shares, logits, kStride, count, t.width, static_cast<A>(bound), rows,
                         columns);
        else
          EVKERNELS_CALL(contrastive_loss_shares, logits, kStride, count, t.width, rows, columns);
      });
      for (int64_t k = 0; t.column < B && k < t.diagonal(); ++k)
        t.data[(t.diagonal_row() + k) * kStride + t.diagonal_column() + k] -= symmetric ? 2 : 1;
      if (need_p) product(narrow(d_p, 0, t.row, t.rows), t.logits, q.part(t.column, t.columns), 1, t.column ? 1 : 0);
      if (need_q)
        product(narrow(d_q, 0, t.column, t.columns), torch::stable::transpose(t.logits, 0, 1), p.part(t.row, t.rows), 1,
                1);
    });
    std::vector<A> dots(B + Q);
    const auto finish = [&](const Tensor& from, UnitRows<A>& unit, int64_t at, int64_t count, Tensor& to) {
      const A factor = static_cast<A>(scale * share);
      parallel_for(0, count, kUnitRowGrain, [&](int64_t begin, int64_t end) {
        EVKERNELS_CALL(unit_rows_backward, data<A>(from) + at * D, data<A>(unit.rows) + at * D, &unit.inverses[at],
                       mutable_data<T>(to), dots.data() + at, factor, D, begin, end);
      });
    };
    if (need_b) finish(d_q, q, 0, B, d_b);
    if (Q && need_queue) finish(d_q, q, B, Q, d_queue);
    if (need_p) {
      Tensor unused = need_a ? d_a : empty(true, B, dtype);
      finish(d_p, p, 0, B, unused);
      double sum = 0;
      for (int64_t i = 0; i < B; ++i) sum += dots[i];
      d_scale = new_scalar(sum * share, logit_scale);
    }
  });
  if (!need_scale) d_scale = torch::stable::empty({0}, dtype, std::nullopt, a.device());
  return {d_a, d_b, d_scale, d_queue};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("contrastive_loss", TORCH_BOX(&evkernels::contrastive_loss));
  m.impl("contrastive_loss_backward", TORCH_BOX(&evkernels::contrastive_loss_backward));
}
