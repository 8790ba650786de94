// Loops of contrastive_loss, compiled once per instruction set: rows to unit length, sums of exponentials of a tile of
// logits, a tile's gradient. A tile's rows are whole vectors long; what lies beyond its last column is minus infinity.

#include "common/activations.inl"
#include "common/rows.inl"
#include "common/unit_rows.inl"

// Running maxima and sums of exponentials relative to them, one per row or per column.
template <class A>
struct RunningSums {
  A *top, *sum;

  EVKERNELS_LOOP_BODY RunningSums from(int64_t offset) const { return {top + offset, sum + offset}; }
};

// Takes `rows` rows of logits into the sums of their rows and, unless `columns` is null, starts those of the columns.
template <class A>
static void contrastive_loss_sums(const A* tile, int64_t stride, int64_t rows, int64_t width, RunningSums<A> of_rows,
                                  RunningSums<A> columns) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  const V lowest = V{} + (A)-__builtin_inf();
  for (int64_t j = 0; columns.top && j < width; j += kLanes) {
    store(columns.top + j, lowest);
    store(columns.sum + j, V{});
  }
  for (int64_t i = 0; i < rows; ++i) {
    const A* const row = tile + i * stride;
    V highest = lowest;
    for (int64_t j = 0; j < width; j += kLanes) {
      const V logit = load(row + j);
      highest = larger(highest, logit);
      if (columns.top) store(columns.top + j, larger(load(columns.top + j), logit));
    }
    const A top = larger(of_rows.top[i], largest_lane(highest));
    V sum = {};
    for (int64_t j = 0; j < width; j += kLanes) sum += exp(load(row + j) - top);
    of_rows.sum[i] = of_rows.sum[i] * exp_of(of_rows.top[i] - top) + sum_of_lanes(sum);
    of_rows.top[i] = top;
  }
  for (int64_t i = 0; columns.top && i < rows; ++i) {
    const A* const row = tile + i * stride;
    for (int64_t j = 0; j < width; j += kLanes)
      store(columns.sum + j, load(columns.sum + j) + exp(load(row + j) - load(columns.top + j)));
  }
}

// The same where no logit is above `bound`, so that one exponential serves row and column: `bound` is the maximum of
// all.
template <class A>
static void contrastive_loss_bounded_sums(const A* tile, int64_t stride, int64_t rows, int64_t width, A bound,
                                          A* of_rows, A* columns) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  for (int64_t j = 0; columns && j < width; j += kLanes) store(columns + j, V{});
  for (int64_t i = 0; i < rows; ++i) {
    const A* const row = tile + i * stride;
    V sum = {};
    for (int64_t j = 0; j < width; j += kLanes) {
      const V share = exp(load(row + j) - bound);
      sum += share;
      if (columns) store(columns + j, load(columns + j) + share);
    }
    of_rows[i] += sum_of_lanes(sum);
  }
}

// Adds one group's sums of the columns to those of all groups before it.
template <class A>
static void contrastive_loss_merge(RunningSums<A> all, RunningSums<A> group, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    const A top = larger(all.top[j], group.top[j]);
    all.sum[j] = all.sum[j] * exp_of(all.top[j] - top) + group.sum[j] * exp_of(group.top[j] - top);
    all.top[j] = top;
  }
}

// The same for bounded logits.
template <class A>
static void contrastive_loss_add(A* all, const A* group, int64_t width) {
  for (int64_t j = 0; j < width; ++j) all[j] += group[j];
}

// Logits to shares: each logit's exponential over its row's sum, plus that over its column's unless `of_columns` is
// null. The arrays hold the sums' logarithms.
template <class A>
static void contrastive_loss_shares(A* tile, int64_t stride, int64_t rows, int64_t width, const A* of_rows,
                                    const A* of_columns) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    A* const row = tile + i * stride;
    const A of_row = of_rows[i];
    if (of_columns) {
      for (int64_t j = 0; j < width; j += kLanes) {
        const V logit = load(row + j);
        store(row + j, exp(logit - of_row) + exp(logit - load(of_columns + j)));
      }
    } else {
      for (int64_t j = 0; j < width; j += kLanes) store(row + j, exp(load(row + j) - of_row));
    }
  }
}

// The same for bounded logits: the arrays hold e^bound over each sum.
template <class A>
static void contrastive_loss_bounded_shares(A* tile, int64_t stride, int64_t rows, int64_t width, A bound,
                                            const A* of_rows, const A* of_columns) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    A* const row = tile + i * stride;
    const V of_row = V{} + of_rows[i];
    if (of_columns) {
      for (int64_t j = 0; j < width; j += kLanes)
        store(row + j, exp(load(row + j) - bound) * (of_row + load(of_columns + j)));
    } else {
      for (int64_t j = 0; j < width; j += kLanes) store(row + j, exp(load(row + j) - bound) * of_row);
    }
  }
}
