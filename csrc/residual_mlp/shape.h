// Sizes of one call, and its tensors.
#pragma once

#include <cstdint>

namespace evkernels {

struct MlpShape {
  int64_t count, channels, hidden;
  double eps;
};

// Vectors in the type of the computation, zero beyond their last element up to a whole vector of any instruction set.
template <class A>
struct MlpVectors {
  const A *norm_weight, *norm_bias, *bias1, *bias2, *scale;
};

}  // namespace evkernels
