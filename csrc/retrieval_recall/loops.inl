// Loops of retrieval_recall, compiled once per instruction set: how many similarities of a tile's rows are larger than
// the row's own. A tile's rows are whole vectors long; what lies beyond its last column is minus infinity.

#include "common/activations.inl"
#include "common/rows.inl"
#include "common/unit_rows.inl"

EVKERNELS_INLINE int64_t count_of(VecI mask) {
  int64_t sum = 0;
  for (int k = 0; k < EVKERNELS_LANES; ++k) sum -= mask[k];
  return sum;
}

// Where `ties`, equal ones count too.
template <bool ties>
static int64_t count_larger(const float* row, int64_t width, float own) {
  VecI counts = {};
  for (int64_t j = 0; j < width; j += EVKERNELS_LANES) {
    const VecF v = load(row + j);
    counts += ties ? v >= own : v > own;
  }
  return count_of(counts);
}
template <bool ties>
static int64_t count_larger(const double* row, int64_t width, double own) {
  int64_t sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += ties ? row[j] >= own : row[j] > own;
  return sum;
}

// Adds to the ranks of rows [begin, end) of a tile whose columns all lie before the rows' own (`ties`), all after, or,
// where `diagonal`, on both sides: then row i's own is column i.
template <class A>
static void retrieval_recall_count(const A* tile, int64_t stride, int64_t width, bool diagonal, bool ties,
                                   const A* owns, int64_t* ranks, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const A* const row = tile + i * stride;
    const A own = owns[i];
    ranks[i] += ties ? count_larger<true>(row, width, own) : count_larger<false>(row, width, own);
    for (int64_t j = 0; diagonal && j < i; ++j) ranks[i] += row[j] == own;
  }
}
