// Sizes of one call, and where things lie in the memory that the loops work in. Blocks of kTimes timestamps are the
// unit of work: every value of a feature or an output is a row of kTimes numbers, one per timestamp.
#pragma once

#include <cstdint>

namespace evkernels {

// Two vectors of the widest instruction set.
constexpr int64_t kTimes = 32;
// Outputs are padded to whole vectors and tiles of any instruction set.
constexpr int64_t kPad = 16;

// Features of a run: what one register sums before it is added to the total, with what rounding took from the total
// before. Features of low rates are the same at every timestamp, and so is the rounding of their sum, which the
// gradients of norm and scale, sums over all timestamps, multiply. Sums of 300 in one go, runs of 32 terms with no
// correction, and runs of 8 features broke the error bound of the tests; runs of 2 take a twentieth longer. Small runs
// keep their rows in the first-level cache, too: with those of all features (38 KB at dim 32) and the weights there, a
// fifth of the forward pass went to the second.
constexpr int64_t kRun = 4;
// Lists of rows are filled up to multiples of this, with a row of zeros.
constexpr int kRows = 10;

inline int64_t blocks_of(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }
inline int64_t padded(int64_t count) { return blocks_of(count, kPad) * kPad; }

struct TimeEmbeddingShape {
  int64_t fourier, spline;  // features, and outputs, of each part
  int64_t harmonics, bases;
  double eps;

  int64_t dim() const { return fourier + spline; }
  // Rows of features: cosine and sine of each harmonic; tanh and the bases. Behind either part's one of zeros.
  int64_t fourier_rows() const { return 2 * harmonics * fourier + 1; }
  int64_t spline_rows() const { return (bases + 1) * spline + 1; }
  int64_t rows() const { return fourier_rows() + spline_rows(); }
  // Mixing weights, [row][output]; those of the spline part follow those of the Fourier part.
  int64_t fourier_weights() const { return fourier_rows() * padded(fourier); }
  int64_t spline_weights() const { return spline_rows() * padded(spline); }
  int64_t weights() const { return fourier_weights() + spline_weights(); }
  // Numbers of the lists of rows, see Parts.
  int64_t lists() const {
    const int64_t longer = fourier > spline ? fourier : spline;
    return dim() + blocks_of(longer, kRun) * (kRun * (2 * harmonics + bases + 1) + 2 * kRows);
  }
  // Sums over timestamps: gradients of the mixing weights, and six vectors of `dim`.
  int64_t sums() const { return weights() + 6 * dim(); }
};

// The parameters in the type of the computation. `rate` and `shift` hold both parts, the Fourier part first.
template <class A>
struct TimeEmbeddingParameters {
  const A* rate;         // [dim]
  const A* shift;        // [dim]
  const A* weight;       // [weights], see above
  const A* bias;         // [fourier]
  const A* norm_weight;  // [dim] or null
  const A* norm_bias;    // [dim] or null
  const A* scale;        // [dim] or null
};

// Positions of the six vectors among the sums.
enum TimeEmbeddingSum { kRateSum, kShiftSum, kBiasSum, kNormWeightSum, kNormBiasSum, kScaleSum };

}  // namespace evkernels
